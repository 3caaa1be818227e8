"""What a search varies: its axes with their ranges and reasons, and a recipe with other values put in.

An axis is a setting of the recipe by its dotted name. One is not: `sft_weight`, the weight of the SFT term on the
chosen answers beside DPO's own loss, which in a recipe is an entry of a list.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_dpo.adapters.stored_run import BETA
from lora_dpo.config.reading import check_recipe, nearest, set_override
from lora_dpo.config.recipe import Recipe
from lora_dpo.config.trl_dpo import trainer_settings
from lora_dpo.errors import ConfigError
from lora_dpo.text import shown
from lora_dpo.training.drafting.presets import shorten_warm_up

SFT = "sft_weight"
LOSS, STEPS, RANK, ALPHA = "trainer.loss_type", "trainer.max_steps", "lora.rank", "lora.alpha"
UNIMPORTANT = ("output", "data.", "model.", "evaluation.", "engine.", "health.", "reference", "method")
"""What cannot be an axis: another data set, model or measure would be another question, not another answer."""

Value = int | float | str | bool
Values = Mapping[str, Any]
"""A candidate: one value an axis."""


@dataclass(frozen=True)
class Axis:
    """One setting that is varied: over a range, or over some choices."""

    key: str
    reason: str
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    """Whole numbers alone."""
    choices: tuple[Any, ...] = ()

    @property
    def log(self) -> bool:
        """Whether its values are drawn evenly on a logarithmic scale: all ranges but those that begin at 0."""
        return not self.choices and self.low > 0

    @property
    def text(self) -> str:
        """`0.03..0.5` or `4, 16`, as it can be written on the command line."""
        if self.choices:
            return ", ".join(map(str, self.choices))
        return f"{self.low:g}..{self.high:g}"

    def holds(self, value: Any) -> bool:
        """Whether a value lies on it."""
        if self.choices:
            return value in self.choices
        return isinstance(value, int | float) and self.low <= value <= self.high


ALSO_SETS = {
    SFT: ("trainer.loss_type", "trainer.loss_weights"),
    LOSS: ("trainer.loss_weights",),
    STEPS: ("trainer.num_train_epochs",),
    RANK: ("lora.alpha",),
}
"""Of an axis, the other settings that say the same."""


LESS_RATE, MORE_RATE = 1.5, 2.5
"""The recipe's learning rate is divided and multiplied by at most this: candidates below it mostly learnt too little in
their time, and those far above it ranked pairs of other kinds worse, which a part of the same data does not show."""


def default_axes(recipe: Recipe, *, steps: int, fixed: Collection[str] = ()) -> list[Axis]:
    """The axes that are searched where none is named, around the recipe's own values.

    Args:
        steps: optimiser steps of the recipe's own run.
        fixed: settings that a user set for all candidates: they are not varied.

    Raises:
        ConfigError: none is left.
    """
    settings = trainer_settings(recipe)
    beta, rate = float(settings.get("beta", BETA)), float(settings["learning_rate"])
    weight = sft_weight(settings)
    axes = [
        Axis(
            "trainer.beta",
            "how hard the policy is held to its reference: with less it drifts, with more it hardly learns",
            min(0.03, beta),
            max(0.5, beta),
        ),
        Axis(
            "trainer.learning_rate",
            "the setting that ruins most runs: too low learns nothing, too high breaks the answers",
            rate / LESS_RATE,
            rate * MORE_RATE,
        ),
        Axis(
            SFT,
            "the SFT term keeps the chosen answers likely, where DPO alone may lower both; with more they are imitated",
            weight / 4 if weight else 0.0,
            max(weight, min(2 * weight, 1.0)) if weight else 1.0,
        ),
        Axis(STEPS, "how long it trains: fewer stay nearer to the base", max(1, steps * 3 // 4), 2 * steps, whole=True),
    ]
    if _listed(settings["loss_type"])[0] in ("sigmoid", "apo_zero"):
        axes.append(
            Axis(
                LOSS,
                "sigmoid looks at the difference of both answers alone, apo_zero at each answer's own direction",
                choices=("sigmoid", "apo_zero"),
            )
        )
    if recipe.reference_adapter is None:
        rank = recipe.lora.rank
        axes.append(Axis(RANK, "how much the adapter can hold; alpha / rank stays as it is", choices=(rank, 4 * rank)))
    left = [axis for axis in axes if not {axis.key, *ALSO_SETS.get(axis.key, ())} & set(fixed)]
    if not left:
        raise ConfigError("Every setting that is varied has one value: there is nothing to choose. Leave one out.")
    return left


def split_arguments(texts: Sequence[str]) -> tuple[list[Axis], list[str], dict[str, Any]]:
    """What a command line varies, and what it sets for all candidates: `trainer.max_steps=60` has one value.

    Returns:
        The axes; settings as a recipe has them; and values for `with_values` that are no settings by that name.

    Raises:
        ConfigError: as `parse_axis`, or an axis that is named twice.
    """
    varied = [text for text in texts if ".." in text or len(_split(text.partition("=")[2])) > 1]
    axes = [parse_axis(text) for text in varied]
    keys = [axis.key for axis in axes]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"{key} is named twice. Write all of its values in one, such as {key}=A,B,C.")
    single = [text for text in texts if text not in varied]
    ours = [text for text in single if text.partition("=")[0].strip() == SFT]
    if keys.count(SFT) + len(ours) > 1:
        raise ConfigError(f"{SFT} is named twice. Leave one out.")
    fixed = {SFT: _typed(SFT, ours[0].partition("=")[2].strip())} if ours else {}
    return axes, [text for text in single if text not in ours], fixed


def parse_axis(text: str) -> Axis:
    """`trainer.beta=0.03..0.5` is a range, `lora.rank=4,16` are choices.

    A range between two whole numbers has whole numbers alone; one that begins above 0 is drawn on a logarithmic scale.

    Raises:
        ConfigError: it is neither, no setting of a recipe, or one that cannot be compared.
    """
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not key or not value:
        raise ConfigError(f"{shown(text)} is no axis. Write trainer.beta=0.03..0.5, or lora.rank=4,16.")
    _check_key(key)
    number = r"([-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)"
    if found := re.fullmatch(rf"{number}\.\.{number}", value):
        low, high = map(float, found.groups())
        if not low < high:
            raise ConfigError(f"{shown(text)}: the range ends before it begins. Write the smaller number first.")
        whole = all(re.fullmatch(r"[-+]?\d+", part) for part in found.groups())
        return Axis(key, "as given", low, high, whole)
    choices = tuple(_typed(key, part) for part in _split(value))
    if len(set(map(repr, choices))) < len(choices):
        raise ConfigError(f"{shown(text)} names a value twice. Leave one out.")
    return Axis(key, "as given", choices=choices)


def _split(text: str) -> list[str]:
    """The parts between commas that are in no brackets: `[q_proj],[q_proj, v_proj]` are two."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _typed(key: str, text: str) -> Any:
    if key == SFT:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            raise ConfigError(f"{SFT}={shown(text)}: write a number, 0 or more. 0 leaves the SFT term out.")
        return value
    settings: dict[str, Any] = {}
    set_override(settings, f"{key}={text}")
    found: Any = settings
    for part in key.split("."):
        found = found[part]
    return found


