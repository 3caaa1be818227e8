"""What a search came to: the verdict, the chosen candidate, and its numbers on data that nothing was chosen by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from lora_dpo.config.recipe import Recipe
from lora_dpo.data.pairs import evenly_spaced
from lora_dpo.evaluation.intervals import Interval, mean
from lora_dpo.model.decoding import Answer
from lora_dpo.tuning.score import Measured, Score
from lora_dpo.tuning.trials import Trial

Verdict = Literal["better", "nothing to learn", "too little data", "no healthy run"]


@dataclass(frozen=True)
class Reported:
    """A policy on the part that the report comes from."""

    measured: Measured
    score: Score
    answers: tuple[Answer, ...] = ()


@dataclass(frozen=True)
class TuneResult:
    """What a search came to."""

    verdict: Verdict
    reason: str
    """The verdict in one or two sentences."""
    adapter: Path | None
    """The chosen adapter's folder; None where there is nothing to learn."""
    recipe: Recipe
    """The chosen candidate's recipe; the given one where none was chosen."""
    folder: Path
    """The search: its trials and its page."""
    trials: tuple[Trial, ...]
    chosen: Trial | None
    reported: Mapping[str, Reported] = field(default_factory=dict)
    """`base`, `default` and `chosen`, on the part that neither training nor choice saw."""
    gain: Interval | None = None
    """Quality of the chosen one less that of the default recipe, prompt by prompt, on that part."""
    seconds: float = 0.0


def gain_of(reported: Mapping[str, Reported]) -> Interval | None:
    """How much better the chosen one is than the default recipe, prompt by prompt."""
    if not {"default", "chosen"} <= set(reported):
        return None
    ours, theirs = reported["chosen"].measured, reported["default"].measured
    one, other = (ours.outcomes, theirs.outcomes) if ours.outcomes else (ours.right, theirs.right)
    if len(one) != len(other):
        return None
    return mean([a - b for a, b in zip(one, other, strict=True)])


def remarks(result: TuneResult) -> Iterator[str]:
    """What was chosen, and how it compares with the recipe as it was given, in words."""
    gain = result.gain
    if result.chosen is None:
        return
    yield f"Chosen: candidate {result.chosen.number}, {result.chosen.text}."
    if result.chosen.number == 0:
        yield "The recipe as it was given is the best of them: nothing that was tried beats it."
    elif gain is not None and gain.low == gain.high == 0:
        yield f"On all {gain.n} prompts the recipe as it was given does as well in quality."
    elif gain is not None and gain.low > 0:
        yield (
            f"It beats the recipe as it was given by {gain.value:.3f} in quality, 95% interval {gain.low:.3f} to "
            f"{gain.high:.3f}."
        )
    elif gain is not None:
        yield (
            f"Whether it beats the recipe as it was given cannot be told from {gain.n} prompts: by {gain.value:.3f} in "
            f"quality, 95% interval {gain.low:.3f} to {gain.high:.3f}."
        )


def reported_rows(result: TuneResult) -> list[tuple[str, ...]]:
    """The table of base, default and chosen one; the first row names the columns."""
    columns = [measured_lines(one) for one in result.reported.values()]
    names = [name for name, _ in max(columns, key=len)]
    cells = [dict(column) for column in columns]
    return [("", *result.reported), *((name, *(column.get(name, "-") for column in cells)) for name in names)]


def measured_lines(one: Reported) -> list[tuple[str, str]]:
    """Names and values of what was measured of a policy."""
    found = one.measured
    length = fmean(found.tokens) if found.tokens else 0.0
    lines = [
        ("score, at least", f"{one.score.low:.3f}"),
        ("reward accuracy", f"{found.accuracy.value:.3f} ({found.accuracy.low:.3f} to {found.accuracy.high:.3f})"),
    ]
    if found.outcomes:
        quality = one.score.quality
        lines.append(("win rate", f"{quality.value:.3f} ({quality.low:.3f} to {quality.high:.3f})"))
    lines += [
        ("length (chosen)", f"{length:.1f} ({found.chosen_tokens:.1f})"),
        ("end by themselves", f"{fmean(map(float, found.finished)):.0%}" if found.finished else "-"),
        ("known answers", f"{found.known} of {found.questions}" if found.questions else "-"),
        ("KL a token", f"{found.kl:.3f}"),
    ]
    return lines


def side_by_side(result: TuneResult, prompts: Sequence[str], most: int = 8) -> list[tuple[str, str, str]]:
    """Prompts, spread over the part and not picked, with the base's answer and the chosen one's."""
    base, chosen = result.reported["base"].answers, result.reported["chosen"].answers
    return [(prompts[i], base[i].text, chosen[i].text) for i in evenly_spaced(min(len(prompts), len(chosen)), most)]


def result_json(result: TuneResult) -> dict[str, Any]:
    """A search's result as plain values."""
    return {
        "verdict": result.verdict,
        "reason": result.reason,
        "adapter": str(result.adapter) if result.adapter else None,
        "chosen": result.chosen.number if result.chosen else None,
        "recipe": result.recipe.model_dump(mode="json"),
        "reported": {
            name: {
                "measured": one.measured.to_json(),
                "score": {"value": one.score.value, "low": one.score.low, "costs": dict(one.score.costs)},
                "quality": one.score.quality.to_json(),
            }
            for name, one in result.reported.items()
        },
        "gain": result.gain.to_json() if result.gain else None,
        "seconds": round(result.seconds, 1),
    }
