"""What a training step asks of a GPU, counted without one: kernels, memory traffic, bytes kept for the backward pass.

    python benchmarks/step_counts.py --size 8b

The engine's own forward and backward pass runs over tensors that have sizes and no values, under bf16 autocast, with
an NF4 base and a rank-16 adapter on all linear layers. Counted is each operation that would be a kernel on CUDA: not
views, not allocations. Where CUDA has one kernel for what a CPU does in several, the CUDA operation is called.
Elementwise traffic is what all operations but matrix products and attention read and write.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SIZES = {
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32),
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
}
NF4 = dict(bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "gemm_4bit", "dequantize_4bit", "dequantize_blockwise")
"""What is bound by arithmetic or reads the weights, which every trainer has to."""
TWICE = ("gemm_4bit",)
"""Two kernels: above 512 rows bitsandbytes unpacks the weight and multiplies then."""
PICKED = ("embedding", "gather", "index", "index_select")
"""Read as much as they write."""
NO_KERNEL = (
    "device",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "_unsafe_view",
)


@dataclass
class Counts:
    """Of one pass."""

    kernels: Counter[str] = field(default_factory=Counter)
    peak: int = 0
    """Most bytes that lived at once of what it made."""
    traffic: float = 0.0
    """Bytes read and written by what is neither a matrix product nor attention."""

    @property
    def launches(self) -> int:
        """All kernels."""
        return sum(self.kernels.values())


class Counting(TorchDispatchMode):
    """Counts the operations inside the block, and the bytes of what they make as long as it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self.live = 0
        self._owners: Counter[int] = Counter()
        """How many tensors lie in each storage that was made here."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count it."""
        given = [one for one in tree_leaves((args, kwargs)) if is_tensor(one)]
        if len({one.device for one in given}) > 1 and not func._schema.name.endswith("::copy_"):
            raise RuntimeError(f"{func} was called with tensors on {sorted({str(one.device) for one in given})}")
        known = {storage_of(one) for one in given}
        out = func(*args, **(kwargs or {}))
        self._note_memory(func, args, out, known)
        name = func._schema.name.partition("::")[2]
        if "attention" in name and (
            (kwargs or {}).get("attn_mask") is not None or ("efficient" in name and args[3] is not None)
        ):
            name = f"masked {name}"
        if not func.is_view and name.rstrip("_") not in NO_KERNEL:
            wrote = [tensor for tensor in tree_leaves(out) if is_tensor(tensor)]
            read = wrote if name in PICKED else given
            self.note(name, read + wrote)
        return out

    def _note_memory(self, func: Any, args: Any, out: Any, known: set[int]) -> None:
        within = 0
        if func._schema.name.endswith("gemm_4bit"):
            rows, columns = args[2]
            within = rows * columns * args[0].element_size()  # the unpacked weight
        for one in tree_leaves(out):
            if not isinstance(one, torch.Tensor):
                continue
            place = storage_of(one)
            if place not in known and not self._owners[place]:
                self.live += one.untyped_storage().nbytes()
            elif place in known and place not in self._owners:
                continue  # of somebody else's, such as a weight
            self._owners[place] += 1
            weakref.finalize(one, self._forget, place, one.untyped_storage().nbytes())
        self.counts.peak = max(self.counts.peak, self.live + within)

    def _forget(self, place: int, size: int) -> None:
        self._owners[place] -= 1
        if not self._owners[place]:
            del self._owners[place]
            self.live -= size

    def note(self, name: str, moved: list[torch.Tensor]) -> None:
        """One kernel that reads or writes these tensors."""
        self.counts.kernels[name] += 2 if name in TWICE else 1
        if name not in PRODUCTS and "attention" not in name:
            self.counts.traffic += sum(tensor.numel() * tensor.element_size() for tensor in moved)


def storage_of(tensor: torch.Tensor) -> int:
    """Which memory a tensor lies in."""
    return int(tensor.untyped_storage()._cdata)


@contextlib.contextmanager
def as_on_cuda(device: torch.device) -> Iterator[None]:
    """Inside the block the engine calls what it calls on an NVIDIA GPU, and peft is told of its autocast."""
    from lora_dpo.engine import attention, fused_layers, products

    rounds = device.type == "cpu"  # the meta device has no autocast
    real = torch.autocast("cpu", torch.bfloat16)
    with (
        real if rounds else mock.patch.object(torch, "autocast", mock.MagicMock()),
        # after the real one, which puts back at its end what it was told here
        mock.patch.object(torch, "is_autocast_enabled", return_value=rounds),
        mock.patch.object(attention, "is_fused_lower_right", return_value=True),
        mock.patch.object(attention, "lower_right", flash_attention),
        mock.patch.object(fused_layers, "has_norm_kernels", return_value=True),
        mock.patch.object(fused_layers, "norm_kernel", fake_norm_kernel),
        mock.patch.object(products, "widens", return_value=True),
        mock.patch.object(torch.autograd.graph, "save_on_cpu", in_main_memory),
        mock.patch.object(products, "wide_product", fake_wide_product),
        mock.patch("peft.tuners.lora.dora.dequantize_module_weight", unpacked_weight),
    ):
        yield


