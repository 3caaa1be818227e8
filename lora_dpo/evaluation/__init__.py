"""Is it better? Numbers with intervals, and pages that show them.

intervals        95% intervals of what is counted and averaged
metrics          accuracy, margin, log-ratios; length and ends of answers
prequential      accuracy on training pairs, scored before they were trained on
suspicion        which pairs disagree with the rest: those that the policy orders the other way round
kl               how far the policy is from its reference, token by token
win_rate         win rate with its 95% interval, from a judge in both orders or from votes
result           what an evaluation found, and the verdict that it allows
requirements     bounds on it, as a user writes them
evaluate         all of it, with one base in memory
saved            where evaluations are kept
verify_adapter   does an adapter still compute what its maker measured?
report/          pages about runs and evaluations
"""

from __future__ import annotations

from lora_dpo.evaluation.evaluate import AssessPlan, assess
from lora_dpo.evaluation.report import write_report
from lora_dpo.evaluation.suspicion import suspicious_pairs
from lora_dpo.evaluation.verify_adapter import verify

__all__ = ["AssessPlan", "assess", "suspicious_pairs", "verify", "write_report"]
