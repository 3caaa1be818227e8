"""Weights that transformers renames or stacks when it loads a checkpoint, such as a mixture's experts.

A stacked weight `[experts, out, in]` is stored expert by expert, and its `out` rows may be several matrices:

    mlp.experts.gate_up_proj[e] = [mlp.experts.e.gate_proj.weight; mlp.experts.e.up_proj.weight]
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_dpo.adapters.parameter_lora import Target, expert_update

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Piece:
    """A stored matrix that is a part of a stacked weight."""

    parameter: str
    """The model's name of the stacked weight."""
    expert: int
    part: int
    """Which of the matrices that an expert's rows are made of, from 0."""


def renamed(stored: Collection[str], skeleton: Any) -> tuple[dict[str, str], dict[str, Piece]]:
    """What transformers makes of stored names: another name of the model's, or a piece of a stacked weight.

    Args:
        stored: names in the checkpoint's files.
        skeleton: the model without weights.

    Returns:
        Stored names by the model's own, and pieces by their stored names; of stacked weights only whole ones, whose
        matrices are stacked along their first dimension, and joined along their rows.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    state = skeleton.state_dict()
    names: dict[str, str] = {}
    pieces: dict[str, Piece] = {}
    conversions = get_model_conversion_mapping(skeleton)
    parts: dict[str, int] = {}
    for name in sorted(set(stored) - state.keys()):
        key = name
        for conversion in conversions:
            changed, pattern = conversion.rename_source_key(key)
            if pattern is None:
                continue
            key = changed
            if isinstance(conversion, WeightConverter):
                found = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), name)
                if key in state and found and found.groups() and _stacks(conversion.operations):
                    sources = conversion.source_patterns
                    pieces[name] = Piece(key, int(found[1]), sources.index(pattern))
                    parts[key] = len(sources)
        if key in state and name not in pieces:
            names[key] = name
    count: dict[str, int] = {}
    for piece in pieces.values():
        count[piece.parameter] = count.get(piece.parameter, 0) + 1
    whole = {key for key, found in count.items() if found == state[key].shape[0] * parts[key]}
    return names, {name: piece for name, piece in pieces.items() if piece.parameter in whole}


def _stacks(operations: Any) -> bool:
    """Whether a conversion stacks matrices along a new first dimension, and joins several along the rows."""
    kinds = [(type(one).__name__, getattr(one, "dim", None)) for one in operations]
    return kinds in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])


def merge_piece(
    weight: torch.Tensor, piece: Piece, target: Target, a: torch.Tensor, b: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """One stored matrix of an expert with its rows of s·B[e]·A[e] added; `weight`, in float32, is overwritten."""
    rows = weight.shape[0]
    update = expert_update(target, a, b, piece.expert)
    return weight.add_(update[piece.part * rows : (piece.part + 1) * rows], alpha=scale)


def merge_stacked(
    weight: torch.Tensor, target: Target, a: torch.Tensor, b: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """A weight that is stored stacked, with s·B[e]·A[e] added to each expert; `weight`, in float32, is overwritten."""
    for expert in range(target.experts):
        update = expert_update(target, a, b, expert)
        weight[expert].add_(update.T if target.turned else update, alpha=scale)
    return weight
