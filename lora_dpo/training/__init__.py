"""One run: prepared, trained under a guard, measured before and after, saved; and its plan.

prepared            the value that holds what is known of a run before weights are loaded
resolved            the resolved settings, as lines of text
prepare             from a recipe to everything that is known before weights are loaded
engine_fallback     when TRL's own passes must run instead of the engine
reference_guard     step 0: is the policy still what it is held to?
pair_weights        pairs that count more or less
score_ahead         the references of a whole dataset before the first step
dpo_trainer         TRL's DPOTrainer on the engine
sft_kto_trainers    TRL's SFT and KTO trainers on the one base
guard/              health while it trains: samples, alarms, what to do
before_after        what is measured before and after
run_summary         what a run leaves for its report
data_record         the data of a run, and what of it has changed since
pairs_seen          the margins of its pairs as its steps saw them, by the rows of its data
policy              the base in memory and an adapter on it
run                 a recipe becomes a run
planning/           what a run will need and take, before it
drafting/           from pairs to a recipe
round_scores        what rounds are measured by, and their table
improve_rounds      rounds of sample, judge, train
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_dpo.events import Stopped, StopSignal
from lora_dpo.training.improve_rounds import improve
from lora_dpo.training.planning.make_plan import plan
from lora_dpo.training.planning.plan_values import Plan
from lora_dpo.training.run import TrainResult, train

if TYPE_CHECKING:
    from lora_dpo.training.dpo_trainer import DPOTrainer

__all__ = ["DPOTrainer", "Plan", "StopSignal", "Stopped", "TrainResult", "improve", "plan", "train"]


def __getattr__(name: str) -> Any:
    """`DPOTrainer` is a class on top of TRL's: TRL is imported when it is first looked up."""
    if name == "DPOTrainer":
        from lora_dpo.training.dpo_trainer import DPOTrainer

        return DPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
