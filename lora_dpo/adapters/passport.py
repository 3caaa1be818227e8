"""The passport of an adapter: what it was trained on and from, and what was measured.

Also whether a folder is a finished adapter, which names mean the same model everywhere, and a model's licence.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_dpo import places
from lora_dpo.adapters.lora_config import CONFIG, WEIGHTS, read_json
from lora_dpo.config.template_kwargs import NO_KWARGS, TemplateKwargs, checked_template_kwargs
from lora_dpo.errors import AdapterError
from lora_dpo.files import sha256_of
from lora_dpo.model.base import Base, resolve_model
from lora_dpo.model.origin import to_text
from lora_dpo.model.packaged import PACKAGED_MODELS, is_hub_id
from lora_dpo.text import plain

PASSPORT = "passport.json"

MAX_PASSPORT = 4 << 20

PACKAGES = ("lora-dpo", "torch", "transformers", "peft", "trl", "bitsandbytes")


@dataclass(frozen=True)
class Passport:
    """What an adapter was made from. Read back from `passport.json`."""

    base: str
    base_revision: str | None
    base_fingerprint: str | None
    quantize: str
    packed: bool
    dtype: str
    tokenizer_sha256: str
    chat_template_sha256: str
    reference: str
    data: dict[str, Any]
    metrics: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""
    base_licence: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    adapter_sha256: str | None = None
    """Of `adapter_model.safetensors`: a passport belongs to one file of weights."""
    reference_sha256: str | None = None
    """Of the reference adapter's weights, where `reference` is an adapter."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Keywords for the chat template that it was trained with, and is asked with."""
    kept_share: float = 0.0
    """Of a quantised base: the share of its layers' weights that were not quantised."""
    base_sample: dict[str, str] = field(default_factory=dict)
    """Some numbers of the base's stored weights (`model.origin`): by them it is known again in another form."""
    format: int = 2


@dataclass(frozen=True)
class Sources:
    """What a passport says of files that training does not read: they may be gone when it ends."""

    base_licence: str | None
    reference_sha256: str | None


def sources_of(base: Base, reference: str) -> Sources:
    """Read them now. Of a base, its weights and what is known of them were read when it was loaded."""
    return Sources(licence_of(base.name, base.revision), _sha256_of_reference(reference))


def make_passport(
    base: Base,
    *,
    reference: str,
    data: dict[str, Any],
    metrics: dict[str, Any],
    created: str,
    recipe: dict[str, Any] | None = None,
    chat_template_kwargs: TemplateKwargs = NO_KWARGS,
    sources: Sources | None = None,
) -> Passport:
    """Describe an adapter that was trained on `base` as it is in memory.

    Args:
        sources: as they were when training began; by default they are read now.
    """
    sources = sources or sources_of(base, reference)
    return Passport(
        base=base.name,
        base_revision=base.revision,
        base_fingerprint=base.fingerprint,
        quantize=base.quantize,
        packed=base.packed,
        dtype=base.dtype,
        tokenizer_sha256=base.tokenizer_sha256,
        chat_template_sha256=base.chat_template_sha256,
        reference=reference,
        data=data,
        metrics=metrics,
        versions={name: version(name) for name in PACKAGES},
        created=created,
        base_licence=sources.base_licence,
        recipe=recipe or {},
        reference_sha256=sources.reference_sha256,
        chat_template_kwargs=dict(chat_template_kwargs),
        kept_share=round(base.kept_share, 4),
        base_sample=to_text(base.sample),
    )


def write_passport(folder: Path, passport: Passport) -> None:
    """Write `passport.json` into an adapter folder that has its weights already."""
    passport = replace(passport, adapter_sha256=sha256_of(folder / WEIGHTS))
    text = json.dumps(asdict(passport), indent=2, ensure_ascii=False)
    (folder / PASSPORT).write_text(text + "\n", encoding="utf-8", newline="\n")


