"""A mixture's experts: weights that are stacked in one parameter, of which each token uses a few."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts")
_USED = ("num_experts_per_tok", "experts_per_token", "top_k_experts", "moe_topk", "moe_k")
"""Names that configs of transformers have for how many there are, and how many of them a token uses."""


def expert_weights(model: Any) -> dict[str, torch.nn.Parameter]:
    """The stacked weights `[experts, ·, ·]` of a model, or of its skeleton, by name; none without experts."""
    return expert_weights_of(model, model.config.get_text_config())


def expert_weights_of(part: Any, config: Any) -> dict[str, torch.nn.Parameter]:
    """Those of a part of a model, such as a layer; `config` is the text model's."""
    count = _first(config, _EXPERTS)
    weights = part.named_parameters()
    return {name: w for name, w in weights if w.dim() == 3 and w.shape[0] == count and ".lora_" not in name}


def short_name(parameter: str) -> str:
    """What a parameter is called in every layer: `mlp.experts.down_proj` of `model.layers.0.mlp.experts.down_proj`."""
    return re.sub(r"^.*\.\d+\.", "", parameter)


def layer_of(parameter: str) -> int | None:
    """The number of the layer that a parameter is in."""
    found = re.search(r"\.(\d+)\.", parameter)
    return int(found[1]) if found else None


def active_share(config: Any) -> float:
    """The share of the experts that a token uses; 1 of a model without experts."""
    text = config.get_text_config()
    count, used = _first(text, _EXPERTS), _first(text, _USED)
    return used / count if count and used else 1.0


def active_parameters(model: Any) -> int:
    """Parameters that a token is computed with: all but those of the experts that it does not use."""
    stacked = sum(weight.numel() for weight in expert_weights(model).values())
    total: int = sum(weight.numel() for weight in model.parameters())
    return round(total - stacked * (1 - active_share(model.config)))


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int) and value > 0), None)
