"""What llama.cpp expects of each architecture: its name, its numbers, and how its weights are laid out.

The conventions are llama.cpp's (`conversion/` in its repository, and its graph builders); the format and the map of
tensor names are the `gguf` package's. Where a model uses something that llama.cpp computes otherwise, it is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_dpo.errors import ModelError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Arch:
    """An architecture that can be exported."""

    gguf: str
    """Its name in `gguf.MODEL_ARCH`."""
    permuted: bool = False
    """Rows of q and k are reordered: transformers rotates halves of a head, llama.cpp neighbouring pairs."""
    norm_plus_one: bool = False
    """Gemma's RMSNorm multiplies by 1 + w, llama.cpp's by w."""


ARCHS = {
    "llama": Arch("LLAMA", permuted=True),
    "mistral": Arch("LLAMA", permuted=True),
    "qwen2": Arch("QWEN2"),
    "qwen3": Arch("QWEN3"),
    "gemma2": Arch("GEMMA2", norm_plus_one=True),
    "gemma3_text": Arch("GEMMA3", norm_plus_one=True),
    "phi3": Arch("PHI3"),
}


def arch_of(config: Any, name: str) -> Arch:
    """The architecture of a transformers config. Raises `ModelError` if llama.cpp's layout of it is not known here."""
    arch = ARCHS.get(config.model_type)
    if arch is None:
        raise ModelError(
            f"{name} is of type {config.model_type}; of an adapter alone GGUF export knows {', '.join(ARCHS)}. "
            "Take --to gguf, the merged model: llama.cpp's own converter writes it."
        )
    _refuse_what_differs(config, name)
    return arch


def permute(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows `[heads · head_dim, …]` of a q or k matrix (or bias, or LoRA B) for llama.cpp.

    Within each head, row i of the first half and row i of the second half become neighbours.
    """
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def head_count(config: Any, name: str) -> int | None:
    """The heads of a q or k parameter, None for any other."""
    if ".q_proj." in name or name.endswith(".q_proj"):
        return int(config.num_attention_heads)
    if ".k_proj." in name or name.endswith(".k_proj"):
        return int(config.num_key_value_heads)
    return None


def lay_out(arch: Arch, config: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A parameter as llama.cpp wants it; `name` is transformers' name."""
    heads = head_count(config, name) if arch.permuted else None
    if heads:
        return permute(tensor, heads)
    if arch.norm_plus_one and name.endswith("norm.weight"):
        return tensor.float() + 1
    return tensor


def add_numbers(writer: Any, arch: Arch, config: Any) -> None:
    """Write the architecture's hyperparameters."""
    head_dim = head_dim_of(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if arch.gguf != "PHI3":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if arch.gguf in ("LLAMA", "PHI3"):
        writer.add_rope_dimension_count(rotated(config))
    if arch.gguf == "GEMMA2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if arch.gguf in ("GEMMA2", "GEMMA3", "PHI3"):
        writer.add_sliding_window(config.sliding_window or 0)
    _add_rope(writer, config)


def extra_tensors(config: Any) -> dict[str, list[float]]:
    """Tensors that llama.cpp wants and transformers computes: factors of the rotary frequencies."""
    rope = rope_of(config)
    if rope["rope_type"] == "llama3":
        return {"rope_freqs.weight": llama3_factors(rope, rotated(config))}
    if rope["rope_type"] == "longrope":
        return {
            "rope_factors_long.weight": list(rope["long_factor"]),
            "rope_factors_short.weight": list(rope["short_factor"]),
        }
    return {}


def llama3_factors(rope: Any, dimension: int) -> list[float]:
    """By what each rotary frequency is divided in Llama 3.1 and newer (transformers' `rope_type: llama3`)."""
    original = rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    found = []
    for index in range(0, dimension, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (index / dimension)
        smooth = (original / wavelength - low) / (high - low)
        smooth = min(1.0, max(0.0, smooth))  # short waves stay, long ones are stretched, between them it blends
        found.append(1 / ((1 - smooth) / factor + smooth))
    return found


def head_dim_of(config: Any) -> int:
    """Width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rotated(config: Any) -> int:
    """How many dimensions of a head rotate."""
    return int(head_dim_of(config) * rope_of(config).get("partial_rotary_factor", 1.0))


def rope_of(config: Any) -> dict[str, Any]:
    """The rotary parameters, of the full-attention layers where layers differ (Gemma 3)."""
    rope: dict[str, Any] = config.rope_parameters
    full: dict[str, Any] = rope.get("full_attention", rope)
    return full


def _add_rope(writer: Any, config: Any) -> None:
    from gguf import RopeScalingType

    rope = rope_of(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType.LINEAR if rope["rope_type"] == "linear" else RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if config.model_type == "phi3":
        original = rope.get("original_max_position_embeddings", config.original_max_position_embeddings)
        writer.add_rope_scaling_orig_ctx_len(original)
        if rope["rope_type"] == "longrope":
            scale = config.max_position_embeddings / original
            writer.add_rope_scaling_attn_factors(
                math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
            )


def _refuse_what_differs(config: Any, name: str) -> None:
    """Settings that llama.cpp's graph of the architecture has no place for."""
    rope = rope_of(config)["rope_type"]
    found = None
    if rope not in ("default", "linear", "yarn", "llama3", "longrope"):
        found = f"rope_type {rope}"
    elif getattr(config, "use_sliding_window", False):
        found = "use_sliding_window"
    elif config.model_type in ("gemma2", "gemma3_text"):
        # llama.cpp scales queries by the head's width, but in the 27B models by hidden / heads
        large = config.num_hidden_layers == (46 if config.model_type == "gemma2" else 62)
        scalar = config.hidden_size // config.num_attention_heads if large else head_dim_of(config)
        if config.query_pre_attn_scalar != scalar:
            found = f"query_pre_attn_scalar {config.query_pre_attn_scalar}"
    if found:
        raise ModelError(f"{name} uses {found}, which llama.cpp computes otherwise: it cannot be exported to GGUF.")
