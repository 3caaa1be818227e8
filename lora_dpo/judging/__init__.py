"""Judges: each scores the answers to a prompt; `open_judge` makes one from what a user writes."""

from __future__ import annotations

from lora_dpo.judging.judge import Judge, ScoreFunction, Scores
from lora_dpo.judging.specs import Means, open_judge

__all__ = ["Judge", "Means", "ScoreFunction", "Scores", "open_judge"]
