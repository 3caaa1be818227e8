"""Three parts of the data, by prompt: to train on, to choose by, to report from.

The best of many candidates looks better on what it was chosen by than it is. So what is reported comes from prompts
that neither a candidate nor the choice saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from lora_dpo.data import PreferencePair
from lora_dpo.data.doctor.checks import prompt_text
from lora_dpo.data.write import split_by_prompt
from lora_dpo.training.drafting.presets import prompts_of

SHARE = 0.15
"""Of the prompts, for each of the parts that are not trained on; for both, where one of them comes from elsewhere."""
LEAST, MOST = 12, 64
"""Prompts of such a part. With fewer than 12, four right of five is no more than chance (a Wilson interval that holds
one half); more than 64 cost time and tell little more."""
FOR_THREE, FOR_TWO = 48, 24
"""Different prompts from which on there are three parts, and two: half of them are left to train on."""


@dataclass(frozen=True)
class Parts:
    """Pairs of each part; no prompt is in two of them. Without `report` the numbers are those of `choose`."""

    train: tuple[PreferencePair, ...]
    choose: tuple[PreferencePair, ...] = ()
    report: tuple[PreferencePair, ...] = ()

    @property
    def flatters(self) -> bool:
        """Whether what is reported was also chosen by."""
        return bool(self.choose) and not self.report


def divide(pairs: Sequence[PreferencePair], held_out: Sequence[PreferencePair] = (), *, seed: int = 0) -> Parts:
    """Divide pairs by their prompts; the same pairs and seed give the same parts.

    Args:
        held_out: pairs that were never to be trained on; what is reported comes from them, and twice as many prompts
            are chosen by. Training pairs with a prompt that is among theirs are left out.

    Returns:
        Three parts; two of fewer than 48 different prompts; of fewer than 24 one to train on alone.
    """
    apart = {prompt_text(pair.prompt) for pair in held_out}
    left = [pair for pair in pairs if prompt_text(pair.prompt) not in apart]
    prompts = prompts_of(left)
    report = list(held_out)
    if not report and prompts >= FOR_THREE:
        left, report = split_by_prompt(left, _size(prompts), seed=seed)
    if prompts < FOR_TWO:
        return Parts(tuple(left), (), tuple(report))
    share = 2 * SHARE if held_out else SHARE
    train, choose = split_by_prompt(left, _size(prompts, share), seed=seed + 1)
    return Parts(tuple(train), tuple(choose), tuple(report))


def _size(prompts: int, share: float = SHARE) -> int:
    return min(MOST, max(LEAST, ceil(share * prompts - 1e-9)))
