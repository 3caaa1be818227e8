"""The model that a run trains: the base in memory, and an adapter on it, fresh or another's to go on from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_dpo.adapters.folder import attach_adapter
from lora_dpo.errors import ConfigError
from lora_dpo.events import Note
from lora_dpo.model.base import Base, held_by, load_recipe_base, resolve_model
from lora_dpo.model.eva import drawn_batch, init_from_inputs
from lora_dpo.model.identity import commit_of
from lora_dpo.model.lora import attach_lora, detach
from lora_dpo.model.whole_parts import copies_of
from lora_dpo.training.prepared import Run

if TYPE_CHECKING:
    from peft import PeftModel


def load(run: Run) -> Base:
    """Load the base that the recipe names."""
    tick = run.progress("loading the model", 1)
    base = load_recipe_base(run.recipe.model, method=run.recipe.method)
    tick(1)
    if base.streamed != "off":
        run.emit(Note(streamed_text(base)))
    return base


def streamed_text(base: Base) -> str:
    """That weights of a base visit the device, and what for."""
    what = "Embeddings and head" if base.streamed == "embeddings" else "Embeddings, head and decoder layers"
    why = "which costs time and no more on a CPU" if base.device.type == "cpu" else "and visit the GPU (model.stream)"
    return f"{what} of the base live in main memory, {why}."


@contextlib.contextmanager
def attached(run: Run, base: Base, *, fresh: bool) -> Iterator[PeftModel]:
    """The run's adapter on its base, as `attach` puts it there; taken off again if the block ends in an error: the base
    may be somebody else's, who has more to do with it."""
    model = attach(run, base, fresh=fresh)
    try:
        yield model
    except BaseException:
        base.model = detach(model)
        raise


def attach(run: Run, base: Base, *, fresh: bool) -> PeftModel:
    """Put the run's adapter on its base.

    Args:
        fresh: whether the adapter begins here; a run that goes on has its weights in a checkpoint.

    Raises:
        ConfigError: the base is not the one that the recipe names, or the recipe's adapter does not fit it.
    """
    recipe = run.recipe
    if base.name != recipe.model.name:
        raise ConfigError(f"The base handed in is {base.name}, but the recipe names {recipe.model.name}.")
    revision = commit_of(resolve_model(recipe.model.name), recipe.model.revision)
    held, _ = held_by(recipe.model)
    if (base.quantize, base.revision) != (held, revision):
        raise ConfigError(
            f"The base handed in is quantised {base.quantize}, revision {base.revision}; the recipe says "
            f"{held}, {revision}. Load it as the recipe says."
        )
    stream = recipe.model.stream
    if stream in ("embeddings", "on") and base.streamed != stream:
        raise ConfigError(
            f"The recipe says model.stream: {stream}, and of the base handed in that is {base.streamed}. Load it as "
            "the recipe says, or leave model.stream out: the demo and serve keep their base on the device."
        )
    if any("lora_" in name for name, _ in base.model.named_parameters()):
        raise ConfigError("The base handed in has an adapter on it already. Load a base without one.")
    if recipe.reference_adapter is not None:
        model = attach_adapter(base, recipe.reference_adapter, trainable=True)
        whole = ", ".join(copies_of(model))
        if whole and base.dtype != "float32":
            raise ConfigError(
                f"The adapter {recipe.reference_adapter} has whole modules ({whole}), and training does not go on with "
                f"whole modules in 16 bits ({base.dtype}). Set model.dtype: float32."
            )
        return model
    model = attach_lora(base.model, recipe.lora, seed=run.settings["seed"])
    if fresh and recipe.lora.init == "eva":
        _init_from_data(run, model)
    return model


def _init_from_data(run: Run, model: PeftModel) -> None:
    """A from what the layers read of chosen and other good answers, or of any where there is no good one."""
    good = [one for one in run.answers if one.up] or run.answers
    rows = [pair.prompt + pair.chosen for pair in run.train] or [one.prompt + one.answer for one in good]
    count = sum(hasattr(part, "lora_A") for part in model.modules())
    init_from_inputs(model, drawn_batch(rows), on_layer=run.progress("A from what the layers read", count))
