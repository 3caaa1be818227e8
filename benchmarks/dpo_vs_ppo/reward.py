"""The true reward: VADER's compound sentiment of the continuation alone (Hutto & Gilbert 2014), from -1 to 1.

A fixed lexicon with rules, known exactly to every method that may look at it: PPO is given it, the pairs are
labelled by it, and all policies are measured with it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any


@functools.cache
def _analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def rewards(texts: Sequence[str]) -> list[float]:
    """One reward a text."""
    return [float(_analyzer().polarity_scores(text)["compound"]) for text in texts]
