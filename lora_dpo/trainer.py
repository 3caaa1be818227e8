"""`DPOTrainer`: TRL's, with fp32 adapter masters, precision that fits the hardware, a reference guard.

The constructor is TRL's, so a TRL script changes one import.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import PeftModel

from lora_dpo.errors import ReferenceMismatch
from lora_dpo.model import POLICY, REFERENCE, bare, pick_device, pick_dtype, to_fp32_masters
from lora_dpo.shared_prefix import PairForward, unsupported_reason

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Largest mean |log-ratio| per answer token at step 0 that still counts as equal, by compute dtype."""


class DPOTrainer(trl.DPOTrainer):
    """A `trl.DPOTrainer` with the same constructor, settings, losses and logged metrics.

    Four things differ:

    - Each pair's common prefix is computed once and nothing is padded (`lora_dpo.shared_prefix`). With
      LoRA dropout both branches then share one draw over their prefix.

    - Adapter weights are float32 masters also on a 4-bit base, where TRL casts them to bf16 and Adam's
      small updates round to zero. An adapter that training continues from keeps its exact values.
    - bf16 autocast (TRL's default) is switched off where it is slow: without a GPU, or on one before Ampere.
    - Before the first step policy and reference must agree on real pairs (for the sigmoid loss: loss
      = ln 2, Rafailov et al. 2023, eq. 7 at h = 0), else `ReferenceMismatch` says which is wrong.

    Set `reference_guard = False` on the class or instance to train against a reference that is meant
    to differ from the starting policy.
    """

    reference_guard: bool = True
    ref_model: Any

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, *rest: Any, **kwargs: Any) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            cuda = torch.cuda.is_available()
            args = trl.DPOConfig(f"{name.rpartition('/')[2]}-DPO", bf16=cuda, use_cpu=not cuda)
        fast = pick_dtype("auto", pick_device())
        if args.bf16 and fast != "bfloat16":
            logger.info("bf16 is slow on this machine: training with %s instead.", fast)
            args.bf16, args.fp16 = False, fast == "float16"
            args.mixed_precision = "fp16" if args.fp16 else "no"
        exact = _trainable_values(model) if isinstance(model, PeftModel) else {}
        super().__init__(model, ref_model, args, *rest, **kwargs)
        self._sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if isinstance(self.model, PeftModel) and not self._sharded:
            to_fp32_masters(self.model)
            self._restore(exact)
        self.pair_forward = self._share_prefixes()

    def _share_prefixes(self) -> PairForward | None:
        """Compute each pair's common prefix once and no padding; the numbers stay TRL's."""
        base = bare(self.model)
        reason = "the data holds images" if self._is_vision_dataset else unsupported_reason(base)
        if self.ref_model is not None and reason is None:
            reason = "the reference is a second model"
        if self._sharded:
            reason = "the model is sharded by DeepSpeed or FSDP"
        if reason is not None:
            logger.warning("Training with TRL's own forward pass (slower, the same result): %s.", reason)
            return None
        outputs = ("log_probs", "entropy", "mean_logits", "is_top1")
        return PairForward(base, (*outputs, "log_sum_sq_probs") if self.use_weighting else outputs)

    def close(self) -> None:
        """Give the model back the forward pass that it had before this trainer's shared-prefix one."""
        # accelerate wraps the model's forward in autocast for good: an evaluation after training would
        # run under other numerics than the one before it.
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        if self.pair_forward is not None:
            self.pair_forward.close()
            self.pair_forward = None

    def _restore(self, exact: dict[str, torch.Tensor]) -> None:
        """Undo TRL's bf16 rounding of an adapter that was handed in, in the policy and its frozen copy."""
        parameters = dict(self.model.named_parameters())
        for name, value in exact.items():
            parameters[name].data = value.to(parameters[name].device)
            copy = parameters.get(name.replace(f".{POLICY}.", f".{REFERENCE}."))
            if copy is not None and f".{POLICY}." in name:
                copy.data = value.to(copy.device, copy=True)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        columns = set(getattr(dataset, "column_names", None) or ())
        if {"prompt_ids", "chosen_ids", "rejected_ids"} <= columns:
            return dataset  # already token ids
        return super()._prepare_dataset(dataset, *args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """TRL's `train`, after the reference guard. A resumed policy is trained already: not checked."""
        if self.reference_guard and not resume_from_checkpoint and self.state.global_step == 0:
            self.check_reference()
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if self.pair_forward is not None:
                self.pair_forward.rest()

    def check_reference(self, pairs: int = 2) -> float:
        """Score a few training pairs with policy and reference.

        Returns:
            The largest mean |log-ratio| per answer token, in nats. 0.0 for a stream, which is not read.

        Raises:
            ReferenceMismatch: it is larger than rounding can explain.
        """
        if not isinstance(self.train_dataset, Dataset) or self._sharded:
            logger.warning("Policy and reference were not compared: the data is a stream, or the model is sharded.")
            return 0.0
        rows = [self.train_dataset[index] for index in range(min(pairs, len(self.train_dataset)))]
        batch = self._prepare_inputs(self.data_collator(rows))
        was_training = self.model.training
        self.model.eval()
        ref_model, self.ref_model = self.ref_model, self.model
        try:
            # A given ref_model is scored as it is, adapters on: here it is the policy itself.
            policy_B = torch.cat(self.compute_ref_log_probs(self.model, batch)).float()
            self.ref_model = ref_model
            if "ref_chosen_logps" in batch:
                reference_B = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
            else:
                reference_B = torch.cat(self.compute_ref_log_probs(ref_model or self.model, batch))
        finally:
            self.ref_model = ref_model
            self.model.train(was_training)
        return self._judge(policy_B - reference_B.to(policy_B), batch["completion_mask"])

    def _judge(self, logratio_B: torch.Tensor, mask_BT: torch.Tensor) -> float:
        """`logratio_B` holds the chosen answers' log-ratios, then the rejected ones'."""
        tokens_B = mask_BT[:, 1:].sum(dim=1).clamp(min=1)
        difference = float((logratio_B.abs() / tokens_B).max())
        compute = torch.bfloat16 if self.args.bf16 or self.args.fp16 else self.model.dtype
        if difference <= TOLERANCE.get(compute, 1e-2):
            return difference
        chosen, rejected = logratio_B.chunk(2)
        loss = float(-torch.nn.functional.logsigmoid(self.beta * (chosen - rejected)).mean())
        raise ReferenceMismatch(
            f"At step 0 the policy is not the reference: their log-probabilities differ by {difference:.3g} a token "
            f"(sigmoid loss {loss:.4f}, it must be ln 2 = {math.log(2):.4f}). {self._mismatch_cause()}"
        )

    def _mismatch_cause(self) -> str:
        if self.ref_model is not None:
            return (
                "The ref_model is another model than the one being trained: leave it out, so that the starting "
                "policy is the reference."
            )
        if "ref_chosen_logps" in (self.train_dataset.column_names or ()):
            return (
                "The stored reference log-probabilities (ref_chosen_logps) belong to another model or to other "
                "tokens: compute them again."
            )
        if REFERENCE in getattr(self.model, "peft_config", {}):
            return "The adapter changed after its frozen copy 'ref' was taken: load the adapter again."
        return (
            "The adapter is already trained, but the reference is the bare base: to continue from it, name it as "
            "the reference (reference: adapter:PATH), or start from a fresh adapter."
        )


def _trainable_values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: parameter.detach().to(torch.float32, copy=True)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
