"""From a file of pairs to a recipe beside it: what `lora-dpo init DATA` and `lora-dpo train DATA` do."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dpo.config.reading import check_recipe, read_recipe, set_override
from lora_dpo.config.recipe import Recipe
from lora_dpo.data import read_pairs
from lora_dpo.data.rows import file_of, is_readable
from lora_dpo.data.write import hold_out_prompts
from lora_dpo.errors import ConfigError, OutputError
from lora_dpo.files import atomic_file, refuse_existing, refuse_unwritable
from lora_dpo.quiet import quiet_libraries
from lora_dpo.text import counted
from lora_dpo.training.drafting.comments import Facts, explained, head
from lora_dpo.training.drafting.lengths import estimated_lengths, looked_at
from lora_dpo.training.drafting.presets import (
    HOLD_OUT_FROM,
    LEAST_HELD_OUT,
    choices,
    held_out_prompts,
    preset_named,
    prompts_of,
    shorten_warm_up,
)
from lora_dpo.training.drafting.recipe_text import recipe_text
from lora_dpo.training.planning.lines import time_line, verdict
from lora_dpo.training.planning.make_plan import plan

if TYPE_CHECKING:
    from lora_dpo.training.planning.plan_values import Plan

MODEL = "smollm2-135m"
"""The base of a recipe where none is named: it comes from the package index, and trains on a CPU in minutes."""


@dataclass(frozen=True)
class Begun:
    """A recipe that was written, and what is to be said of it."""

    path: Path
    lines: tuple[tuple[str, str], ...]
    """Rows `(label, value)` of what was read and chosen."""
    warnings: tuple[str, ...]


def begin(
    source: str,
    *,
    model: str | None = None,
    preset: str = "balanced",
    path: Path | None = None,
    columns: Mapping[str, str] | None = None,
    overrides: Sequence[str] = (),
) -> Begun:
    """Read pairs and write a recipe for them.

    Args:
        source: a file, a folder or a hub data set.
        model: the base. Its tokenizer and template are asked how long the pairs are, and whether it fits is planned;
            with None it is `MODEL`, and lengths are estimated from the text, so that nothing has to be here.
        path: the recipe's file; default the name of the data with `.yaml`, beside it.
        columns: what its columns are, where they have names of their own (`data.columns`).
        overrides: settings `key=value` that are written into the recipe, too.

    Raises:
        LoraDPOError: the pairs cannot be read, the model is not there, or the file is. Nothing is written then.
    """
    chosen, path = preset_named(preset), path or recipe_path(source)
    _refuse_written(path)
    refuse_unwritable(path)
    asked: dict[str, Any] = {"model": {"name": model or MODEL}, "data": {"train": source, **_columns(columns)}}
    given = tuple(set_override(asked, override) for override in overrides)
    wished = check_recipe(asked, where=f"the recipe for {source}")
    if wished.data.train != source:
        raise ConfigError(f"{source} is what data.train names. Leave data.train= out, or give a recipe.")
    named = wished.model.name if model is not None or wished.model.name != MODEL else None
    pairs, report = read_pairs(source, format=wished.data.format, columns=wished.data.columns)
    prompts = prompts_of(pairs)
    hold_out = held_out_prompts(prompts) if not wished.data.has_held_out else wished.data.hold_out
    train, apart = hold_out_prompts(pairs, hold_out) if hold_out else (pairs, [])
    lengths, parameters = (estimated_lengths(pairs), None) if named is None else looked_at(wished.model, pairs)
    made = choices(chosen, len(train), prompts_of(apart), lengths, parameters=parameters)
    settings = {"model": asked["model"], "data": data_section(source, hold_out=hold_out, columns=columns)}
    settings |= {name: made[name] for name in ("trainer", "lora", "evaluation")}
    facts = Facts(
        source=source,
        path=path,
        model=named or MODEL,
        preset=preset,
        pairs=len(pairs),
        prompts=prompts,
        train=len(train),
        held_out=prompts_of(apart),
        has_held_out=bool(apart) or wished.data.has_held_out,
        lengths=lengths,
        parameters=parameters,
        trainer=dict(made["trainer"]),
        given=given,
    )
    if not apart:
        del settings["evaluation"]  # nothing is asked of prompts of its own
    for override in overrides:
        set_override(settings, override)
    if "trainer.warmup_steps" not in given:
        shorten_warm_up(settings["trainer"])
    planned = None if named is None else plan(_checked(settings, source, given))
    if planned and planned.fix:
        facts = replace(facts, fitted=tuple(set_override(settings, one) for one in planned.fix.overrides))
    _checked(settings, source, given)
    text = recipe_text(settings, head=head(facts), above=explained(facts))
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    read = [("pairs", f"{report.summary()}, read as {report.read_as}"), *(("", line) for line in report.noted())]
    lines = [*read, *_lines(facts, planned)]
    return Begun(path, tuple(lines), tuple(_warnings(facts)))


def begun(source: str) -> Path | None:
    """The recipe that lies beside some data by its name and trains on it; None if there is none.

    Raises:
        ConfigError: what lies there cannot be read as a recipe.
    """
    path = recipe_path(source)
    if not path.is_file():
        return None
    train = read_recipe(path).data.train
    return path if isinstance(train, str) and Path(train).resolve() == Path(source).resolve() else None


def _checked(settings: dict[str, Any], source: str, given: Sequence[str]) -> Recipe:
    """The recipe, its `trainer:` section held against TRL's fields where a person wrote some of them."""
    recipe = check_recipe(settings, where=f"the recipe for {source}")
    if given:
        from lora_dpo.config.trl_dpo import trainer_settings

        with quiet_libraries():
            trainer_settings(recipe)
    return recipe


