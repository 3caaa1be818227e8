"""What is known of a run before any weight is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dpo.adapters.run_folder import partial_of
from lora_dpo.config.recipe import Recipe
from lora_dpo.config.template_kwargs import TemplateKwargs
from lora_dpo.data import Message, PreferencePair, ReadReport, TokenPair
from lora_dpo.data.answers import TokenAnswer
from lora_dpo.data.questions import Question
from lora_dpo.events import OnEvent, Progress, Stopped, StopSignal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Run:
    """Everything that is known before the weights are loaded."""

    recipe: Recipe
    output: Path
    emit: OnEvent
    stop: StopSignal
    tokenizer: PreTrainedTokenizerBase
    settings: dict[str, Any]
    train: list[TokenPair] = field(default_factory=list)
    weights: list[float] | None = None
    """What each training pair's gradient counts; None if all count alike."""
    held_out: list[TokenPair] = field(default_factory=list)
    apart: list[PreferencePair] = field(default_factory=list)
    """What was held out of the training data, as it was read."""
    answers: list[TokenAnswer] = field(default_factory=list)
    """What SFT and KTO train on, in place of `train`."""
    held_out_answers: list[TokenAnswer] = field(default_factory=list)
    prompts: list[tuple[Message, ...]] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    reports: dict[str, ReadReport] = field(default_factory=dict)

    @property
    def partial(self) -> Path:
        """The folder of the unfinished run."""
        return partial_of(self.output)

    @property
    def beta(self) -> float:
        """β of DPO and KTO, TRL's default if the recipe names none; 1 for SFT, whose margins are in plain nats."""
        return 1.0 if self.recipe.method == "sft" else float(self.settings.get("beta", 0.1))

    @property
    def chat_template_kwargs(self) -> TemplateKwargs:
        """Keywords for the chat template."""
        return self.recipe.model.template

    @property
    def examples(self) -> int:
        """Rows that are trained on: pairs, or single answers."""
        return len(self.train) or len(self.answers)

    @property
    def unit(self) -> str:
        """What these rows are called."""
        return "pairs" if self.recipe.method == "dpo" else "answers"

    @property
    def batch(self) -> int:
        """Pairs (or answers) of an optimiser step."""
        return int(self.settings["per_device_train_batch_size"] * self.settings.get("gradient_accumulation_steps", 1))

    @property
    def steps(self) -> int:
        """Optimiser steps of the run."""
        steps = self.settings.get("max_steps", -1)
        size, gathered = self.settings["per_device_train_batch_size"], self.batch
        # dataloader_drop_last leaves out a last batch that is not full
        batches = self.examples // size if self.settings.get("dataloader_drop_last") else ceil(self.examples / size)
        per_epoch = max(1, ceil(batches * size / gathered))
        return int(steps if steps > 0 else ceil(per_epoch * self.settings["num_train_epochs"]))

    def progress(self, stage: str, total: int) -> Callable[[int], None]:
        """A callback for long stages that shows progress and notices a request to stop."""

        def tick(done: int) -> None:
            self.emit(Progress(stage, min(done, total), total))
            if self.stop.requested:
                raise Stopped(self.output, step=0, resumable=False)

        tick(0)
        return tick
