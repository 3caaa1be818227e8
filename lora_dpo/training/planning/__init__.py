"""Before any training: what a recipe will read, compute, need and take.

plan_values   what a plan holds
memory_plan   predicted peak memory, and the settings that make it fit
step_time     how long a step takes
dry_run       two real steps on the longest pairs
make_plan     all of it in one value
lines         that value in words
"""
