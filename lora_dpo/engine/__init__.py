"""Exact DPO passes: each pair's prompt once, nothing padded, references kept, a step as one batch.

layout            pairs to one flat stream of tokens in which both answers share their prompt
attention         attention over that stream, without a mask over the whole of it
logprobs          hidden states of the stream to per-token log-probabilities
rematerialise     cheap results are made again in the backward pass
trunk_cache       layers below the lowest adapted one run once for policy and reference
pair_batch        a step's pairs: TRL's padded batch, and its rows without the padding
pair_forward      a transformers model on a stream of pairs, and when that cannot be done
scoring           log-probabilities of both answers of each pair, outside training
objective         what the engine asks of who trains with it
preference_loss   DPO's own loss, to read and for the check at step 0; what trains is TRL's
reference_cache   the reference's log-probabilities on disk
token_budget      how much of a step fits into memory at once
first_sight       pairs counted when they are scored before they are learnt from
step_record       a step as it was run: its pairs, and the policy's log-probabilities of them
whole_step        one optimiser step over its whole batch
engine            all of it, bound to one trainer
cost_model        bytes and FLOPs of a step, from the architecture alone
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_dpo.engine.engine import Engine
    from lora_dpo.engine.layout import Layout, lay_out
    from lora_dpo.engine.pair_forward import PairForward, unsupported_reason
    from lora_dpo.engine.scoring import score_pairs

__all__ = [
    "Engine",
    "Layout",
    "PairForward",
    "lay_out",
    "score_pairs",
    "unsupported_reason",
]

_MODULES = {"Engine": "engine", "Layout": "layout", "lay_out": "layout", "score_pairs": "scoring"}


def __getattr__(name: str) -> Any:
    """The engine is torch through and through: a module is imported when one of its names is first looked up."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"lora_dpo.engine.{_MODULES.get(name, 'pair_forward')}"), name)