def recipe_path(source: str) -> Path:
    """Where the recipe for some data goes: beside it, by its name. Of a hub data set: into the current folder."""
    path = file_of(source)
    if path.is_dir():
        inside = path.name in ("", "..")  # the current folder, or one above it
        return path / f"{path.resolve().name}.yaml" if inside else path.with_name(f"{path.name}.yaml")
    if not is_readable(source):
        return Path(f"{source.partition(':')[0].rpartition('/')[2]}.yaml")
    plain = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return plain.with_suffix(".yaml")


def data_section(source: str, *, hold_out: float | None, columns: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The section `data` of a recipe: everything about how its pairs are read."""
    return {"train": source, **_columns(columns), **({"hold_out": hold_out} if hold_out else {})}


def _columns(columns: Mapping[str, str] | None) -> dict[str, Any]:
    return {"columns": dict(columns)} if columns else {}


def _refuse_written(path: Path) -> None:
    try:
        refuse_existing(path)
    except OutputError:
        if not path.is_file():
            raise
        raise OutputError(
            f"{path} is there already and is never overwritten: lora-dpo train {shlex.quote(str(path))} runs it. For "
            "another recipe: lora-dpo init DATA --output NAME.yaml."
        ) from None


def _lines(facts: Facts, planned: Plan | None) -> Iterator[tuple[str, str]]:
    """What was chosen, and why."""
    if facts.held_out:
        apart = f"{facts.held_out} of {facts.prompts} different prompts, {counted(facts.pairs - facts.train, 'pair')}"
        yield "held out", f"{apart}: never trained on, it is measured on them"
    elif not facts.has_held_out:
        yield "held out", "nothing"
    if not {"trainer.max_steps", "trainer.num_train_epochs", "trainer.per_device_train_batch_size"} & set(facts.given):
        yield "training", f"{facts.run_line}, preset {facts.preset}"
    yield "lengths", facts.length_line
    if planned is not None:
        fix = f" {' '.join(planned.fix.overrides)} (written into the recipe)" if planned.fix else ""
        yield "memory", verdict(planned) + fix
        yield "time", time_line(planned)
    yield "recipe", str(facts.path)


def _warnings(facts: Facts) -> Iterator[str]:
    """What cannot be measured with so few prompts, and what is cut."""
    if not facts.has_held_out:
        yield (
            f"Of {counted(facts.prompts, 'different prompt')} none is held out ({HOLD_OUT_FROM} are the fewest), so "
            "the run cannot measure whether the adapter is better than its base: look at answers side by side "
            "(lora-dpo chat ADAPTER --compare), or vote blind (lora-dpo demo)."
        )
    elif 0 < facts.held_out < LEAST_HELD_OUT:
        yield (
            f"{facts.held_out} held-out prompts measure coarsely: each is {100 / facts.held_out:.0f} points of "
            f"accuracy. From {LEAST_HELD_OUT * 4} different prompts on, {LEAST_HELD_OUT} are held out."
        )
    longest = facts.trainer["max_length"]
    if facts.lengths.longest > longest:
        yield (
            f"Pairs of more than {longest:,} tokens are cut at the end of their answers: lora-dpo plan {facts.path} "
            "counts them."
        )
