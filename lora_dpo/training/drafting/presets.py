"""From a choice of pairs and one word to a whole recipe: what the Train page and `lora-dpo init` start from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf
from pathlib import Path
from typing import Any

from lora_dpo.config.reading import check_recipe, dump_settings, nearest, parse_settings
from lora_dpo.config.recipe import ModelSection, Recipe
from lora_dpo.data import PreferencePair, read_pairs
from lora_dpo.data.doctor.checks import Texts, prompt_text
from lora_dpo.data.write import split_by_prompt, write_pairs
from lora_dpo.errors import ConfigError
from lora_dpo.text import SHOWN, one_line, shown
from lora_dpo.training.drafting.lengths import Lengths, looked_at

BATCH = 4
HOLD_OUT_FROM = 12
"""Different prompts from which on some are held out; of fewer, each is needed for training."""
HELD_OUT = 0.15
LEAST_HELD_OUT = 12
"""Of fewer prompts one is more than eight points of accuracy; but no more than a quarter of them is held out."""
MOST_HELD_OUT = 64
MAX_LENGTHS = (512, 1024, 2048, 4096)
"""What `max_length` may become: the first that holds all pairs. Where none is so long, a larger one costs nothing."""
ANSWER_LENGTHS = (96, 160, 256, 512)
"""The same for the answers before and after."""
MOST_ANSWERS = 16
"""Held-out prompts that are answered before and after: each costs two answers."""
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
class Size:
    """What is different for bases of some size. That of `configs/8gb-3b.yaml` and `24gb-8b.yaml`: not measured."""

    below: float
    """Parameters."""
    rank: int
    rate: float
    """The preset's learning rate is multiplied by this: the same rate moves a larger base more."""
    sft: float
    """The preset's weight of the SFT term is multiplied by this: a larger base does not collapse so soon."""


SIZES = (Size(1e9, 4, 1.0, 1.0), Size(5e9, 16, 0.2, 0.1), Size(inf, 16, 0.1, 0.1))
"""The presets themselves are for the first: they were measured with 135 million parameters."""


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
    seed: int = 0,
) -> Draft:
    """Read the pairs, hold some prompts out if there are enough, and write the recipe of a preset for this base.

    Args:
        model: the base in memory, as a recipe names it.
        output: the adapter folder that the run will make.
        folder: where the split is written; the same pairs give the same files.
        prompts: how many held-out answers are shown before and after.

    Raises:
        ConfigError: there is no such preset, or nothing to train on.
        DataError: a file cannot be read.
        ModelError: the base is not there, or its template refuses a row.
    """
    chosen = preset_named(preset)
    if not sources:
        raise ConfigError("There is nothing to train on: choose some pairs.")
    pairs, _ = read_pairs([str(source) for source in sources])
    train, held_out = hold_out(pairs, seed=seed)
    texts = [vars(Texts.of(pair)) for pair in pairs]
    digest = hashlib.sha256(json.dumps([len(held_out), seed, texts]).encode()).hexdigest()[:10]
    files = {name: folder / f"{digest}.{name}.jsonl" for name in ("train", "eval")}
    for name, part in (("train", train), ("eval", held_out)):
        if part and not files[name].exists():
            write_pairs(part, files[name])
    lengths, parameters = looked_at(model, pairs)
    settings: dict[str, Any] = {
        "model": model.model_dump(mode="json"),
        "data": {"train": str(files["train"]), **({"eval": str(files["eval"])} if held_out else {})},
        "output": str(output),
        **choices(chosen, len(train), prompts_of(held_out), lengths, parameters=parameters),
    }
    settings["evaluation"] |= {"show": prompts} if held_out else {}
    return Draft(check_recipe(settings, where="the preset"), len(train), len(held_out))


def preset_named(name: str) -> Preset:
    """A preset by its name. Raises `ConfigError` if there is none of that name."""
    if name not in PRESETS:
        raise ConfigError(f"{shown(name)} is no preset: there is {', '.join(PRESETS)}.{nearest(name, PRESETS)}")
    return PRESETS[name]


def choices(
    preset: Preset, train: int, held_out: int, lengths: Lengths, *, parameters: int | None = None
) -> dict[str, Any]:
    """The sections `lora`, `evaluation` and `trainer` of a recipe: how a preset trains on these pairs.

    Args:
        train: pairs to train on.
        held_out: different prompts that are not trained on.
        parameters: of the base; None if that is not known: a small one.
    """
    size = next(size for size in SIZES if (parameters or 0) < size.below)
    steps = steps_of(preset, train)
    fits = next((length for length in MAX_LENGTHS if length >= lengths.longest), MAX_LENGTHS[-1])
    evaluation: dict[str, Any] = {"max_new_tokens": next((n for n in ANSWER_LENGTHS if n >= lengths.answer), 512)}
    if held_out:
        evaluation = {"answers": min(MOST_ANSWERS, held_out), **evaluation}
    return {
        "lora": {"rank": size.rank, "alpha": 32},
        "evaluation": evaluation,
        "trainer": {
            "max_steps": steps,
            # A tenth of the steps, rounded up, is a third of three: a run that short has none to give away.
            "warmup_steps": steps // 10,
            "per_device_train_batch_size": BATCH,
            "learning_rate": round(preset.learning_rate * size.rate, 12),
            "beta": 0.1,
            "loss_type": ["sigmoid", "sft"],
            "loss_weights": [1.0, round(preset.sft * size.sft, 12)],
            "max_length": min(fits, lengths.limit or fits),
        },
    }


def steps_of(preset: Preset, pairs: int) -> int:
    """Optimiser steps: the preset's passes over the pairs, and no more than its limit."""
    return max(1, min(preset.most_steps, ceil(preset.passes * pairs / BATCH)))


def shorten_warm_up(trainer: dict[str, Any]) -> None:
    """Keep the warm-up of a `trainer` section within a tenth of its steps, after these were made fewer."""
    steps = trainer.get("max_steps")
    if isinstance(steps, int) and "warmup_steps" in trainer:
        trainer["warmup_steps"] = min(trainer["warmup_steps"], max(0, steps) // 10)


def hold_out(pairs: Sequence[PreferencePair], *, seed: int = 0) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Train and held-out pairs, no prompt in both; nothing is held out of few prompts."""
    held_out = held_out_prompts(prompts_of(pairs))
    return split_by_prompt(pairs, held_out, seed=seed) if held_out else (list(pairs), [])


def held_out_prompts(prompts: int) -> int:
    """How many of so many different prompts are held out; none of few."""
    if prompts < HOLD_OUT_FROM:
        return 0
    return min(MOST_HELD_OUT, max(ceil(HELD_OUT * prompts - 1e-9), min(LEAST_HELD_OUT, prompts // 4)))


def prompts_of(pairs: Sequence[PreferencePair]) -> int:
    """How many different prompts pairs have; case, white space and system turns make no difference."""
    return len({prompt_text(pair.prompt) for pair in pairs})


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
    trainer = settings["trainer"]
    if trainer.get("warmup_steps") == recipe.trainer.get("warmup_steps"):
        shorten_warm_up(trainer)
    return check_recipe(settings, where=where)
