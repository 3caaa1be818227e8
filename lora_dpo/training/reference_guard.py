"""Step 0: is the policy still what it is held to?

For the sigmoid loss policy = reference means loss = ln 2 (Rafailov et al. 2023, eq. 7 at h = 0).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig

from lora_dpo.engine.pair_forward import DIFFERENCE, largest_difference
from lora_dpo.engine.preference_loss import preference_loss
from lora_dpo.errors import ReferenceMismatch
from lora_dpo.model.base import steady
from lora_dpo.model.lora import REFERENCE, base_of
from lora_dpo.training.engine_fallback import TOLERANCE

if TYPE_CHECKING:
    import trl

CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "eva")
"""How the values of `init_lora_weights` begin that put a part of the base, or of the data, into a fresh adapter."""


def half_precision(trainer: trl.DPOTrainer) -> bool:
    """Whether a trainer's products are rounded to 16 bits, so that another packing gives other digits."""
    return bool(trainer.args.bf16 or trainer.args.fp16 or largest_difference(base_of(trainer.model)) > DIFFERENCE)


def compare(trainer: trl.DPOTrainer, batch: dict[str, Any]) -> float:
    """Score a batch with policy and reference, and judge the difference (`judge`)."""
    with steady(trainer.model) if trainer.engine is not None else _evaluating(trainer.model):
        ref_model, trainer.ref_model = trainer.ref_model, trainer.model
        try:
            # A given ref_model is scored as it is, adapters on: here it is the policy itself.
            policy_B = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch)).float()
        finally:
            trainer.ref_model = ref_model
        if trainer.precompute_ref_logps and "ref_chosen_logps" in batch:
            reference_B = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
        elif trainer.engine is not None:
            score = trainer.engine.with_fresh_reference if half_precision(trainer) else trainer.engine.with_reference
            batch = score(batch)
            reference_B = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
        else:
            reference_B = torch.cat(trainer.compute_ref_log_probs(ref_model or trainer.model, batch))
    return judge(trainer, policy_B - reference_B.to(policy_B), batch["completion_mask"])


def judge(trainer: trl.DPOTrainer, logratio_B: torch.Tensor, mask_BT: torch.Tensor) -> float:
    """The largest mean |log-ratio| per answer token, in nats.

    Args:
        logratio_B: the chosen answers' log-ratios, then the rejected ones'.
        mask_BT: 1 on answer tokens.

    Raises:
        ReferenceMismatch: it is larger than rounding can explain.
    """
    tokens_B = mask_BT[:, 1:].sum(dim=1).clamp(min=1)
    difference = float((logratio_B.abs() / tokens_B).max())
    compute = torch.bfloat16 if half_precision(trainer) else trainer.model.dtype
    if difference <= TOLERANCE.get(compute, max(TOLERANCE.values())):  # weights in 8 bits compute in 16
        return difference
    loss = float(preference_loss(*logratio_B.chunk(2), beta=trainer.beta)[0].mean())
    raise ReferenceMismatch(
        f"At step 0 the policy is not the reference: their log-probabilities differ by {difference:.3g} a token "
        f"(sigmoid loss {loss:.4f}, it must be ln 2 = {math.log(2):.4f}). {_cause(trainer)} "
        "If the difference is meant, set trainer.reference_guard = False."
    )


def _cause(trainer: trl.DPOTrainer) -> str:
    if trainer.ref_model is not None:
        return (
            "The ref_model is another model than the one being trained: leave it out, so that the starting "
            "policy is the reference."
        )
    if trainer.precompute_ref_logps and "ref_chosen_logps" in (trainer.train_dataset.column_names or ()):
        return (
            "The stored reference log-probabilities (ref_chosen_logps) belong to another model or to other "
            "tokens: compute them again."
        )
    adapters: dict[str, Any] = getattr(trainer.model, "peft_config", {})
    if REFERENCE in adapters:
        return "The adapter changed after its frozen copy 'ref' was taken: load the adapter again."
    for adapter in adapters.values():
        if not isinstance(adapter, LoraConfig):
            return (
                f"With {type(adapter).__name__} the model may answer otherwise before it is trained: the policy then "
                "starts elsewhere than the base. Use LoRA."
            )
        start = str(adapter.init_lora_weights).lower()
        if start.startswith(CHANGES_THE_BASE) or start == "false":
            return (
                f"init_lora_weights={adapter.init_lora_weights!r} starts an adapter that is not zero, so the base with "
                "the adapter off is not what training starts from. Leave init_lora_weights at its default."
            )
    return (
        "The adapter is already trained, but the reference is the bare base: to continue from it, name it as "
        "the reference (reference: adapter:PATH), or start from a fresh adapter."
    )


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
