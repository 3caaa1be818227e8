"""Requirements on measured numbers, as a user writes them: `accuracy>0.7`, `win-rate.low>0.5`, `kl<=0.3`."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lora_dpo.config.reading import nearest
from lora_dpo.errors import ConfigError
from lora_dpo.evaluation.intervals import Interval
from lora_dpo.text import shown

SIGNS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
NAMES = (
    "accuracy",
    "accuracy-lc",
    "learned",
    "margin",
    "win-rate",
    "win-rate-lc",
    "kl",
    "length",
    "length-change",
    "finished",
    "repetition",
    "refusals",
    "perplexity-ratio",
)
PARTS = ("value", "low", "high")
NEED = {
    "win-rate": "--judge or --votes",
    "win-rate-lc": "--judge or --votes",
    "perplexity-ratio": "--text",
    "kl": "--kl-answers above 0",
    "learned": "an adapter that carries its log (metrics.jsonl)",
}


@dataclass(frozen=True)
class Requirement:
    """One bound on one number; `part` is the estimate (`value`) or an end of its interval (`low`, `high`)."""

    text: str
    name: str
    part: str
    sign: str
    bound: float

    def met(self, numbers: Mapping[str, Interval]) -> bool:
        """Whether the number is as required; NaN never is."""
        value = float(getattr(numbers[self.name], self.part))
        return not math.isnan(value) and SIGNS[self.sign](value, self.bound)

    def seen(self, numbers: Mapping[str, Interval]) -> str:
        """`accuracy>0.7: 0.612`."""
        return f"{self.text}: {getattr(numbers[self.name], self.part):.4g}"


def parse_requirements(texts: Sequence[str]) -> list[Requirement]:
    """Read requirements. Raises `ConfigError` for one that means nothing."""
    found = []
    for text in texts:
        match = re.fullmatch(r"\s*([A-Za-z_-]+)(?:\.([A-Za-z_-]+))?\s*(>=|<=|>|<)\s*([-+0-9.eE]+)\s*", text)
        if not match:
            raise ConfigError(f"--require {shown(text)} is not written as it must be, such as 'accuracy>0.7'.")
        name, part, sign, bound = match.groups()
        part = part or "value"
        if name not in NAMES:
            meant = nearest(name.lower().replace("_", "-"), NAMES)
            raise ConfigError(
                f"--require {shown(text)}: there is no number {shown(name)}. Known are {', '.join(NAMES)}.{meant}"
            )
        if part not in PARTS:
            meant = nearest(part.lower(), PARTS)
            raise ConfigError(
                f"--require {shown(text)}: {name} has no {shown(part)}. It has {', '.join(PARTS)}.{meant}"
            )
        try:
            found.append(Requirement(text.strip(), name, part, sign, float(bound)))
        except ValueError:
            raise ConfigError(f"--require {shown(text)}: {shown(bound)} is no number.") from None
    return found


def check_measurable(requirements: Sequence[Requirement], measured: Sequence[str]) -> None:
    """Raise `ConfigError` for a requirement on a number that this evaluation will not measure."""
    for one in requirements:
        if one.name not in measured:
            raise ConfigError(
                f"--require {shown(one.text)}: that is measured with {NEED.get(one.name, 'answers')} only."
            )
