"""The guard as a callback of transformers' Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_dpo.training.guard.training_guard import Guard

TEXT_TRACKERS = ("tensorboard", "wandb", "trackio")
"""Trackers of transformers that take texts beside numbers."""


def add_guard(trainer: Any, guard: Guard, checkpoint: Path | None) -> None:
    """Put the guard before all other callbacks, so that trackers see what it adds to the logs."""
    from transformers import TrainerCallback

    class GuardCallback(TrainerCallback):  # type: ignore[misc]
        """Forwards to the guard, and its decision to the trainer."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            guard.begin(checkpoint, state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_log |= guard.on  # it must not be blind between the steps of trainer.logging_steps
            self._act(guard.after_step(state.global_step, state.max_steps), control, kwargs)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            texts = all(name in TEXT_TRACKERS for name in args.report_to)
            self._act(guard.logged(state.global_step, logs, texts=texts), control, kwargs)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            guard.saved(Path(args.output_dir) / f"checkpoint-{state.global_step}")

        @staticmethod
        def _act(ends: bool, control: Any, kwargs: Mapping[str, Any]) -> None:
            if ends:
                control.should_training_stop = control.should_save = True
            else:
                guard.lower_rate(kwargs["optimizer"], kwargs["lr_scheduler"])

    trainer.callback_handler.callbacks.insert(0, GuardCallback())
