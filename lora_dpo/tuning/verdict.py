"""Whether a search found something to learn: by what was chosen by, and again by what was not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lora_dpo.data.doctor.checks import Texts, thought_length
from lora_dpo.data.doctor.statistics import LengthBias, length_bias
from lora_dpo.data.pairs import PreferencePair, evenly_spaced
from lora_dpo.tuning.result import Reported, Verdict
from lora_dpo.tuning.score import Measured

ONLY_LENGTH = 0.95
"""Share of pairs from which on the length of the answers tells as much as the labels do."""
LOOKED_AT = 2000
"""Pairs whose lengths are compared: that many tell a share to a hundredth."""


def verdict_of(
    seen: Measured,
    fresh: Reported,
    *,
    flatters: bool,
    bias: LengthBias,
    chosen_recipe: str,
    likely_reason: Callable[[], str],
) -> tuple[Verdict, str]:
    """The verdict on the chosen candidate, and why.

    Args:
        seen: what it was chosen by.
        fresh: the same candidate on the part that is reported from.
        flatters: whether that is the part that it was chosen by.
        bias: how far length alone predicts the labels (`lengths_of`).
        chosen_recipe: where the chosen recipe lies, for one who wants it all the same.
        likely_reason: why labels may say nothing; asked where they do.

    Returns:
        `better`, or `nothing to learn` where held-out pairs are ranked no better than chance, where a judge does not
        prefer the answers to the base's, and, without a judge, where the labels say no more than that the longer answer
        is the better one.
    """
    accuracy, quality = fresh.measured.accuracy, fresh.score.quality
    where = "the pairs it was chosen by" if flatters else "pairs that nothing was chosen by"
    told = f"{accuracy.value:.0%} of {where} are ranked right (95% interval {accuracy.low:.0%} to {accuracy.high:.0%})"
    if accuracy.low <= 0.5:
        return "nothing to learn", f"Nothing to learn here: {told}, no better than chance. {likely_reason()}"
    if seen.accuracy.low <= 0.5:
        chance = "and of those it was chosen by no more than chance"
        return "nothing to learn", f"Nothing to learn here: {told}, {chance}. {likely_reason()}"
    if seen.outcomes:
        if quality.low > 0.5:
            return "better", f"{told}."
        return (
            "nothing to learn",
            f"The labels are learnt ({told}), but the judge does not prefer the answers to the base's: "
            f"{quality.value:.0%} won, 95% interval {quality.low:.0%} to {quality.high:.0%}.",
        )
    if bias.predicts < ONLY_LENGTH:
        return "better", f"{told}."
    rule = bias.sentence("characters")
    if bias.longer_wins:
        return (
            "nothing to learn",
            f"Nothing to learn here but length: {rule}. {told}, but a count of letters ranks as many. Add pairs whose "
            "shorter answer is chosen, or say with --judge what is wanted beside length. If longer answers are what "
            f"you want: lora-dpo train {chosen_recipe}.",
        )
    return "better", f"{told}. The labels say no more than a length: {rule}. Whether more was learnt, no pair can tell."


def lengths_of(pairs: Sequence[PreferencePair]) -> LengthBias:
    """How far length alone, in characters without thoughts, predicts which answer is chosen; of many pairs some."""
    some = [pairs[place] for place in evenly_spaced(len(pairs), LOOKED_AT)]
    texts = [Texts.of(pair) for pair in some]
    chosen = [len(text.chosen) - thought_length(pair.chosen) for text, pair in zip(texts, some, strict=True)]
    rejected = [len(text.rejected) - thought_length(pair.rejected) for text, pair in zip(texts, some, strict=True)]
    return length_bias(chosen, rejected)
