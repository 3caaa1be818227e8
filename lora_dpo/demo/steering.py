"""The run that goes on, steered by whoever looks: paused, stopped, and what came of it."""

from __future__ import annotations

from lora_dpo.demo.session import AppState, Training


def trained_last(app_state: AppState) -> str | None:
    """The adapter of the last run that was finished here."""
    now = app_state.training
    return now.job.name if now is not None and has_adapter(now) else None


def has_adapter(training: Training) -> bool:
    """Whether a run is over and made an adapter: a search that found nothing to learn makes none."""
    if training.watch.seen.minutes is not None and training.watch.seen.saved is None:
        return False
    return training.job.state == "done"


def press_pause(app_state: AppState, said: str) -> str:
    """Do what the button said when it was pressed, whatever came since; what it says next."""
    paused = said == "Pause"
    pause(app_state, paused=paused)
    return "Continue" if paused else "Pause"


def pause(app_state: AppState, *, paused: bool) -> None:
    """Pause the run, or let it go on."""
    if app_state.training is not None and app_state.training.job.running:
        (app_state.training.job.pause if paused else app_state.training.job.resume)()


def end(app_state: AppState, *, keep: bool) -> None:
    """Stop the run, with or without its adapter."""
    if app_state.training is not None and app_state.training.job.running:
        app_state.training.job.stop(keep=keep)


def version_of(training: Training) -> tuple[float, int, str]:
    """The same for the same state of the same run."""
    return training.began, training.watch.seen.version, training.job.state
