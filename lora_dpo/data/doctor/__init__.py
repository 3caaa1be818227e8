"""The doctor: what would spoil a run on preference data, with rows, examples and what to do.

catalogue         what each finding does to DPO, and what to do about it
checks            how each of them is looked for
near_duplicates   pairs with almost the same words, in one pass
statistics        lengths, length bias, label noise
examination       one pass over the data that puts all of it together
"""

from __future__ import annotations

from lora_dpo.data.doctor.examination import Diagnosis, Finding, examine

__all__ = ["Diagnosis", "Finding", "examine"]
