"""What learns from answers that are there already: DPO on pairs, SFT on the preferred ones; both with this project's
trainers."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from lora_dpo import DPOTrainer, EngineSection
from lora_dpo.config.trl_dpo import trainer_config
from lora_dpo.quiet import quiet_libraries
from lora_dpo.training.sft_kto_trainers import SFTTrainer

from .lab import Answer, Lab
from .maths import smoothed_weights


@dataclass(frozen=True)
class Pair:
    """Two continuations of one opening, as ids."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True)
class DPOSettings:
    """What DPO needs to be told."""

    beta: float
    steps: int
    pairs_per_step: int = 8
    learning_rate: float = 3e-4
    loss: str = "plain"
    """plain, smoothed or robust; the last two expect `noise` of the labels to be wrong."""
    noise: float = 0.0
    seed: int = 0

    def trainer(self) -> dict[str, Any]:
        """As settings of TRL's DPOConfig."""
        losses: dict[str, Any] = {"loss_type": ["sigmoid"], "loss_weights": [1.0]}
        if self.loss != "plain" and self.noise > 0:
            losses = {"loss_type": ["robust"], "loss_weights": [1.0], "label_smoothing": self.noise}
            if self.loss == "smoothed":
                losses |= {"loss_type": ["sigmoid", "robust"], "loss_weights": list(smoothed_weights(self.noise))}
        return {**_common(self.steps, self.pairs_per_step, self.learning_rate, self.seed), "beta": self.beta, **losses}


def train_dpo(
    lab: Lab, pairs: Sequence[Pair], settings: DPOSettings, folder: Path, *, start: Path | None = None
) -> None:
    """Train on pairs and save the adapter; `start` is an adapter to begin with and to be held to, else the base is."""
    opened = lab.fresh(settings.seed) if start is None else lab.saved(start, trainable=True)
    rows = [{"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected} for pair in pairs]
    with opened as model, tempfile.TemporaryDirectory() as work, quiet_libraries():
        trainer = DPOTrainer(
            model,
            args=trainer_config(settings.trainer(), output_dir=Path(work), dtype=lab.base.dtype),
            train_dataset=Dataset.from_list(rows),
            processing_class=lab.base.tokenizer,
            engine=EngineSection(reference_cache="off"),
        )
        _run(trainer)
        model.save_pretrained(str(folder), selected_adapters=["default"])


def train_sft(
    lab: Lab,
    answers: Sequence[tuple[list[int], list[int]]],
    folder: Path,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Train on `(opening, continuation)` ids and save the adapter."""
    rows = [{"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer} for prompt, answer in answers]
    settings = _common(steps, 8, learning_rate, seed)
    with lab.fresh(seed) as model, tempfile.TemporaryDirectory() as work, quiet_libraries():
        trainer = SFTTrainer(
            model,
            args=trainer_config(settings, output_dir=Path(work), dtype=lab.base.dtype, method="sft"),
            train_dataset=Dataset.from_list(rows),
            processing_class=lab.base.tokenizer,
        )
        _run(trainer)
        model.save_pretrained(str(folder), selected_adapters=["default"])


def pairs_of(prompts: Sequence[list[int]], pool: Sequence[Sequence[Answer]], chosen: Sequence[Any]) -> list[Pair]:
    """Pairs as ids: `chosen` holds `(prompt, better, worse)` numbers."""
    return [
        Pair(prompts[number], pool[number][better].tokens, pool[number][worse].tokens)
        for number, better, worse in chosen
    ]


def _common(steps: int, rows: int, learning_rate: float, seed: int) -> dict[str, Any]:
    return {
        "max_steps": steps,
        "per_device_train_batch_size": rows,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": seed,
    }


def _run(trainer: Any) -> None:
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    try:
        trainer.train()
    finally:
        trainer.close()
