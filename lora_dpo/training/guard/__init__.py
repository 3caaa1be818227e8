"""The guard of a run: it hears the monitor, acts on alarms, and decides which step's adapter is the result.

monitor              detects collapse: logged numbers and sampled answers to alarms; pure functions
advice               why each alarm happens, and which setting to change
completion_sampler   a few answers in the middle of a run
snapshots            states of the adapter that may be gone back to
training_guard       decides on an alarm: stop, lower the rate, go back to a healthy step
callback             the guard as a callback of transformers' Trainer
"""
