"""How a run is shown while it goes on and at its end: phases by name, time, what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from lora_dpo.demo.html import note, progress_bar, table
from lora_dpo.demo.run_state import RunSnapshot
from lora_dpo.demo.session import Training
from lora_dpo.training.planning.lines import duration

PHASES = ("reading the pairs", "measuring before", "training", "measuring after", "saving")
STAGES = {
    "": (0, "getting ready"),
    "tokenising train pairs": (0, "reading the pairs"),
    "tokenising eval pairs": (0, "reading the held-out pairs"),
    "held-out pairs, reference": (1, "measuring the held-out pairs"),
    "answers before training": (1, "answering the held-out prompts"),
    "answering your prompts": (2, "answering your prompts"),
    "training": (2, "training"),
    "held-out pairs, adapter": (3, "measuring the held-out pairs"),
    "answers after training": (3, "answering the held-out prompts"),
    "saving": (4, "saving"),
}
"""Stages that a run tells of: which phase that is, and what is done there."""
ENDS = {
    "done": ("good", "Done after {took}: {name} can be chosen in every tab."),
    "stopped": ("", "Stopped. Nothing was kept."),
    "failed": ("bad", "It failed: {error} Chats and votes go on."),
}
WRONG = 1.5
"""So many times the planned duration of the steps, and the plan's estimate is taken back."""


def state_view(training: Training, now: float) -> str:
    """Where the run is at the moment `now` (monotonic): phases, a bar and a line."""
    view, state = training.watch.seen, training.job.state
    warnings = "".join(note(warned.text, kind="bad") for warned in view.notes if warned.warning)
    if state in ENDS:
        kind, text = ENDS[state]
        took = clock((training.job.ended or now) - training.began)
        return note(text.format(name=training.job.name, error=training.job.error, took=took), kind=kind) + warnings
    phase, label = STAGES.get(view.stage, (2, view.stage))
    if view.stage == "training":
        done, total = view.step, view.all_steps or view.total
        label = f"step {done} of {total}"
    else:
        done, total = view.done, view.total
        label += f": {done} of {total}" if total > 1 else ""
    words = {"paused": "paused at ", "stopping": "stopping after this step: "}
    parts = [words.get(state, "") + label, f"{clock(now - training.began)} so far"]
    if view.stage == "training" and state == "running":
        parts += time_left(view, now, training.planned)
    return phases(PHASES, phase) + progress_bar(done, total, " · ".join(parts)) + warnings


def time_left(view: RunSnapshot, now: float, planned: float | None) -> list[str]:
    """How long it still takes at the pace of the last steps, and whether the plan was wrong."""
    left, pace = view.seconds_left(now), view.pace
    if pace is None or view.step >= view.all_steps:
        return []
    said = [f"about {duration(left)} left"] if left is not None else ["this step takes long: no estimate"]
    whole = pace * view.all_steps
    if planned and whole > WRONG * planned:
        said.append(f"slower than planned: {duration(whole)} for all steps, not {duration(planned)}")
    return said


def outcome_view(view: RunSnapshot) -> str:
    """What was measured before and after, at the end of a run."""
    parts = []
    if view.compared:
        parts.append("<h4>Held-out pairs, before and after</h4>")
        parts.append(table(("", "before", "after"), view.compared, right=(1, 2)))
    if view.answered:
        parts.append("<h4>Held-out answers, before and after</h4>")
        parts.append(table(("prompt", "before", "after"), view.answered))
    return "".join(parts)


def clock(seconds: float) -> str:
    """`0:42`, `12:05` or `1:02:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def phases(names: Sequence[str], now: int) -> str:
    """The phases of a run, with the one that it is in."""
    marks = ["done" if number < now else "now" if number == now else "" for number in range(len(names))]
    steps = "".join(
        f'<li class="{mark}"{" aria-current=step" if mark == "now" else ""}>{escape(phase)}</li>'
        for phase, mark in zip(names, marks, strict=True)
    )
    return f'<ol class="phases">{steps}</ol>'
