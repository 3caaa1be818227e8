"""An adapter and its base become one ordinary model folder.

Two bases can take the update, and the results differ:

    base16        the weights as stored; no 4-bit rounding, but not quite what the adapter was trained on
    trained-base  the quantised values that the adapter was trained on; the live adapter's own function

The folder is written shard by shard, each tensor computed when its turn comes (`merged_weights.py`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_dpo.adapters.folder import warn_of
from lora_dpo.data.chat_template import hold_defaults
from lora_dpo.files import atomic_folder, refuse_existing
from lora_dpo.quiet import quiet_libraries
from lora_dpo.release.merge_base import trained_into
from lora_dpo.release.merged_weights import Merged, plan_merge
from lora_dpo.text import plain

if TYPE_CHECKING:
    import torch

Into = Literal["base16", "trained-base", "both"]
StoredDtype = Literal["bfloat16", "float16", "float32"]
SHARD = 1 << 30
"""Bytes of one file of weights, and so the part of a merge that is held in memory."""

OnTensor = Callable[[int, int], None]


def merge(
    adapter: str | Path,
    output: str | Path,
    *,
    into: Into | None = None,
    dtype: StoredDtype = "bfloat16",
    model: str | None = None,
    shard: int = SHARD,
    on_tensor: OnTensor | None = None,
) -> Path:
    """Merge an adapter into its base and write a model folder that plain transformers loads.

    Sums are made in float32; `dtype` is what is stored. Memory is bounded by the largest matrix and `shard`.

    Args:
        into: "base16", "trained-base", or "both" for one folder of each name under `output`; by default what the
            adapter was trained on.
        model: another place of the same base; by default the one that the passport names.
        shard: largest size of one file of weights, in bytes.
        on_tensor: called with the number of parameters written and their total.

    Raises:
        AdapterError: no adapter there, made for another base, or it cannot be merged.
        ModelError: the base is not there, or is stored in packed 4-bit weights.
        OutputError: `output` exists or cannot be written.
    """
    adapter, output = Path(adapter), Path(output)
    refuse_existing(output)
    with quiet_libraries():
        into = into or trained_into(adapter, model)
        which: tuple[Literal["base16", "trained-base"], ...] = ("base16", "trained-base") if into == "both" else (into,)
        plans = [_plan(adapter, one, model, compared=into == "both") for one in which]
        total = sum(len(plan.shapes) for plan in plans)
        with atomic_folder(output) as folder:
            done = 0
            for one, plan in zip(which, plans, strict=True):
                place = folder / one if into == "both" else folder
                place.mkdir(exist_ok=True)
                write_merged(plan, place, dtype, shard, _counter(on_tensor, done, total))
                done += len(plan.shapes)
    return output


def _plan(adapter: Path, into: Literal["base16", "trained-base"], model: str | None, *, compared: bool) -> Merged:
    plan = plan_merge(adapter, into=into, model=model)
    if not (compared and into == "base16"):  # that it differs is what is to be seen; the other plan says the rest
        warn_of(plan.differences)
    return plan


def _counter(on_tensor: OnTensor | None, start: int, total: int) -> Callable[[int], None]:
    def count(written: int) -> None:
        if on_tensor:
            on_tensor(start + written, total)

    return count


def write_merged(plan: Merged, folder: Path, dtype: StoredDtype, shard: int, tick: Callable[[int], None]) -> None:
    """Write weights, tokenizer and config into a folder; the config last, since a folder without it is no model.

    Args:
        shard: bytes of a file of weights, at most.
        tick: called with the number of tensors written.
    """
    import torch
    from transformers import AutoTokenizer

    stored = getattr(torch, dtype)
    _write_weights(plan, folder, stored, shard, tick)
    tokenizer = AutoTokenizer.from_pretrained(plan.path)
    hold_defaults(tokenizer, plan.chat_template_kwargs)
    tokenizer.save_pretrained(folder)
    for name in ("generation_config.json", "LICENSE"):
        if (plan.path / name).is_file():
            shutil.copyfile(plan.path / name, folder / name)
    plan.config.dtype = stored
    plan.config.save_pretrained(folder)


def _write_weights(plan: Merged, folder: Path, stored: torch.dtype, shard: int, tick: Callable[[int], None]) -> None:
    import torch
    from safetensors.torch import save_file

    sizes = {name: torch.Size(shape).numel() * stored.itemsize for name, shape in plan.shapes.items()}
    files = shard_files(sizes, shard)
    place = {name: file for file, names in files.items() for name in names}
    part: dict[str, torch.Tensor] = {}
    for number, (name, tensor) in enumerate(plan.tensors(), start=1):
        part[name] = _cast(name, tensor, stored)
        del tensor  # the caller's name would keep a second copy of the largest matrix alive
        if len(part) == len(files[place[name]]):
            save_file(part, folder / place[name], metadata={"format": "pt"})
            part = {}
        tick(number)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": place}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8", newline="\n"
        )


def shard_files(sizes: dict[str, int], limit: int) -> dict[str, list[str]]:
    """Spread tensors over files of at most `limit` bytes (one larger tensor gets its own), in the order given."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, start=1)}


def _cast(name: str, tensor: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    import torch

    from lora_dpo.errors import AdapterError

    if not tensor.is_floating_point():
        return tensor
    cast = tensor.to(stored).contiguous()
    if not torch.isfinite(cast).all():
        raise AdapterError(
            f"{plain(name)} does not fit into {str(stored).removeprefix('torch.')} (a value overflows). "
            "Use --dtype bfloat16 or float32."
        )
    return cast
