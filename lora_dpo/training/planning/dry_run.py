"""Two real optimiser steps on the longest pairs, to know peak memory and speed before a long run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dpo.adapters.folder import attach_adapter
from lora_dpo.config.trl_common import trl_refusals
from lora_dpo.config.trl_dpo import trainer_config
from lora_dpo.data import TokenPair
from lora_dpo.engine.cost_model import PairShape
from lora_dpo.errors import ModelError
from lora_dpo.events import OnEvent, Progress
from lora_dpo.leftovers import scratch
from lora_dpo.model.base import load_recipe_base
from lora_dpo.model.device import out_of_memory, peak_of_process
from lora_dpo.model.lora import attach_lora
from lora_dpo.training.prepared import Run

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel


@dataclass(frozen=True)
class DryRun:
    """What two steps on the longest pairs took. The first scores the references and makes Adam's state."""

    pairs: int
    peak: int
    """Peak bytes: allocated on the GPU; on a CPU, of the whole process, loading included."""
    first_seconds: float
    seconds: float
    """Of the second step, whose references are known."""
    tokens: int | None
    """Stream tokens of the second step; None where TRL's own passes ran."""
    kept_token_bytes: float | None
    """Bytes that a token keeps for its backward pass, as training measured it."""
    checkpointed: int | None
    budget: int | None
    """Most stream tokens at once, as training decided."""
    run_seconds: float | None = None
    """Of the whole run's steps: its FLOPs at the speed of the second step."""


def try_steps(run: Run, shapes: Sequence[PairShape], *, on_event: OnEvent) -> DryRun:
    """Load the model and run two optimiser steps as training would; nothing is kept on disk.

    Args:
        shapes: of the training pairs, in their order.

    Raises:
        ModelError: the model cannot be loaded, or memory runs out at the smallest parts.
    """
    import torch

    longest = sorted(range(len(shapes)), key=lambda index: -shapes[index].stream)[: run.batch]
    pairs = [run.train[index] for index in longest]
    on_event(Progress("loading the model", 0, 1))
    base = load_recipe_base(run.recipe.model)
    on_event(Progress("loading the model", 1, 1))
    adapter = run.recipe.reference_adapter
    if adapter is None:
        model = attach_lora(base.model, run.recipe.lora, seed=run.settings["seed"])
    else:
        model = attach_adapter(base, adapter, trainable=True)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with scratch("plan") as folder:
        try:
            return _train(run, model, pairs, base.dtype, folder, on_event)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not out_of_memory(error):
                raise
            raise ModelError(
                f"Memory ran out on the {len(pairs)} longest pairs. Run lora-dpo plan without --measure: it names "
                "settings that fit."
            ) from error


def _train(
    run: Run, model: PeftModel, pairs: Sequence[TokenPair], dtype: str, folder: Path, on_event: OnEvent
) -> DryRun:
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from lora_dpo.training.dpo_trainer import DPOTrainer

    clock = _make_clock(on_event)
    engine = run.recipe.engine.model_copy(update={"reference_cache": "off"})
    with trl_refusals():
        trainer = DPOTrainer(
            model,
            args=trainer_config(_two_steps(run.settings), output_dir=folder, dtype=dtype),
            train_dataset=_dataset(pairs),
            processing_class=run.tokenizer,
            callbacks=[clock],
            engine=engine,
        )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    clock.trainer = trainer
    try:
        trainer.train()
        budget = trainer.engine.whole_step.budget if trainer.engine else None
    finally:
        trainer.close()
    return DryRun(
        pairs=len(pairs),
        peak=peak_bytes(),
        first_seconds=clock.seconds[0],
        seconds=clock.seconds[1],
        tokens=clock.tokens[1] if budget else None,
        kept_token_bytes=budget.token_bytes if budget else None,
        checkpointed=budget.checkpointed if budget else None,
        budget=budget.tokens if budget else None,
    )


def _two_steps(settings: dict[str, Any]) -> dict[str, Any]:
    """The run's settings, for two steps that save, evaluate and report nothing."""
    off = {"max_steps": 2, "save_strategy": "no", "eval_strategy": "no", "report_to": "none"}
    without = ("load_best_model_at_end", "precompute_ref_log_probs")
    return {**{name: value for name, value in settings.items() if name not in without}, **off}


def _dataset(pairs: Sequence[TokenPair]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_list(
        [{"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected} for pair in pairs]
    )


def _make_clock(on_event: OnEvent) -> Any:
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Seconds and stream tokens of each step."""

        def __init__(self) -> None:
            self.trainer: Any = None
            self.seconds: list[float] = []
            self.tokens: list[int] = []
            self.began = 0.0
            self.before = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            on_event(Progress("trying the longest pairs", state.global_step, 2))
            self.began, self.before = self.now(), self.computed()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seconds.append(self.now() - self.began)
            self.tokens.append(self.computed() - self.before)
            on_event(Progress("trying the longest pairs", state.global_step, 2))

        def computed(self) -> int:
            return int(self.trainer.engine.forward.tokens) if self.trainer.engine else 0

        def now(self) -> float:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return time.perf_counter()

    return Clock()


def peak_bytes() -> int:
    """Most memory so far: allocated on the GPU, or of this process."""
    import torch

    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else peak_of_process()
