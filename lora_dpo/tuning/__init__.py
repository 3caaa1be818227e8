"""Which settings make the best adapter of some data: many short runs on one base, and a choice that is proven.

space             what is varied, and a recipe with other values put in
parts             three parts of the data, by prompt: to train on, to choose by, to report from
score             what 'best' means, as one number
measure           a policy on one part of the data
trials            one candidate after the other, kept on the disk
study             candidates drawn by Optuna
time_limit        which candidates are expected to end in time
folder            where a search lies
result            what it came to
verdict           whether there was something to learn
page              its page
table             its candidates as rows, for programs
search            what every search begins with
choose_settings   the search from data to adapter
grid              every combination, on the same trials
"""

from __future__ import annotations

from lora_dpo.tuning.choose_settings import tune
from lora_dpo.tuning.grid import SweepResult, sweep
from lora_dpo.tuning.result import TuneResult

__all__ = ["SweepResult", "TuneResult", "sweep", "tune"]
