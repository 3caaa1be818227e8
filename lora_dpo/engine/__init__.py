"""Exact DPO passes: each pair's prompt once, nothing padded, references kept, a step as one batch.

layout              pairs to one flat stream of tokens in which both answers share their prompt
attention           attention over that stream, without a mask over the whole of it
forked_states       recurrent layers over that stream: each answer from the state that its prompt left
fused_layers        norms and adapters by one autograd function each
products            matrix products whose sums keep their digits
logprobs            hidden states of the stream to per-token log-probabilities
rematerialise       activation recomputation: cheap results are made again in the backward pass
checkpointing       which layers are run again in the backward pass, and where their inputs wait
trunk_cache         hidden states of the frozen layers below the lowest adapted one, kept for policy and reference
segments            each layer on some pairs after the other, so that weights that visit come once
pair_batch          a step's pairs: gradient-accumulation batches as one, and its rows without the padding
pair_forward        a transformers model on a stream of pairs
small_copy          a model's class and configuration at a size that runs in milliseconds
proof               whether a model may run as a stream: its small copy, both ways
rope                how long rows may be to share rotary frequencies
scoring             log-probabilities of both answers of each pair, outside training
objective           the protocol that `DPOTrainer` implements: the model, and the loss of log-probabilities
preference_loss     DPO's own loss, to read and for the check at step 0; what trains is TRL's (`DPOTrainer.loss_of`)
reference_cache     the reference's log-probabilities on disk, by weights and by a pair's token ids
token_budget        how much of a step fits into memory at once
prequential_count   accuracy on each prompt before its first update, counted in a run
pair_margins        each pair's margin before a run had learnt from it, and at last
step_record         a step as it was run: its pairs, and the policy's log-probabilities of them
whole_step          forward and backward of that batch, in as many parts as fit
engine              the entry point (`Engine.step`), bound to one trainer
layer_costs         bytes that a layer keeps a token, from the modules that are in it
cost_model          bytes and FLOPs of a step, from the architecture alone
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_dpo.engine.engine import Engine
    from lora_dpo.engine.layout import Layout, lay_out
    from lora_dpo.engine.pair_forward import PairForward
    from lora_dpo.engine.proof import unsupported_reason
    from lora_dpo.engine.scoring import score_pairs

__all__ = [
    "Engine",
    "Layout",
    "PairForward",
    "lay_out",
    "score_pairs",
    "unsupported_reason",
]

_MODULES = {
    "Engine": "engine",
    "Layout": "layout",
    "lay_out": "layout",
    "PairForward": "pair_forward",
    "score_pairs": "scoring",
    "unsupported_reason": "proof",
}


def __getattr__(name: str) -> Any:
    """The engine is torch through and through: a module is imported when one of its names is first looked up."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"lora_dpo.engine.{_MODULES[name]}"), name)
