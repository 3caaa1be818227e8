"""One run: prepared, trained under a guard, measured before and after, saved; and its plan.

prepared            what is known of a run before weights are loaded
resolved            that, line by line
prepare             from a recipe to everything that is known before weights are loaded
step_aside          when TRL's own passes must run instead of the engine
reference_guard     step 0: is the policy still what it is held to?
pair_weights        pairs that count more or less
score_ahead         the references of a whole dataset before the first step
dpo_trainer         TRL's DPOTrainer on the engine
sft_kto_trainers    TRL's SFT and KTO trainers on the one base
guard/              health while it trains: samples, alarms, what to do
before_after        what is measured before and after
run_summary         what a run leaves for its report
run                 a recipe becomes a run
planning/           what a run will need and take, before it
improve_rounds      rounds of sample, judge, train
"""
