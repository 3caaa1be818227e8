"""TRL's SFT and KTO trainers on the one base in memory: float32 adapters, token ids in, and a check of the reference.

Their losses, fields and logged numbers are TRL's own. Rows are padded as TRL pads them: the engine shares the
prefixes of pairs, and here there are none.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import trl
from datasets import Dataset

from lora_dpo.config.trl_common import trl_refusals
from lora_dpo.config.trl_dpo import trainer_config
from lora_dpo.errors import ReferenceMismatch
from lora_dpo.model.lora import drop_idle_copy, frozen_name
from lora_dpo.training.engine_fallback import TOLERANCE

if TYPE_CHECKING:
    from peft import PeftModel

    from lora_dpo.data.answers import TokenAnswer
    from lora_dpo.training.prepared import Run


class _OnOneBase:
    """What both trainers do to an adapter that is on the model already.

    TRL rounds adapters on a 4-bit base to bf16, where Adam's small updates vanish; here they keep their values.
    """

    model: Any
    accelerator: Any

    def __init__(self, model: PeftModel, **arguments: Any) -> None:
        exact = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(model, **arguments)  # type: ignore[call-arg]  # TRL's class is next in line
        parameters = dict(self.model.named_parameters())
        for name, value in exact.items():
            parameters[name].data = value.to(torch.float32)
            copy = parameters.get(frozen_name(name))
            if copy is not None and frozen_name(name) != name:
                copy.data = value.to(torch.float32, copy=True)  # its own memory: the policy moves, it does not
        drop_idle_copy(self.model)

    def close(self) -> None:
        """Take off the autocast that accelerate put around the model's forward pass for good."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)


class SFTTrainer(_OnOneBase, trl.SFTTrainer):
    """`trl.SFTTrainer` for rows of `input_ids` and `labels` (-100 where nothing is learnt)."""


class KTOTrainer(_OnOneBase, trl.KTOTrainer):
    """`trl.KTOTrainer` for rows of `prompt_ids`, `completion_ids` and `label`.

    Before the first step, policy and reference must agree; KTO's loss is then 0.5 (Ethayarajh et al. 2024, eq. 7:
    all log-ratios and the KL estimate are 0, and both weights are 1).
    """

    ref_model: Any
    args: Any
    calculate_KL: bool

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Token ids need one thing only: the answers of other rows, from which TRL estimates the KL term."""
        if not self.calculate_KL:
            return dataset
        size = args.per_device_train_batch_size  # as TRL rotates them: within batches of the training size
        return dataset.map(_rotated, batched=True, batch_size=size)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """TRL's `train`, after the check of the reference; a resumed policy is trained already."""
        if not resume_from_checkpoint:
            self.check_reference()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def check_reference(self, rows: int = 4) -> float:
        """Score a few answers with policy and reference.

        Returns:
            The largest mean |log-ratio| per answer token, in nats.

        Raises:
            ReferenceMismatch: it is larger than rounding can explain.
        """
        few = [self.train_dataset[index] for index in range(min(rows, len(self.train_dataset)))]
        batch = self._prepare_inputs(self.data_collator(few))
        was_training = self.model.training
        self.model.eval()
        try:
            self.ref_model = self.model  # a given ref_model is scored as it is, adapters on: the policy itself
            policy_B, _ = self.compute_ref_log_probs(self.model, batch)
            self.ref_model = None
            reference_B, _ = self.compute_ref_log_probs(self.model, batch)
        finally:
            self.ref_model = None
            self.model.train(was_training)
        tokens_B = batch["completion_mask"][:, 1:].sum(dim=1).clamp(min=1)
        difference = float(((policy_B - reference_B).abs() / tokens_B).max())
        compute = torch.bfloat16 if self.args.bf16 or self.args.fp16 else self.model.dtype
        if difference > TOLERANCE.get(compute, 1e-2):
            raise ReferenceMismatch(
                f"At step 0 the policy is not the reference: their log-probabilities differ by {difference:.3g} a "
                "token, so KTO's loss would not start at 0.5. The adapter changed after its frozen copy was taken: "
                "load the adapter again."
            )
        return difference


def _rotated(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    answers = rows["completion_ids"]
    return {**rows, "KL_completion_ids": [*answers[-1:], *answers[:-1]]}


def answer_trainer(run: Run, model: PeftModel, *, dtype: str, callback: Any) -> SFTTrainer | KTOTrainer:
    """The trainer of an SFT or KTO run, on its adapter."""
    method, settings = run.recipe.method, run.settings
    kind, rows_of = (SFTTrainer, sft_rows) if method == "sft" else (KTOTrainer, kto_rows)
    # KTO reads its rows in order; files are often sorted by prompt or by vote, and a batch needs both
    shuffled = random.Random(settings["seed"]).sample(run.answers, len(run.answers))  # noqa: S311 - no secret
    held_out = Dataset.from_list(rows_of(run.held_out_answers)) if run.held_out_answers else None
    with trl_refusals():
        return kind(
            model,
            args=trainer_config(settings, output_dir=run.partial / "checkpoints", dtype=dtype, method=method),
            train_dataset=Dataset.from_list(rows_of(shuffled)),
            eval_dataset=held_out,
            processing_class=run.tokenizer,
            callbacks=[callback],
        )


def sft_rows(answers: Sequence[TokenAnswer]) -> list[dict[str, list[int]]]:
    """Whole sequences, with labels on the answer alone."""
    return [{"input_ids": one.prompt + one.answer, "labels": [-100] * len(one.prompt) + one.answer} for one in answers]


def kto_rows(answers: Sequence[TokenAnswer]) -> list[dict[str, Any]]:
    """Prompts and answers apart, with the vote."""
    return [{"prompt_ids": one.prompt, "completion_ids": one.answer, "label": one.up} for one in answers]
