"""From another tool's settings to a recipe: what `lora-dpo init --from` does."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_dpo.config.foreign import Remark, Translation, read_foreign
from lora_dpo.files import atomic_file, refuse_existing, refuse_unwritable
from lora_dpo.training.drafting.recipe_text import WIDTH, recipe_text


@dataclass(frozen=True)
class Translated:
    """A recipe that was written, and what became of the settings."""

    path: Path
    made: Translation


def translate(other: Path, path: Path | None = None) -> Translated:
    """Write the settings of LLaMA-Factory, Axolotl, Unsloth or TRL in a file as a recipe.

    Args:
        path: the recipe's file; default the other file's name with `-lora-dpo.yaml`, in the current folder.

    Raises:
        LoraDPOError: the settings cannot be read or translated, or the file is there. Nothing is written then.
    """
    path = path or Path(f"{other.stem}-lora-dpo.yaml")
    refuse_existing(path)
    refuse_unwritable(path)
    made = read_foreign(other)
    text = recipe_text(made.settings, head=_head(made, other, path), beside=_renamed(made), foot=_foot(made))
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return Translated(path, made)


def _head(made: Translation, other: Path, path: Path) -> Iterator[str]:
    recipe = shlex.quote(str(path))
    yield f"{other.name}, settings of {made.tool}, as a recipe. Behind a setting stands what it was there."
    yield ""
    yield f"  lora-dpo plan {recipe}    what it reads, needs and takes"
    yield f"  lora-dpo train {recipe}   makes adapters/{path.stem}"
    loud = [remark for remark in made.missing if remark.loud]
    if loud:
        yield ""
        yield "It does not train the same, as these have no counterpart here:"
        yield from _listed(loud)


def _foot(made: Translation) -> Iterator[str]:
    quiet = [remark for remark in made.missing if not remark.loud]
    if made.changed:
        yield "What means something else here:"
        yield from _listed(made.changed)
    if quiet:
        yield "What is left out, and nothing is lost:"
        yield from _listed(quiet)


def _renamed(made: Translation) -> dict[str, str]:
    """Where settings come from that had another name."""
    return {key: origin for key, origin in made.origins.items() if key.rpartition(".")[2] != origin}


def _listed(remarks: Sequence[Remark]) -> Iterator[str]:
    for remark in remarks:
        first, *more = textwrap.wrap(f"{remark.name}: {remark.text}", WIDTH - 4, break_on_hyphens=False) or [""]
        yield f"  {first}"
        yield from (f"      {line}" for line in more)