def read_passport(folder: Path) -> Passport | None:
    """The passport of an adapter folder; None for an adapter made by another tool.

    Raises:
        AdapterError: no adapter there, or a passport that cannot be read.
    """
    check_folder(folder)
    path = folder / PASSPORT
    return parse_passport(path) if path.is_file() else None


def parse_passport(path: Path) -> Passport:
    """Read one `passport.json`, every field of its type. Raises `AdapterError`."""
    from pydantic import TypeAdapter, ValidationError

    try:
        passport = TypeAdapter(Passport).validate_python(read_json(path, MAX_PASSPORT), strict=False)
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{plain('.'.join(map(str, first['loc'])))}: {plain(first['msg'])}"
        raise AdapterError(f"{path} cannot be read ({reason}). Take the adapter from its source again.") from error
    try:
        checked_template_kwargs(passport.chat_template_kwargs)
    except ValueError as error:
        raise AdapterError(
            f"{path} cannot be read ({plain(str(error))}). Take the adapter from its source again."
        ) from None
    return passport


def _sha256_of_reference(reference: str) -> str | None:
    weights = Path(reference.removeprefix("adapter:")) / WEIGHTS
    return sha256_of(weights) if reference.startswith("adapter:") and weights.is_file() else None


def check_folder(folder: Path) -> None:
    """Raise `AdapterError` unless `folder` holds a finished adapter in safetensors."""
    if not os.path.isdir(folder):  # unlike Path.is_dir without an error for a name that is too long
        raise AdapterError(f"There is no adapter folder at {folder}.{_known_adapters()}")
    if folder.name.startswith(".") and folder.name.strip("."):
        raise AdapterError(f"{folder} is what a cut-off write left behind, not an adapter. Remove it.")
    if not (folder / CONFIG).is_file():
        raise AdapterError(f"{folder} is no adapter: there is no adapter_config.json in it.")
    if not (folder / WEIGHTS).is_file():
        hint = " (only a pickle file, which is never loaded)" if (folder / "adapter_model.bin").exists() else ""
        raise AdapterError(f"{folder} has no adapter_model.safetensors{hint}. Take the adapter from its source again.")


def is_public_name(name: str) -> bool:
    """True for a hub id or a packaged model: names that mean the same model everywhere, unlike a folder."""
    return name in PACKAGED_MODELS or is_hub_id(name)


def licence_of(name: str, revision: str | None = None) -> str | None:
    """The licence that a model states: in its model card, else the first lines of its LICENSE."""
    if (card := _model_file(name, "README.md", revision)) is not None:
        found = re.search(r"\A---\n.*?^license:\s*(\S+)", card.read_text("utf-8", "replace"), re.MULTILINE | re.DOTALL)
        if found:
            return found[1]
    if (licence := _model_file(name, "LICENSE", revision)) is not None:
        lines = [line.strip() for line in licence.read_text("utf-8", "replace").splitlines() if line.strip()]
        return " ".join(lines[:2]) if lines else None
    return None


def _model_file(name: str, file: str, revision: str | None) -> Path | None:
    """A small file of a model: in its folder, in the hub's cache, or on the hub. None if it is in none of them."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    path = resolve_model(name)
    if Path(path).is_dir():
        return Path(path) / file if (Path(path) / file).is_file() else None
    if not is_public_name(path):
        return None
    cached = try_to_load_from_cache(path, file, revision=revision)
    if cached is not None:  # a path, or the mark of a file that is known not to be there
        return Path(cached) if isinstance(cached, str) else None
    try:
        return Path(hf_hub_download(path, file, revision=revision))
    except (OSError, ValueError):  # no such file, no network: a licence is worth no failed training
        return None


def _known_adapters() -> str:
    folder = places.adapters()
    found = sorted(folder.glob("*/adapter_config.json")) if folder.is_dir() else []
    names = [str(path.parent) for path in found if not path.parent.name.startswith(".")]
    return (
        f" There is {', '.join(names)}."
        if names
        else " Train one with: lora-dpo train DATA, or begin with: lora-dpo init"
    )