def _check_key(key: str) -> None:
    """Raise `ConfigError` for what is no setting, or none that a search can vary."""
    if key == SFT:
        return
    if any(key == name.rstrip(".") or (name.endswith(".") and key.startswith(name)) for name in UNIMPORTANT):
        raise ConfigError(
            f"{key} cannot be varied: candidates are compared on one model and one data set, by one measure. Vary "
            "settings of trainer. and lora."
        )
    if not re.fullmatch(r"(trainer|lora)\.\w+", key):
        meant = nearest(key, (SFT, LOSS, STEPS, RANK, "trainer.beta", "trainer.learning_rate"))
        raise ConfigError(f"There is no setting {shown(key)} that can be varied: trainer.… , lora.… or {SFT}.{meant}")


def sft_weight(settings: Mapping[str, Any]) -> float:
    """The weight of the SFT term in resolved trainer settings; 0 without one."""
    losses = _listed(settings["loss_type"])
    return float(_weights(settings)[losses.index("sft")]) if "sft" in losses else 0.0


def own_values(recipe: Recipe, axes: Sequence[Axis], *, steps: int) -> dict[str, Any]:
    """What a recipe itself has on each axis: the candidate that every search begins with; nothing of what it leaves
    to TRL."""
    settings = trainer_settings(recipe)
    found: dict[str, Any] = {}
    for axis in axes:
        section, _, name = axis.key.partition(".")
        if axis.key == SFT:
            found[SFT] = sft_weight(settings)
        elif axis.key == STEPS:
            found[STEPS] = steps
        elif axis.key == LOSS:
            found[LOSS] = _listed(settings["loss_type"])[0]
        elif section == "lora":
            found[axis.key] = getattr(recipe.lora, name, None)
        else:
            found[axis.key] = settings.get(name, BETA if name == "beta" else None)
    return {key: value for key, value in found.items() if value is not None}  # TRL's own default is not known here


def with_values(recipe: Recipe, values: Values) -> Recipe:
    """The recipe with a candidate's values in it.

    A rank takes alpha with it, so that alpha / rank stays, and steps the warm-up, if these are no axes themselves.

    Raises:
        ConfigError: a value that the recipe does not allow.
    """
    if not values:
        return recipe
    settings = recipe.model_dump(mode="json", exclude_unset=True)
    trainer = settings.setdefault("trainer", {})
    resolved = trainer_settings(recipe)
    losses = _listed(resolved["loss_type"])
    for key, value in values.items():
        if key == RANK and ALPHA not in values:
            lora = settings.setdefault("lora", {})
            lora["rank"], lora["alpha"] = value, recipe.lora.alpha * value / recipe.lora.rank
        elif key not in (SFT, LOSS):
            section, _, name = key.partition(".")
            settings.setdefault(section, {})[name] = value
    if LOSS in values or SFT in values:
        before = dict(zip(losses, _weights(resolved), strict=True))
        weight = float(values.get(SFT, before.get("sft", 0.0)))
        kept = {name: before[name] for name in losses if name != "sft"}
        if isinstance(first := values.get(LOSS), str):  # in the place of the first, which has its weight
            was = next(iter(kept))
            kept = {first if name == was else name: share for name, share in kept.items()}
        trainer["loss_type"] = [*kept, *(["sft"] if weight else [])]
        trainer["loss_weights"] = [*kept.values(), *([weight] if weight else [])]
    if STEPS in values:
        shorten_warm_up(trainer)
    return check_recipe(settings, where="a candidate of the search")


def _listed(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


def _weights(settings: Mapping[str, Any]) -> list[float]:
    return list(settings.get("loss_weights") or [1.0] * len(_listed(settings["loss_type"])))


def value_text(value: Any) -> str:
    """A value as a person would write it: three digits are enough to tell candidates apart."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
