"""The guard of a run: it hears the monitor, acts on alarms, and decides which step's adapter is the result.

monitor              from logged numbers and sampled answers to alarms; pure functions
advice               why each alarm happens, and which setting to change
completion_sampler   a few answers in the middle of a run
snapshots            states of the adapter that may be gone back to
training_guard       what is done about an alarm
callback             the guard as a callback of transformers' Trainer
"""