def in_main_memory(*, pin_memory: bool) -> Any:
    """Stands for `torch.autograd.graph.save_on_cpu`: what is saved inside the block takes none of the card's memory."""

    def pack(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
        return tensor.shape, tensor.dtype

    def unpack(saved: tuple[torch.Size, torch.dtype]) -> torch.Tensor:
        return torch.empty(saved[0], dtype=saved[1])

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def flash_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    """CUDA's kernel, whose causal attention is aligned at the end."""
    result: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, is_causal=True, scale=scale
    )[0]
    return result


@torch.library.custom_op("lora_dpo_counts::rms_norm", mutates_args=())
def fake_norm_kernel(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Stands for CUDA's kernel, which a CPU takes apart."""
    raise NotImplementedError


@fake_norm_kernel.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(hidden), hidden.new_empty(*hidden.shape[:-1], 1, dtype=torch.float32)


@torch.library.custom_op("lora_dpo_counts::mm", mutates_args=())
def fake_wide_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Stands for CUDA's product with float32 sums."""
    raise NotImplementedError


@fake_wide_product.register_fake
def _(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left.new_empty(left.shape[0], right.shape[1], dtype=torch.float32)


def is_masked(args: Any, kwargs: Any) -> bool:
    """Whether an attention kernel is given a mask: the fast ones take none."""
    sizes = [one.shape[-2:] for one in args[:2]]
    masks = [one for one in (*args[3:], *kwargs.values()) if is_tensor(one) and one.is_floating_point()]
    return any(one.shape[-2:] == (sizes[0][0], sizes[1][0]) for one in masks)


SIDES = ("chosen_ids", "rejected_ids")


def is_tensor(value: Any) -> bool:
    """Whether it is a tensor that lies in the GPU's memory: one number is an argument of a kernel."""
    return isinstance(value, torch.Tensor) and value.dim() > 0


def meta_llama(size: str, layers: int | None = None, *, nf4: bool = False, dora: bool = False) -> Any:
    """A Llama with an adapter on the meta device, its linear layers bitsandbytes' if asked for, not packed yet."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(SIZES[size])
    config = LlamaConfig(
        vocab_size=128256, num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=size == "1b",
        **{**sizes, "num_hidden_layers": layers or sizes["num_hidden_layers"]},
    )  # fmt: skip
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with unset_fake_temporarily(), torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
        linear = [(parent, *child) for parent in model.modules() for child in parent.named_children()]
        for parent, name, part in linear:
            if nf4 and isinstance(part, torch.nn.Linear) and part is not model.lm_head:
                setattr(parent, name, Linear4bit(*part.weight.shape[::-1], **NF4))
        model.requires_grad_(False)
        model.is_loaded_in_4bit = nf4
        lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=names, use_dora=dora)
        with mock.patch("peft.tuners.lora.dora.dequantize_module_weight", unpacked_weight):
            return get_peft_model(model, lora)


def unpacked_weight(layer: Any) -> torch.Tensor:
    """Stands for peft's function of a layer whose packed weight is no class of bitsandbytes', or not there yet."""
    if (state := getattr(layer.weight, "quant_state", None)) is None:
        return torch.empty(layer.out_features, layer.in_features, dtype=torch.bfloat16, device=layer.weight.device)
    return dequantize_4bit(layer.weight.data, state)


def fake_nf4_llama(size: str, layers: int | None = None, device: str = "cpu", *, dora: bool = False) -> Any:
    """A Llama in NF4 with an adapter; call it inside a `FakeTensorMode`."""
    peft = meta_llama(size, layers, nf4=True, dora=dora)
    for part in peft.modules():
        for name, value in list(part.named_parameters(recurse=False)):
            if isinstance(part, Linear4bit):
                part.weight = packed_weight(part.out_features, part.in_features, device)
                continue
            dtype = torch.float32 if value.requires_grad else value.dtype
            made = torch.empty(value.shape, dtype=dtype, device=device)
            setattr(part, name, torch.nn.Parameter(made, value.requires_grad))
        for name, value in list(part.named_buffers(recurse=False)):
            setattr(part, name, torch.empty(value.shape, dtype=value.dtype, device=device))
    peft.get_base_model().tie_weights()
    return peft.train()


def packed_weight(outputs: int, inputs: int, device: str) -> Any:
    """Packed weight, scales and scales of scales of a bitsandbytes layer, without values."""
    blocks = outputs * inputs // 64
    number, byte = dict(device=device, dtype=torch.float32), dict(device=device, dtype=torch.uint8)
    scales = QuantState(
        absmax=torch.empty(-(-blocks // 256), **number), code=torch.empty(256, **number), blocksize=256,
        dtype=torch.float32,
    )  # fmt: skip
    weight: Any = torch.nn.Parameter(torch.empty(outputs * inputs // 2, 1, **byte), requires_grad=False)
    weight.quant_type, weight.compress_statistics = "nf4", True
    weight.quant_state = QuantState(
        absmax=torch.empty(blocks, **byte), shape=torch.Size((outputs, inputs)), code=torch.empty(16, **number),
        blocksize=64, quant_type="nf4", dtype=torch.bfloat16, offset=torch.empty((), **number), state2=scales,
    )  # fmt: skip
    return weight


def hh_rows(vocabulary: int = 40000) -> list[dict[str, list[int]]]:
    """Eight pairs with the lengths of HH-RLHF's."""
    from shapes import SHAPES, draw

    return draw(SHAPES["hh"], 8, vocabulary=vocabulary, seed=9)


def counted_step(
    model: Any,
    rows: list[dict[str, list[int]]],
    *,
    logged: bool = False,
    checkpointed: int = 0,
    offload: bool = False,
    stream: str = "off",
) -> tuple[Counts, Counts, float]:
    """Counts of the forward and of the backward pass of a step, and bytes kept a stream token.

    References are known. Under bf16 autocast where the model is on the CPU; on the meta device there is none, but each
    operation on tensors of two devices and each wait for a value is an error.

    Args:
        model: a PeftModel without values; call it inside its `FakeTensorMode`, if it has one.
        logged: whether what TRL only logs is computed.
        checkpointed: so many of the lowest layers are run again in the backward pass.
        offload: their inputs wait in main memory, which is not counted.
        stream: of the weights that visit the device (`model.stream`) counted is what is there, as long as it is.
    """
    from lora_dpo.engine.checkpointing import checkpoint_lowest
    from lora_dpo.engine.pair_batch import Part
    from lora_dpo.engine.pair_forward import PairForward
    from lora_dpo.engine.trunk_cache import decoder_layers
    from lora_dpo.model.lora import base_of
    from lora_dpo.model.visiting import VisitingWeights

    visiting = None if stream == "off" else VisitingWeights(base_of(model), model.device, layers=stream == "on")
    before = visiting.arrive if visiting is not None and stream == "on" else None
    with unset_fake_temporarily():  # norms are tried with values
        forward = PairForward(base_of(model))
    forward.logged = logged
    if checkpointed:
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
    checkpoint_lowest(decoder_layers(base_of(model)), checkpointed, offload=offload, before=before)
    tokens = [row["prompt_ids"] + row[side] for side in SIDES for row in rows]
    scored = [[0] * len(row["prompt_ids"]) + [1] * len(row[side]) for side in SIDES for row in rows]
    device = model.device
    ids_RT = torch.empty(len(tokens), max(map(len, tokens)), dtype=torch.long, device=device)
    call = dict(input_ids=ids_RT, attention_mask=ids_RT, labels=ids_RT, use_cache=False, fused_lm_head=True)
    with as_on_cuda(device), forward.on(Part(call, ids_RT, tokens, scored)), Counting() as counting:
        with forward.count_kept() as kept:
            log_probs_RT = model(**call).log_probs
        ahead, counting.counts = counting.counts, Counts()
        log_probs_RT.sum().backward()
    stream = forward.tokens
    forward.close()
    return ahead, counting.counts, sum(kept.values()) / stream


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="8b")
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    options = parser.parse_args()
    with FakeTensorMode():
        ahead, back, kept = counted_step(fake_nf4_llama(options.size), hh_rows())
    found = {
        "size": options.size,
        "kernels": [ahead.launches, back.launches],
        "elementwise_gigabytes": [round(counts.traffic / 1e9, 1) for counts in (ahead, back)],
        "kept_bytes_a_token": round(kept),
    }
    print(json.dumps(found, indent=1))
    print("most frequent:", dict((ahead.kernels + back.kernels).most_common(12)))
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
