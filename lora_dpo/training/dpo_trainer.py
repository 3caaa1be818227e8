"""`DPOTrainer`: TRL's, with fp32 adapter masters, precision that fits the hardware, a reference guard.

The constructor is TRL's, so a TRL script changes one import. Longer than 400 lines: one class, and each of its methods
is where TRL does something else.
"""

from __future__ import annotations

import contextlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import trl
from datasets import Dataset
from peft import PeftModel

from lora_dpo.config.recipe import EngineSection
from lora_dpo.engine.engine import Engine
from lora_dpo.errors import ConfigError
from lora_dpo.model.base import keep_packed_weights_differentiable
from lora_dpo.model.device import give_back_memory, pick_device, pick_dtype
from lora_dpo.model.lora import base_of, drop_idle_copy, frozen_name, to_fp32_masters
from lora_dpo.model.visiting import visiting_of
from lora_dpo.training.engine_fallback import no_engine_because, refuse_whole_weights, unsupported_batch
from lora_dpo.training.pair_weights import ScaledGradient, WithWeights
from lora_dpo.training.reference_guard import compare
from lora_dpo.training.score_ahead import progress_bar, scored_references

if TYPE_CHECKING:
    from datasets import DatasetDict, IterableDataset, IterableDatasetDict
    from peft import PeftConfig
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import (
        BitsAndBytesConfig,
        EvalPrediction,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
        TrainerCallback,
    )
    from trl import DPOConfig

logger = logging.getLogger(__name__)

LOGGED = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")
"""What is computed for steps that are logged only."""


