"""From a choice of pairs and one word to a whole recipe: what the Train page starts from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from lora_dpo.config.reading import check_recipe, dump_settings, nearest, parse_settings
from lora_dpo.config.recipe import ModelSection, Recipe
from lora_dpo.data import PreferencePair, read_pairs
from lora_dpo.data.doctor.checks import Texts
from lora_dpo.data.write import split_by_prompt, write_pairs
from lora_dpo.errors import ConfigError
from lora_dpo.text import SHOWN, one_line, shown

BATCH = 4
HOLD_OUT_FROM = 12
"""Different prompts from which on some are held out; of fewer, each is needed for training."""
HELD_OUT = 0.15
MOST_HELD_OUT = 64
CHANGEABLE: dict[str, tuple[str, ...]] = {
    "lora": (),
    "evaluation": ("answers", "show", "max_new_tokens"),
    "trainer": (
        "beta",
        "f_divergence_type",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "label_smoothing",
        "ld_alpha",
        "learning_rate",
        "loss_type",
        "loss_weights",
        "lr_scheduler_type",
        "max_grad_norm",
        "max_length",
        "max_steps",
        "num_train_epochs",
        "per_device_train_batch_size",
        "seed",
        "warmup_steps",
        "weight_decay",
    ),
}
"""Sections that the page may change, and which of their settings; an empty list is all of them."""


@dataclass(frozen=True)
class Preset:
    """How long and how hard to train. Passes are over all pairs, within the limits of steps."""

    label: str
    passes: float
    most_steps: int
    learning_rate: float
    sft: float
    """Weight of the SFT term on the chosen answers, which keeps a run from collapsing."""


PRESETS = {
    # The middle one has the objective that the quickstart's figures were measured with; the others are not measured.
    "quick": Preset("quick: a first look", 2, 12, 1e-4, 2.0),
    "balanced": Preset("balanced: the quickstart's settings", 4, 36, 1e-4, 2.0),
    "thorough": Preset("thorough: three times as long, half as hard", 8, 120, 5e-5, 1.0),
}


@dataclass(frozen=True)
class Draft:
    """A recipe that is ready to plan, and what went into it."""

    recipe: Recipe
    pairs: int
    held_out: int


def draft(
    model: ModelSection,
    sources: Sequence[Path],
    preset: str,
    *,
    output: Path,
    folder: Path,
    prompts: int = 3,
    seed: int = 42,
) -> Draft:
    """Read the pairs, hold some prompts out if there are enough, and write the recipe of a preset.

    Args:
        model: the base in memory, as a recipe names it.
        output: the adapter folder that the run will make.
        folder: where the split is written; the same pairs give the same files.
        prompts: how many held-out answers are shown before and after.

    Raises:
        ConfigError: there is no such preset, or nothing to train on.
        DataError: a file cannot be read.
    """
    if preset not in PRESETS:
        raise ConfigError(f"{shown(preset)} is no preset: there is {', '.join(PRESETS)}.")
    if not sources:
        raise ConfigError("There is nothing to train on: choose some pairs.")
    chosen = PRESETS[preset]
    pairs, _ = read_pairs([str(source) for source in sources])
    train, held_out = hold_out(pairs, seed=seed)
    digest = hashlib.sha256(json.dumps([vars(Texts.of(pair)) for pair in pairs]).encode()).hexdigest()[:10]
    files = {name: folder / f"{digest}.{name}.jsonl" for name in ("train", "eval")}
    for name, part in (("train", train), ("eval", held_out)):
        if part and not files[name].exists():
            write_pairs(part, files[name])
    data: dict[str, Any] = {"train": str(files["train"])}
    evaluation: dict[str, Any] = {"max_new_tokens": 96}
    if held_out:
        data["eval"] = str(files["eval"])
        evaluation |= {"answers": min(16, len(held_out)), "show": prompts}
    steps = steps_of(chosen, len(train))
    settings = {
        "model": model.model_dump(mode="json"),
        "lora": {"rank": 4, "alpha": 32},
        "data": data,
        "evaluation": evaluation,
        "output": str(output),
        "trainer": {
            "max_steps": steps,
            # A tenth of the steps, rounded up, is a third of three: a run that short has none to give away.
            "warmup_steps": steps // 10,
            "per_device_train_batch_size": BATCH,
            "learning_rate": chosen.learning_rate,
            "loss_type": ["sigmoid", "sft"],
            "loss_weights": [1.0, chosen.sft],
            "beta": 0.1,
            "max_length": 512,
        },
    }
    return Draft(check_recipe(settings, where="the preset"), len(train), len(held_out))


def steps_of(preset: Preset, pairs: int) -> int:
    """Optimiser steps: the preset's passes over the pairs, and no more than its limit."""
    return max(1, min(preset.most_steps, ceil(preset.passes * pairs / BATCH)))


def hold_out(pairs: Sequence[PreferencePair], *, seed: int) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Train and held-out pairs, no prompt in both; nothing is held out of few prompts."""
    prompts = len({Texts.of(pair).prompt for pair in pairs})
    if prompts < HOLD_OUT_FROM:
        return list(pairs), []
    return split_by_prompt(pairs, min(HELD_OUT, MOST_HELD_OUT / prompts), seed=seed)


def settings_text(recipe: Recipe) -> str:
    """The sections of a recipe that may be changed on the page, as YAML."""
    return dump_settings(recipe, hidden=set(Recipe.model_fields) - set(CHANGEABLE))


def with_settings(recipe: Recipe, text: str) -> Recipe:
    """A recipe with sections changed as a text of YAML says.

    Only what a run computes can be changed: model, data, output and everything else that names a file stay. A warm-up
    that is left as it was stays at most a tenth of the steps when these are made fewer.

    Raises:
        ConfigError: broken YAML, an unknown setting, or one that is for recipe files alone.
    """
    where = "the settings"
    given = parse_settings(text, where=where)
    settings = recipe.model_dump(mode="json")
    for section, values in given.items():
        if section not in CHANGEABLE:
            raise ConfigError(
                f"{one_line(str(section), SHOWN)} cannot be changed here, only {', '.join(CHANGEABLE)}. Use a recipe "
                "file."
            )
        if not isinstance(values, dict):
            raise ConfigError(f"{section} is {shown(values)}: it has settings inside.")
        known = CHANGEABLE[section]
        for key, value in values.items():
            if known and key not in known and value != settings[section].get(key):
                raise ConfigError(
                    f"{section}.{one_line(str(key), SHOWN)} cannot be changed here, only {', '.join(known)}. Use a "
                    "recipe file for the rest."
                    f"{nearest(str(key), known)}"
                )
        settings[section] = {**settings[section], **values}
    trainer, before = settings["trainer"], recipe.trainer
    if isinstance(trainer.get("max_steps"), int) and trainer.get("warmup_steps") == before.get("warmup_steps"):
        trainer["warmup_steps"] = min(before.get("warmup_steps", 0), max(0, trainer["max_steps"]) // 10)
    return check_recipe(settings, where=where)
