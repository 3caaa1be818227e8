"""What the rounds of `lora-dpo improve` are measured by, and how that is shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from lora_dpo.model.decoding import Answer


@dataclass(frozen=True)
class Measurement:
    """Greedy answers of one round to the held-out prompts, and their scores."""

    round: int
    answers: tuple[Answer, ...]
    scores: tuple[float | None, ...]
    pairs: int = 0
    """Training pairs of the round; 0 for the start."""

    @property
    def score(self) -> float:
        """Mean over the held-out prompts that were scored."""
        known = [score for score in self.scores if score is not None]
        return fmean(known) if known else float("nan")

    def gain_over(self, other: Measurement) -> tuple[float, float]:
        """Mean difference of the scores, prompt by prompt, and its standard error."""
        both = zip(self.scores, other.scores, strict=True)
        gains = [new - old for new, old in both if new is not None and old is not None]
        if len(gains) < 2:
            return 0.0, 0.0
        return fmean(gains), stdev(gains) / sqrt(len(gains))


def score_table(measured: Sequence[Measurement]) -> Iterator[tuple[str, ...]]:
    """Rows of the table that is shown: its heading, then the start and each round."""
    yield "round", "mean score", "gain over the start", "answer tokens", "end by themselves", "pairs"
    for found in measured:
        gain, error = found.gain_over(measured[0])
        yield (
            str(found.round) if found.round else "start",
            f"{found.score:.3f}",
            f"{gain:+z.3f} ± {error:.3f}" if found.round else "",
            f"{fmean(answer.said_tokens for answer in found.answers):.1f}",
            f"{fmean(answer.finished for answer in found.answers):.0%}",
            str(found.pairs) if found.round else "",
        )