class DPOTrainer(trl.DPOTrainer):
    """A `trl.DPOTrainer` with the same constructor, settings, losses and logged metrics.

    What differs:

    - Each pair's common prefix is computed once and nothing is padded (`lora_dpo.engine`). With
      LoRA dropout both branches then share one draw over their prefix.
    - An optimiser step is one batch: all its pairs (`gradient_accumulation_steps` batches of them) are packed
      into parts by tokens, with the gradient of the whole (`lora_dpo.engine.whole_step`).
    - The reference is scored once a pair and kept on disk (`lora_dpo.engine.reference_cache`).
    - `gradient_checkpointing=True`, TRL's default, means: where the step would not fit without it.
    - Entropy, mean logits and token accuracy are computed on steps that are logged, not averaged over those between.
    - Adapter weights are float32 masters also on a 4-bit base, where TRL casts them to bf16 and Adam's
      small updates round to zero. An adapter that training continues from keeps its exact values.
    - bf16 autocast (TRL's default) is switched off where it is slow: without a GPU, or on one before Ampere.
    - Before the first step policy and reference must agree on real pairs (for the sigmoid loss: loss
      = ln 2, Rafailov et al. 2023, eq. 7 at h = 0), else `ReferenceMismatch` says which is wrong.

    Where a set-up, a data collator or a model cannot be run so, TRL's own passes run, and a warning says why: the
    settings are looked at when the trainer is made, each batch's form when it comes, and before the first step two
    pairs are run both ways and compared (`lora_dpo.training.engine_fallback`).

    Set `reference_guard = False` on the class or instance to train against a reference that is meant
    to differ from the starting policy.

    Args:
        engine: how steps are computed; the defaults measure and decide (`lora_dpo.EngineSection`).
        pair_weights: scale each pair's gradient by the number in the data's column `pair_weight`.

    Raises:
        ConfigError: `engine.fallback` is false, or pairs are weighted, and TRL's own passes would have to run.
        ModelError: the model's 4-bit weights were repacked for inference, where they have no gradient.
    """

    reference_guard: bool = True
    ref_model: Any
    eval_dataset: Any
    accelerator: Any
    loss_weights: list[float]
    precompute_ref_logps: bool
    _metrics: dict[str, Any]
    _total_train_tokens: int

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: DPOConfig | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: (
            Dataset | IterableDataset | DatasetDict | IterableDatasetDict | dict[str, Dataset | IterableDataset] | None
        ) = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        *,
        engine: EngineSection | None = None,
        pair_weights: bool = False,
    ) -> None:
        for each in (model, ref_model):
            if isinstance(each, torch.nn.Module):
                keep_packed_weights_differentiable(each)
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            cuda = torch.cuda.is_available()
            args = trl.DPOConfig(f"{name.rpartition('/')[2]}-DPO", bf16=cuda, use_cpu=pick_device().type == "cpu")
        fast = pick_dtype("auto", pick_device())
        if args.bf16 and fast != "bfloat16":
            logger.info("bf16 is slow on this machine: training with %s instead.", fast)
            args.bf16, args.fp16 = False, fast == "float16"
            args.mixed_precision = "fp16" if args.fp16 else "no"
        self.engine: Engine | None = None
        self.pair_weights = pair_weights
        self._precompute: list[tuple[str, bool, Any, int]] = []
        self._constructing = True
        self._compared = False
        self._given_references = False
        settings = engine or EngineSection()
        self._fallback = settings.fallback
        exact = _trainable_values(model) if isinstance(model, PeftModel) else {}
        super().__init__(
            model,
            ref_model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            compute_metrics,
            callbacks,
            optimizers,
            quantization_config,
            peft_config,
        )
        keep_packed_weights_differentiable(self.model)  # of a model that was named
        _name_experts(self.model)
        self._sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if isinstance(self.model, PeftModel) and not self._sharded:
            to_fp32_masters(self.model)
            self._restore(exact)
            drop_idle_copy(self.model)
        if pair_weights:
            self.data_collator: Any = WithWeights(self.data_collator)
        reason = no_engine_because(self, DPOTrainer)
        if reason is None:
            refuse_whole_weights(self.model)
            self.engine = Engine(self, settings)
        else:
            self._step_aside(reason)
        self._score_ahead()

    def _step_aside(self, reason: str) -> None:
        """From now on TRL's own passes run."""
        if not self._fallback:
            raise ConfigError(f"engine.fallback is false, but {reason}. Set it to true to train with TRL's own passes.")
        if self.pair_weights:
            raise ConfigError(f"Pairs cannot be weighted here: {reason}. Remove the pair_weight (data.pair_weight).")
        if visiting_of(base_of(self.model)) is not None:
            raise ConfigError(
                f"The base's weights visit the device (model.stream), which is not for TRL's own passes, but {reason}. "
                "Set model.stream to off."
            )
        logger.warning("Training with TRL's own forward pass (slower, the same result): %s.", reason)
        if self.engine is not None:
            self.engine.close()
            self.engine = None
            if self.args.gradient_checkpointing:  # the engine had switched off what it did not need
                self.model.gradient_checkpointing_enable(self.args.gradient_checkpointing_kwargs)

    def _fits(self, inputs: dict[str, Any]) -> bool:
        """Whether the engine runs a batch; if not, it steps aside for good.

        Looks at the batch's form, and the first time at what the engine makes of it (`Engine.difference`).
        """
        if self.engine is None:
            return False
        reason = unsupported_batch(inputs, weighted=self.pair_weights)
        if self.args.world_size > 1:
            if self._compared and reason:  # one process cannot step aside alone
                raise ConfigError(f"The engine cannot run a later batch, because {reason}. Use another data collator.")
            if not self._compared:
                odd = torch.tensor([reason is not None], device=self.args.device)
                if self.accelerator.gather(odd).any():
                    reason = reason or "another process has a batch of another form"
        if reason is None and not self._compared:
            reason = self.engine.difference(inputs)
        self._compared = True
        if reason is not None:
            self._step_aside(reason)
        return self.engine is not None

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.pair_weights and "pair_weight" not in self._signature_columns:
            self._signature_columns.append("pair_weight")

    def close(self) -> None:
        """Give the model back the forward pass that it had before this trainer's shared-prefix one."""
        # accelerate wraps the model's forward in autocast for good: an evaluation after training would
        # run under other numerics than the one before it.
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        if self.engine is not None:
            self.engine.close()
            self.engine = None

    def _restore(self, exact: dict[str, torch.Tensor]) -> None:
        """Undo TRL's bf16 rounding of an adapter that was handed in, in the policy and its frozen copy."""
        parameters = dict(self.model.named_parameters())
        for name, value in exact.items():
            parameters[name].data = value.to(parameters[name].device)
            copy = parameters.get(frozen_name(name))
            if copy is not None and frozen_name(name) != name:
                copy.data = value.to(copy.device, copy=True)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        if {"prompt_ids", "chosen_ids", "rejected_ids"} <= _columns(dataset):
            return dataset  # already token ids
        return super()._prepare_dataset(dataset, *args, **kwargs)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        keep_packed_weights_differentiable(self.model)  # before its first pass
        self._given_references |= "ref_chosen_logps" in _columns(dataset)
        ours = isinstance(self.model, PeftModel) and self.ref_model is None and isinstance(dataset, Dataset)
        if ours and self._constructing:  # TRL's constructor asks for it before it is known whether the engine runs
            self._precompute.append((name, dataset is self.train_dataset, dataset, batch_size))
            return dataset
        if ours and self.engine is not None:
            return dataset  # scored as they come
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _score_ahead(self) -> None:
        """What TRL's constructor asked for: columns of the data, from the cache or by TRL's own passes."""
        self._constructing = False
        asked, self._precompute = self._precompute, []
        for name, is_train, dataset, batch_size in asked:
            if "ref_chosen_logps" in _columns(dataset):
                continue  # the data's own, as TRL's collator reads them
            if self.engine is not None and self._fits(self._few(dataset, 2)):
                with progress_bar(f"Reference log-probabilities of the {name} data", len(dataset)) as show:
                    chosen, rejected = zip(*self.score_references(dataset, show), strict=True)
                scored = dataset.add_column("ref_chosen_logps", list(chosen))
                scored = scored.add_column("ref_rejected_logps", list(rejected))
            else:
                scored = super()._precompute_ref_logps(dataset, name, batch_size)
            if is_train:
                self.train_dataset = scored
            elif isinstance(self.eval_dataset, dict):
                self.eval_dataset[name] = scored
            else:
                self.eval_dataset = scored

    def _few(self, dataset: Any, count: int) -> dict[str, Any]:
        """The first pairs of a dataset as a batch on the device."""
        rows = [dataset[index] for index in range(min(count, len(dataset)))]
        batch: dict[str, Any] = self._prepare_inputs(self.data_collator(rows))
        return batch

    def score_references(self, dataset: Any, on_pair: Callable[[int], None] | None = None) -> list[tuple[float, float]]:
        """Score every pair of a dataset of token ids with the reference, ahead of training, into the cache.

        Several processes share the work where they share a cache on the disk.

        Args:
            on_pair: called with the number of pairs done so far.

        Returns:
            The log-probabilities of each row's chosen and rejected answer, in nats.

        Raises:
            ConfigError: this model trains with TRL's own passes.
        """
        if self.engine is None:
            raise ConfigError("The references cannot be scored ahead: this model trains with TRL's own passes.")
        return scored_references(self, self.engine, dataset, on_pair)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """TRL's step; with the engine, the last batch of an optimiser step runs all its batches as one."""
        if self.engine is None:
            step: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
            return step
        inputs, gathered = self._prepare_inputs(inputs), self.engine.gathered
        if not self._fits(inputs):
            trls = super().training_step
            return torch.stack([trls(model, each, num_items_in_batch) for each in (*gathered, inputs)]).sum()
        gathered.append(inputs)
        if len(gathered) < self.current_gradient_accumulation_steps:
            return torch.zeros((), device=self.args.device)
        model.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free optimizers, as in transformers
            self.optimizer.train()
        loss = self.engine.step(model, logged=self._logs_next_step())
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            give_back_memory()
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss; with the engine, the reference comes from the cache."""
        if self._fits(inputs):
            inputs = {name: value for name, value in inputs.items() if name != "pair_weight"}  # not for the model
            inputs = self.engine.with_reference(inputs)  # type: ignore[union-attr]
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        if self.engine is None:
            return super()._compute_loss(model, inputs, return_outputs)
        asked, self.precompute_ref_logps = self.precompute_ref_logps, True  # the engine's batches have their reference
        try:
            result = super()._compute_loss(model, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = asked
        if not (self._given_references or self.engine.moved):
            # All pairs are ties, which TRL counts as wrong; here rounding would toss a coin for each.
            self._metrics["train" if self.model.training else "eval"]["rewards/accuracies"][-1] = 0.0
        return result

    def loss_of(self, output: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """TRL's loss, with its metrics, of per-token tables that are there already.

        Args:
            output: TRL's `FusedCausalLMOutput`, tables `[R, T-1]`.
            inputs: the batch that the tables belong to, with the reference's log-probabilities. A `pair_weight`
                `[B]` in it scales each pair's gradient; the loss's value stays TRL's.
        """
        if "pair_weight" in inputs:
            weight_R1 = inputs["pair_weight"].repeat(2)[:, None]
            scaled = ScaledGradient.apply(output.log_probs, weight_R1)  # type: ignore[no-untyped-call]
            output = type(output)(**{**output, "log_probs": scaled})
        loss: torch.Tensor = self._compute_loss(lambda **_: output, inputs, False)
        if self.engine is not None and not self.engine.forward.logged:
            for name in LOGGED:
                self._metrics["train"].pop(name, None)  # made of zeros
        return loss

    @contextlib.contextmanager
    def unlogged(self, *, sft_factor: float = 1.0) -> Iterator[None]:
        """TRL's loss of a part of a batch: no metrics, no exchange with other processes, the sft term rescaled."""
        before = {name: getattr(self, name) for name in _OF_THE_WHOLE_BATCH}
        self._metrics = {mode: defaultdict(list) for mode in self._metrics}
        self.accelerator = _Alone(self.accelerator.device)
        pairs = zip(self.loss_types, self.loss_weights, strict=True)
        self.loss_weights = [weight * sft_factor if name == "sft" else weight for name, weight in pairs]
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)

    @property
    def pad_id(self) -> int:
        """The token id that TRL's batches are padded with."""
        padding: int = self._tokenizer.pad_token_id
        return padding

    def snapshot(self) -> Callable[[], None]:
        """Note what a step adds to the log; the call of the result takes back what was added since."""
        metrics = {mode: {name: list(v) for name, v in values.items()} for mode, values in self._metrics.items()}
        seen = self._total_train_tokens

        def undo() -> None:
            for mode, values in metrics.items():
                self._metrics[mode].clear()
                self._metrics[mode].update({name: list(v) for name, v in values.items()})
            self._total_train_tokens = seen

        return undo

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """TRL's log, with what was predicted of prompts seen for the first time (`lora_dpo.evaluation.prequential`)."""
        if self.engine is not None and self.model.training:
            logs.update(self.engine.first_sight.take())
            if self._metrics["train"] and "entropy" not in self._metrics["train"]:
                self._fill_in_logged(self.engine)
        super().log(logs, *args, **kwargs)

    def _fill_in_logged(self, engine: Engine) -> None:
        """For a row that nobody announced (a callback's, the last one): what is logged, of the last step's batch."""
        batch = engine.last.batch
        with self._metrics_apart() as metrics, torch.no_grad():
            self.loss_of(engine.tables(batch), batch.inputs)
        self._metrics["train"].update({name: metrics["train"][name] for name in LOGGED})

    @contextlib.contextmanager
    def _metrics_apart(self) -> Iterator[dict[str, Any]]:
        before = self._metrics, self._total_train_tokens
        self._metrics = {mode: defaultdict(list) for mode in self._metrics}
        try:
            yield self._metrics
        finally:
            self._metrics, self._total_train_tokens = before

    def _save_rng_state(self, output_dir: str) -> None:
        # Here and not in a callback: whatever a checkpoint needs is in it before it counts as one.
        super()._save_rng_state(output_dir)
        if self.engine is not None and self.args.should_save:
            self.engine.first_sight.save(Path(output_dir))
            self.engine.margins.save(Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        if self.engine is not None:
            self.engine.first_sight.load(Path(resume_from_checkpoint))
            self.engine.margins.load(Path(resume_from_checkpoint))

    def _logs_next_step(self) -> bool:
        if self.args.logging_strategy != "steps":
            return bool(self.args.logging_strategy == "epoch")  # at the end of one, whose last step is not known here
        step = self.state.global_step + 1
        first = step == 1 and self.args.logging_first_step
        return bool(first or step % max(1, self.state.logging_steps) == 0 or step >= self.state.max_steps)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """TRL's `train`, after the reference guard. A resumed policy is trained already: not checked."""
        if self.engine is not None:
            self.engine.gathered.clear()
            reason = no_engine_because(self, DPOTrainer)  # again: what was done to the trainer since it was made
            if reason is not None:
                self._step_aside(reason)
        if self.reference_guard and not resume_from_checkpoint and self.state.global_step == 0:
            self.check_reference()
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if self.engine is not None:
                self.engine.forward.rest()

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
        batch = self._few(self.train_dataset, pairs)
        self._fits(batch)
        batch.pop("pair_weight", None)  # TRL would hand it to the model
        return compare(self, batch)


def _name_experts(model: Any) -> None:
    """Let TRL find the number of experts, which it reads off the config for the router loss.

    TRL 1.16 asks for `num_experts` and fails where the config has another word: Granite's mixtures, Llama 4, GLM.
    """
    config = base_of(model).config.get_text_config()
    for name in ("num_local_experts", "n_routed_experts"):
        if not hasattr(config, "num_experts") and hasattr(config, name):
            config.num_experts = getattr(config, name)


def _columns(dataset: Any) -> set[str]:
    return set(getattr(dataset, "column_names", None) or ())


_OF_THE_WHOLE_BATCH = ("_metrics", "_total_train_tokens", "accelerator", "loss_weights")


class _Alone:
    """What TRL's loss asks of its accelerator, for one process: nothing is gathered."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        return value

    gather_for_metrics = gather


def _trainable_values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: parameter.detach().to(torch.float32, copy=True)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
