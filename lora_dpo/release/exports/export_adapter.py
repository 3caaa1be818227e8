"""An adapter for other programs: llama.cpp, Ollama, and servers that read PEFT folders."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from lora_dpo import places
from lora_dpo.adapters.adapter import open_adapter
from lora_dpo.adapters.base_search import base_of
from lora_dpo.adapters.folder import warn_of
from lora_dpo.adapters.lora_config import CONFIG, WEIGHTS, read_json
from lora_dpo.adapters.package import CARD, without_picture
from lora_dpo.adapters.peft_files import check_finite
from lora_dpo.adapters.store import adapter_names, find_adapter
from lora_dpo.data.chat_template import hold_defaults
from lora_dpo.errors import AdapterError, ConfigError
from lora_dpo.files import atomic_file, atomic_folder
from lora_dpo.leftovers import temporary_folder
from lora_dpo.model.packaged import PACKAGED_MODELS
from lora_dpo.quiet import quiet_libraries
from lora_dpo.release.merge_base import Into, trained_into
from lora_dpo.release.merged_weights import Merged, plan_base, plan_merge
from lora_dpo.text import plain

__all__ = ["adapter_of", "export"]

To = Literal["gguf-adapter", "gguf", "ollama", "peft"]
OnTensor = Callable[[int, int], None]


def export(
    source: str | Path,
    output: str | Path,
    *,
    to: To,
    kind: str | None = None,
    into: Into | None = None,
    model: str | None = None,
    on_tensor: OnTensor | None = None,
) -> Path:
    """Write an adapter in a form that another program reads; whole, or not at all.

    Args:
        source: an adapter folder or its name in adapters/; with `to="gguf"` or "ollama" also a base model (a name, a
            folder).
        to: "gguf-adapter" (llama.cpp's --lora), "gguf" (the merged model), "ollama" (that and a Modelfile), or
            "peft" (the two files that servers read).
        kind: how weights are stored: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, or a K-quant such as q4_k_m where
            llama.cpp's `llama-quantize` is installed. Default f16; f32 of an adapter.
        into: what is merged into, as in `merge`; by default what the adapter was trained on. Of a base model: as it
            is stored (the default), or its NF4 values.
        model: another place of the same base.
        on_tensor: called with the number of parameters written and their total.

    Raises:
        ConfigError: a type that there is not, or `into` where nothing is merged.
        AdapterError: the adapter is broken, does not fit, or does what the form cannot hold.
        ModelError: an architecture, tokenizer or template without an equal in llama.cpp, or that its converter is
            needed for, which is not installed.
        OutputError: `output` exists or cannot be written.
    """
    output = Path(output)
    adapter = adapter_of(source)
    if to in ("peft", "gguf-adapter"):
        if adapter is None:
            raise AdapterError(f"{plain(source)} is no adapter: there is no {CONFIG} in it.")
        if into is not None:
            raise ConfigError(f"--into has no effect with --to {to}: nothing is merged.")
    with quiet_libraries():
        if to == "peft" and adapter:
            return _peft_folder(adapter, output)
        if adapter:
            merged = plan_merge(adapter, into=into or trained_into(adapter, model), model=model)
            warn_of(merged.differences)
        else:
            merged = plan_base(str(source), into=into or "base16")
        name = (adapter or Path(source)).name
        if to == "gguf-adapter" and adapter:
            return _gguf_adapter(adapter, merged, output, _kind(kind, "f32"), name)
        if to == "ollama":
            return _ollama(merged, output, _kind(kind, "f16"), name, on_tensor)
        with atomic_file(output) as temporary:
            _gguf_model(merged, temporary, _kind(kind, "f16"), name, on_tensor)
    return output


def adapter_of(source: str | Path) -> Path | None:
    """The adapter folder that `source` names, by its path or its name in adapters/; None for a base model.

    Raises:
        AdapterError: a folder that is neither, or the mistyped name of an adapter.
    """
    path = Path(os.path.expanduser(source))
    if (path / CONFIG).exists():
        return path
    if str(source) in PACKAGED_MODELS or (path / "config.json").is_file():
        return None
    names, bare = adapter_names(), len(path.parts) == 1
    if path.exists() and not (bare and path.name in names):
        raise AdapterError(f"{plain(source)} is no adapter: there is no {CONFIG} in it.")
    if path.parts[:1] == (places.adapters().name,) or (bare and (path.name in names or _near(path.name, names))):
        return find_adapter(source)
    return None  # a hub id


def _near(name: str, names: list[str]) -> bool:
    from lora_dpo.config.reading import nearest

    return bool(nearest(name, names))


def _kind(kind: str | None, default: str) -> str:
    from lora_dpo.config.reading import nearest
    from lora_dpo.release.exports.gguf_write import KINDS
    from lora_dpo.release.exports.llama_cpp_tools import K_QUANTS

    kind, known = (kind or default).lower(), (*KINDS, *K_QUANTS)
    if kind not in known:
        raise ConfigError(f"--type is {kind!r}: allowed are {', '.join(known)}.{nearest(kind, known)}")
    return kind


def _gguf_adapter(adapter: Path, merged: Merged, output: Path, kind: str, name: str) -> Path:
    from lora_dpo.release.exports.gguf_write import write_adapter

    if kind not in ("f32", "f16", "bf16", "q8_0"):
        raise ConfigError(f"--type is {kind!r}: an adapter is stored as f32, f16, bf16 or q8_0.")
    with atomic_file(output) as temporary:
        write_adapter(adapter, merged, temporary, kind=kind, name=name)
    return output


def _gguf_model(merged: Merged, target: Path, kind: str, name: str, on_tensor: OnTensor | None) -> None:
    """A merged model as GGUF: written here, or by llama.cpp's own programs where it is not known how."""
    from lora_dpo.release.exports.gguf_arch import ARCHS
    from lora_dpo.release.exports.gguf_write import write_model
    from lora_dpo.release.exports.llama_cpp_tools import K_QUANTS, check_quantize, convert, quantize

    if kind in K_QUANTS:
        check_quantize(kind)
        with temporary_folder(target) as folder:
            _gguf_model(merged, folder / "f16.gguf", "f16", name, on_tensor)
            quantize(folder / "f16.gguf", folder / "made.gguf", kind=kind)
            os.replace(folder / "made.gguf", target)
        return
    if merged.config.model_type not in ARCHS:
        total = len(merged.shapes)
        convert(merged, target, kind=kind, tick=lambda done: on_tensor(done, total) if on_tensor else None)
        return
    tokenizer, stops = _tokenizer(merged)
    write_model(merged, target, kind=kind, tokenizer=tokenizer, stops=stops, name=name, on_tensor=on_tensor)


def _tokenizer(merged: Merged) -> tuple[Any, list[int]]:
    """The tokenizer, and the ids that end a turn: its own and those of the generation config."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged.path)
    hold_defaults(tokenizer, merged.chat_template_kwargs)
    path = merged.path / "generation_config.json"
    configured = read_json(path).get("eos_token_id") if path.is_file() else None
    stops = configured if isinstance(configured, list) else [configured]
    return tokenizer, list(dict.fromkeys(i for i in [tokenizer.eos_token_id, *stops] if i is not None))


def _ollama(merged: Merged, output: Path, kind: str, name: str, on_tensor: OnTensor | None) -> Path:
    from lora_dpo.release.exports.ollama import modelfile

    tokenizer, stops = _tokenizer(merged)
    text = modelfile("model.gguf", tokenizer, [str(tokenizer.convert_ids_to_tokens(stop)) for stop in stops])
    with atomic_folder(output) as folder:
        _gguf_model(merged, folder / "model.gguf", kind, name, on_tensor)
        (folder / "Modelfile").write_text(text, encoding="utf-8", newline="\n")
    return output


def _peft_folder(adapter: Path, output: Path) -> Path:
    """The two PEFT files and the card. The base is named where it can be loaded from: a hub id, or a folder here."""
    opened = open_adapter(adapter)
    check_finite(adapter)
    try:
        name, revision = base_of(opened)
    except AdapterError:  # a copy needs no base
        name, revision = opened.named_base
    # not the hub's model of that name: a packaged one has other weights, rounded to 4 bits by its maker
    base = str(places.model_folder(name)) if name in PACKAGED_MODELS else name
    raw = {**opened.config.raw, "base_model_name_or_path": base, "revision": revision, "inference_mode": True}
    with atomic_folder(output) as folder:
        shutil.copyfile(adapter / WEIGHTS, folder / WEIGHTS)
        if (adapter / CARD).is_file():
            (folder / CARD).write_bytes(without_picture((adapter / CARD).read_bytes()))
        (folder / CONFIG).write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")
    return output
