"""Numbers that describe preference data: lengths, how far length predicts the label, and how noisy labels are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

PERCENTILES = (5, 25, 50, 75, 95, 99, 100)


@dataclass(frozen=True)
class LengthBias:
    """How answers of a pair compare in length."""

    chosen_longer: float = 0.0
    """Share of pairs whose chosen answer is the longer one."""
    same: float = 0.0
    predicts: float = 0.5
    """Share of pairs that the better of 'the longer wins' and 'the shorter wins' gets right; a tie counts half."""

    def as_json(self) -> dict[str, float]:
        """As plain values."""
        return asdict(self)

    @property
    def longer_wins(self) -> bool:
        """Whether the longer answer is the chosen one at least as often as the shorter."""
        return self.chosen_longer + self.same / 2 >= 0.5

    def sentence(self, unit: str) -> str:
        """For a report."""
        rule = "longer" if self.longer_wins else "shorter"
        return f"'the {rule} answer is the better one' (in {unit}) is right for {self.predicts:.0%} of the pairs"


@dataclass
class Noise:
    """Repeated judgements of the same two answers to the same prompt."""

    comparisons: int = 0
    """Comparisons that were judged more than once."""
    judged_twice: int = 0
    """Pairs of judgements of one comparison."""
    disagreed: int = 0

    def add(self, one_way: int, judgements: int) -> None:
        """Enter one comparison, judged `judgements` times, `one_way` of them in one direction."""
        self.comparisons += 1
        self.judged_twice += judgements * (judgements - 1) // 2
        self.disagreed += one_way * (judgements - one_way)

    @property
    def flip_rate(self) -> float | None:
        """ε, the share of labels that are flipped, if each is flipped independently; None without repetitions.

        Two judgements then disagree with probability d = 2ε(1 - ε), so ε = (1 - √(1 - 2d)) / 2.
        """
        if not self.judged_twice:
            return None
        disagreement = min(0.5, self.disagreed / self.judged_twice)
        return (1 - sqrt(1 - 2 * disagreement)) / 2

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "flip_rate": self.flip_rate}


def length_bias(chosen: Sequence[int], rejected: Sequence[int]) -> LengthBias:
    """Compare the lengths of N pairs."""
    if not chosen:
        return LengthBias()
    longer = sum(a > b for a, b in zip(chosen, rejected, strict=True)) / len(chosen)
    same = sum(a == b for a, b in zip(chosen, rejected, strict=True)) / len(chosen)
    return LengthBias(longer, same, max(longer, 1 - longer - same) + same / 2)


def percentiles(values: Sequence[int]) -> dict[str, int]:
    """Lengths by percentile (nearest rank): `{"5": …, "50": …, "100": …}`."""
    ordered = sorted(values)
    if not ordered:
        return {}
    return {str(rank): ordered[max(0, -(-rank * len(ordered) // 100) - 1)] for rank in PERCENTILES}
