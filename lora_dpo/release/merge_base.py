"""Which base an adapter is merged into: the weights it was trained on, or their 16-bit original; and its files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_dpo.adapters.adapter import open_adapter
from lora_dpo.adapters.base_search import base_of
from lora_dpo.adapters.hub import hub_errors
from lora_dpo.adapters.passport import read_passport
from lora_dpo.errors import AdapterError, ModelError
from lora_dpo.model.base import resolve_model
from lora_dpo.model.stored_form import StoredForm, held_text, stored_form

if TYPE_CHECKING:
    from lora_dpo.adapters.passport import Passport

Into = Literal["base16", "trained-base"]
CONFIG = "config.json"
OF_A_MODEL = (
    *(CONFIG, "generation_config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*chat_template*"),
    *("LICENSE*", "README.md"),
)
"""The files of a hub repository that a merge reads; others hold the same weights once more in other forms."""


def trained_into(adapter: Path, model: str | None = None) -> Into:
    """Which of the two bases an adapter was trained on, by its passport; base16 if nothing says so.

    "trained-base" of a base that is stored quantised, which has no other values; "base16" of the 16-bit original of one
    in another form than NF4, whose values are not made here.

    Raises:
        AdapterError: no adapter there, or it does not say what its base is.
        ModelError: the base is not there, or its config.json is none.
    """
    passport = read_passport(adapter)
    name, revision = (model, None) if model else base_of(open_adapter(adapter))
    if stored_form(str(files_of(name, revision, (CONFIG,)))) is not None:
        return "trained-base"
    return "trained-base" if passport is not None and passport.quantize.startswith("nf4") else "base16"


def check_into(
    into: Into, passport: Passport | None, adapter: Path, *, name: str, form: StoredForm | None, fingerprint: str | None
) -> None:
    """Refuse what are neither the weights that an adapter was trained on nor their 16-bit original.

    Args:
        name: the base that it would be merged into.
        form: how that is stored quantised, if it is.
        fingerprint: of that base.

    Raises:
        ModelError: it is stored quantised, and a plain one is asked for, or the adapter was trained on another form.
        AdapterError: the adapter was not trained on quantised weights, or on such as are not made here.
    """
    held = passport.quantize if passport else None
    if into == "base16" and form is not None:
        raise ModelError(
            f"{name} is stored quantised ({form.label}), so it has no 16-bit weights to merge into. Name its 16-bit "
            "original with --model, or take the values that it has, with --into trained-base."
        )
    if into == "base16" or passport is None or held is None:
        return
    if form is None and held == "none":
        raise AdapterError(f"{adapter} was trained on unquantised weights: use --into base16, it is the same base.")
    if form is None and not held.startswith("nf4"):
        raise AdapterError(
            f"{adapter} was trained on weights in {held_text(held)}, which are not made of {name}: use --into base16, "
            "or name the base that it was trained on."
        )
    # passports of earlier versions say none of a base that was stored quantised
    same = held == "none" and fingerprint == passport.base_fingerprint
    if form is not None and not same and held not in (form.held, form.kind):
        raise ModelError(
            f"{name} is stored quantised ({form.label}), and {adapter} was trained on weights {held_text(held)}. Name "
            "the base that it was trained on, or its 16-bit original."
        )


def files_of(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """A model's folder; a hub repository's files of these names are downloaded if they are not in the cache."""
    from huggingface_hub import snapshot_download

    path = resolve_model(name)
    if Path(path).is_dir():
        return Path(path)
    with hub_errors(path, ModelError):
        found = snapshot_download(path, revision=revision, allow_patterns=list(patterns), library_name="lora-dpo")
    if not (Path(found) / CONFIG).is_file():
        raise ModelError(f"{name} is no model: there is no {CONFIG} in it.")
    return Path(found)
