"""Before any training: what a recipe will read, compute, need and take.

cards          cards by name: memory and speed as they are published
answer_memory  what answering before, after and beside the training takes
memory_plan    predicted peak memory
fixes          the settings that make a run fit
loading        the download, and main memory while weights are loaded
plan_values    what a plan holds
step_time      how long the steps take
dry_run        two real steps on the longest pairs
make_plan      all of it in one value
lines          that value in words
"""
