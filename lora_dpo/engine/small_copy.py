"""A model's class and configuration at a size that runs in milliseconds, with random weights.

Every kind of layer that the configuration has is in it, with the same flags; only widths, counts and the vocabulary
are small.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch

VOCABULARY = 300
HEAD = 32
"""Width of an attention head, where its rotary frequencies are not written out one by one."""
WINDOW = 8
"""Sliding windows and chunks, in tokens: shorter than the rows of the proof, so that they matter."""
CAP = 2.0
"""Soft caps of scores and logits: near the size of both, so that they matter."""
FLOOR = 16
"""After how many tokens scores are scaled by position (Llama 4, Ministral 3): within the rows of the proof."""

_LARGEST = {
    r"vocab_size": VOCABULARY,
    r"intermediate_size|(^|_)(ffn_dim|ffn_hidden_size|mlp_dim)$": 48,
    r"^(num_experts|num_local_experts|n_routed_experts|num_routed_experts|moe_num_experts)$": 4,
    r"^(num_experts_per_tok(en)?|experts_per_token|moe_k|moe_topk|moe_top_k|top_k_experts)$": 2,
    r"^(n_group|topk_group)$": 1,
    r"(^|_)(q_lora_rank|kv_lora_rank|laurel_rank)$": 16,
    r"^(sliding_window|attention_chunk_size)$": WINDOW,
    r"(^|_)chunk_size$": 16,
    r"^(linear_num_heads|mamba_num_heads)$": 4,
    r"^(linear_head_dim|mamba_head_dim)$": HEAD,
    r"^mamba_d_ssm$": 64,
    r"^(mamba_)?n_groups$": 2,
    r"(^|_)(d_state|state_size)$": 16,
    r"^hidden_size_per_layer_input$": 8,
    r"^floor_scale$": FLOOR,
    r"^(first_k_dense_replace|num_dense_layers|moe_layer_start_index)$": 1,
}
"""What an entry of a configuration may be at most, by a pattern of its name."""
_PERIOD = re.compile(r"(interval|pattern|_period|_freq|_step|every_n_layers)$")
"""Entries that say after how many layers another kind of layer comes."""
_DENSE_FIRST = re.compile(r"^(first_k_dense_replace|num_dense_layers|moe_layer_start_index)$")


def small_config(config: Any) -> Any:
    """A copy of a text configuration with small sizes.

    Args:
        config: a transformers configuration of a decoder.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: its class does not take such sizes.
    """
    given: dict[str, Any] = copy.deepcopy(config.to_dict())
    layers = getattr(config, "num_hidden_layers", 0)
    kept = _kept_layers(given, layers)
    for name in list(given):
        given[name] = _small(name, given[name], layers, kept)
    if "num_hidden_layers" in given:  # where it is not, it is the length of a list
        given["num_hidden_layers"] = kept
    _heads(given, config)
    for name in ("architectures", "quantization_config", "dtype", "torch_dtype", "transformers_version", "auto_map"):
        given.pop(name, None)
    given["tie_word_embeddings"] = False  # the head is frozen, the embeddings are not
    given["use_cache"] = False
    return type(config).from_dict(given)


def small_copy(model: torch.nn.Module, *, seed: int = 0) -> Any:
    """A small random model of the same class in float32 on the CPU, in training mode, its output head frozen.

    Raises:
        Whatever the model's class raises of sizes that it does not take.
    """
    config = small_config(model.config)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # of the CPU alone: `torch.manual_seed` seeds every GPU, too
        small: Any = type(model)(config).float()
        with torch.no_grad():
            for parameter in small.parameters():
                _draw(parameter)
    small.get_output_embeddings().requires_grad_(False)
    return small.train()


def _draw(parameter: torch.Tensor) -> None:
    """Weights at which every part of a layer tells in its output; norms and decays stay near what their class set."""
    if parameter.dim() < 2:
        parameter.add_(0.2 * torch.randn_like(parameter))
    else:
        parameter.normal_(0.0, min(1.0, parameter.shape[-1] ** -0.5))


def _kept_layers(given: Mapping[str, Any], count: int) -> int:
    """How many of `count` layers the copy has: the first ones, until each kind has come."""
    lists = [value for value in given.values() if isinstance(value, list | tuple) and len(value) == count]
    kinds = [repr([values[at] for values in lists]) for at in range(count)]
    periods = [value for name, value in given.items() if _PERIOD.search(name) and isinstance(value, int)]
    need = max(2, *(kinds.index(kind) + 1 for kind in set(kinds)), *(one for one in periods if one <= count))
    need += any(_DENSE_FIRST.search(name) and value for name, value in given.items())
    if given.get("num_kv_shared_layers"):  # each kind of layer with keys of its own, and with those of another
        need *= 2
    return min(count, need)


def _small(name: str, value: Any, layers: int | None, kept: int) -> Any:
    """One entry of a configuration, small.

    Args:
        layers: how many the model has; a list of that length has an item a layer.
        kept: how many of them the copy has.
    """
    if isinstance(value, dict) and value and all(str(key).isdigit() for key in value):  # by the layer's number
        return {key: one for key, one in value.items() if int(key) < kept}
    if isinstance(value, list | tuple) and len(value) == layers:
        return [_small(name, one, None, kept) for one in value[:kept]]
    if name.endswith("token_id"):
        return _token(value)
    if isinstance(value, dict) and "llama_4_scaling_beta" in value:
        return {**value, "original_max_position_embeddings": FLOOR}
    if "softcap" in name and isinstance(value, float):
        return min(value, CAP)
    if name.endswith(("dropout", "_pdrop")):  # draws of their own for each token: not the same twice
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if name == "num_kv_shared_layers":
        return min(value, kept // 2)
    largest = [most for pattern, most in _LARGEST.items() if re.search(pattern, name)]
    return min([value, *largest])


def _token(value: Any) -> Any:
    if isinstance(value, list):
        return [_token(one) for one in value]
    return min(value, VOCABULARY - 1) if isinstance(value, int) else value


def _heads(given: dict[str, Any], config: Any) -> None:
    """Few heads, as many queries a key head as before (at most two), and a hidden size that they make."""
    heads, keys = given.get("num_attention_heads"), given.get("num_key_value_heads")
    if not isinstance(heads, int):
        return
    width = int(given.get("head_dim") or config.hidden_size // heads)
    if not _has_list(given.get("rope_parameters")) and "qk_rope_head_dim" not in given:
        width = min(width, HEAD)  # where queries have a rotary part of their own, that is the width
    if given.get("head_dim"):
        given["head_dim"] = width
    if heads > 2:
        given["num_attention_heads"] = 4 if isinstance(keys, int) and keys < heads else 2
    if isinstance(keys, int):
        given["num_key_value_heads"] = min(keys, 2)
    given["hidden_size"] = given["num_attention_heads"] * width
    _linear_heads(given)


def _linear_heads(given: dict[str, Any]) -> None:
    """The heads of linear attention and of Mamba layers."""
    keys, values = given.get("linear_num_key_heads"), given.get("linear_num_value_heads")
    if isinstance(keys, int) and isinstance(values, int):
        given["linear_num_key_heads"] = 2
        given["linear_num_value_heads"] = 2 * min(2, max(1, values // keys))
        for name in ("linear_key_head_dim", "linear_value_head_dim"):
            given[name] = min(given[name], HEAD)
    width = given.get("mamba_d_head")
    if isinstance(given.get("mamba_n_heads"), int) and isinstance(width, int):
        inner = given.get("mamba_d_ssm") or given.get("mamba_expand", 2) * given["hidden_size"]
        given["mamba_n_heads"] = max(1, int(inner) // width)


def _has_list(value: Any) -> bool:
    """Whether rotary frequencies are written out, for heads of one width."""
    return isinstance(value, list) or (isinstance(value, dict) and any(map(_has_list, value.values())))
