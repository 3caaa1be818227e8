"""What can be read off the text of an answer, without any model."""

from __future__ import annotations

import re

REFUSAL = re.compile(
    r"^\W*(?:i(?:'m| am) (?:very |so |truly |really )?sorry\b|sorry\b|i apologi[sz]e\b|unfortunately,? i\b|as an ai\b|"
    r"(?:i(?:'m| am)|while i(?:'m| am)) (?:not able|unable|not equipped|not allowed|not programmed)\b|"
    r"i (?:can(?:not|'t| not)|won't|will not|must decline|do not have the ability|don't have the ability)\b)",
    re.IGNORECASE,
)
"""How English refusals begin. Other languages, and refusals further on, are not seen."""


def repetition(text: str) -> float:
    """Share of three-word sequences that stood there before (seq-rep-3, Welleck et al. 2020, arXiv 1908.04319)."""
    words = re.findall(r"\w+", text.lower())
    threes = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(threes)) / len(threes) if threes else 0.0


def refuses(text: str) -> bool:
    """True if the answer begins as an English refusal does."""
    return REFUSAL.match(text.replace("\u2019", "'")) is not None
