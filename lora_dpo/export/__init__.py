"""An adapter for other programs: llama.cpp, Ollama, and servers that read PEFT folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from lora_dpo.adapters import base_name
from lora_dpo.errors import AdapterError, ConfigError
from lora_dpo.fetch import PACKAGED_MODELS
from lora_dpo.files import atomic_file, atomic_folder
from lora_dpo.lora_files import CONFIG, WEIGHTS, read_json
from lora_dpo.merging import Merged, plan_base, plan_merge
from lora_dpo.quiet import quiet_libraries

__all__ = ["export"]

To = Literal["gguf-adapter", "gguf", "ollama", "peft"]
OnTensor = Callable[[int, int], None]


def export(
    source: str | Path,
    output: str | Path,
    *,
    to: To,
    kind: str | None = None,
    into: Literal["base16", "trained-base"] = "base16",
    model: str | None = None,
    on_tensor: OnTensor | None = None,
) -> Path:
    """Write an adapter in a form that another program reads; whole, or not at all.

    Args:
        source: an adapter folder; with `to="gguf"` or "ollama" also a base model (a name, a folder), as it is.
        to: "gguf-adapter" (llama.cpp's --lora), "gguf" (the merged model), "ollama" (that and a Modelfile), or
            "peft" (the two files that servers read).
        kind: how weights are stored: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0. Default f16; f32 of an adapter.
        into: what is merged into, as in `merge`.
        model: another place of the same base.
        on_tensor: called with the number of parameters written and their total.

    Raises:
        AdapterError: the adapter is broken, does not fit, or does what the form cannot hold.
        ModelError: an architecture, tokenizer or template without an equal in llama.cpp.
        OutputError: `output` exists or cannot be written.
    """
    output = Path(output)
    adapter = Path(source) if (Path(source) / CONFIG).exists() else None
    if adapter is None and (to in ("peft", "gguf-adapter") or not _is_model(source)):
        raise AdapterError(f"{source} is no adapter: there is no adapter_config.json in it.")
    with quiet_libraries():
        if to == "peft" and adapter:
            return _peft_folder(adapter, output)
        merged = plan_merge(adapter, into=into, model=model) if adapter else plan_base(str(source))
        name = (adapter or Path(source)).name
        if to == "gguf-adapter" and adapter:
            return _gguf_adapter(adapter, merged, output, _kind(kind, "f32"), name)
        if to == "ollama":
            return _ollama(merged, output, _kind(kind, "f16"), name, on_tensor)
        with atomic_file(output) as temporary:
            _gguf_model(merged, temporary, _kind(kind, "f16"), name, on_tensor)
    return output


def _kind(kind: str | None, default: str) -> str:
    from lora_dpo.config import nearest
    from lora_dpo.export.gguf_write import KINDS

    kind = kind or default
    if kind not in KINDS:
        raise ConfigError(f"--type is {kind!r}: allowed are {', '.join(KINDS)}.{nearest(kind, KINDS)}")
    return kind


def _is_model(source: str | Path) -> bool:
    return str(source) in PACKAGED_MODELS or (Path(source) / "config.json").is_file() or not Path(source).exists()


def _gguf_adapter(adapter: Path, merged: Merged, output: Path, kind: str, name: str) -> Path:
    from lora_dpo.export.gguf_write import write_adapter

    if kind not in ("f32", "f16", "bf16", "q8_0"):
        raise ConfigError(f"--type is {kind!r}: an adapter is stored as f32, f16, bf16 or q8_0.")
    with atomic_file(output) as temporary:
        write_adapter(adapter, merged, temporary, kind=kind, name=name)
    return output


def _gguf_model(merged: Merged, target: Path, kind: str, name: str, on_tensor: OnTensor | None) -> None:
    from lora_dpo.export.gguf_write import write_model

    tokenizer, stops = _tokenizer(merged)
    write_model(merged, target, kind=kind, tokenizer=tokenizer, stops=stops, name=name, on_tensor=on_tensor)


def _tokenizer(merged: Merged) -> tuple[Any, list[int]]:
    """The tokenizer, and the ids that end a turn: its own and those of the generation config."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged.path)
    path = merged.path / "generation_config.json"
    configured = read_json(path).get("eos_token_id") if path.is_file() else None
    stops = configured if isinstance(configured, list) else [configured]
    return tokenizer, list(dict.fromkeys(i for i in [tokenizer.eos_token_id, *stops] if i is not None))


def _ollama(merged: Merged, output: Path, kind: str, name: str, on_tensor: OnTensor | None) -> Path:
    from lora_dpo.export.ollama import modelfile

    tokenizer, stops = _tokenizer(merged)
    text = modelfile("model.gguf", tokenizer, [str(tokenizer.convert_ids_to_tokens(stop)) for stop in stops])
    with atomic_folder(output) as folder:
        _gguf_model(merged, folder / "model.gguf", kind, name, on_tensor)
        (folder / "Modelfile").write_text(text, encoding="utf-8")
    return output


def _peft_folder(adapter: Path, output: Path) -> Path:
    """The two PEFT files and the card. The base is named so that a server can find it: a hub id, not a place here."""
    from lora_dpo.lora_files import check_finite, read_adapter

    config, _ = read_adapter(adapter)
    check_finite(adapter)
    name, revision = base_name(adapter)
    raw = {**config.raw, "base_model_name_or_path": PACKAGED_MODELS[name].source if name in PACKAGED_MODELS else name}
    raw |= {"revision": revision, "inference_mode": True}
    with atomic_folder(output) as folder:
        shutil.copyfile(adapter / WEIGHTS, folder / WEIGHTS)
        if (adapter / "README.md").is_file():
            card = (adapter / "README.md").read_text(encoding="utf-8")
            (folder / "README.md").write_text(card.replace("![training curves](curves.png)\n\n", ""), encoding="utf-8")
        (folder / CONFIG).write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return output
