"""The Train tab: pairs and a preset, the plan, then the run as it goes. It trains on the base that answers."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import gradio as gr

from lora_dpo.config.recipe import Recipe
from lora_dpo.demo.handlers import told
from lora_dpo.demo.html import curves, facts, note, progress_bar, samples_table, table
from lora_dpo.demo.pair_store import VOTES
from lora_dpo.demo.session import WATCHED, AppState, Training
from lora_dpo.training.drafting.presets import PRESETS, draft, settings_text, with_settings
from lora_dpo.training.planning.lines import duration, lines, verdict
from lora_dpo.training.planning.make_plan import plan

LOOK_EVERY = 1.5
"""Seconds between two looks at a run."""

State = tuple[Any, ...]
ENDS = {
    "done": ("good", "Done: {name} can be chosen in every tab."),
    "stopped": ("", "Stopped. Nothing was kept."),
    "failed": ("bad", "It failed: {error} Chats and votes go on."),
}


@dataclass(frozen=True)
class Parts:
    """What is on the tab."""

    choices: tuple[gr.CheckboxGroup, gr.Radio, gr.Textbox]
    """Pairs, preset, name."""
    prompts: gr.Textbox
    recipe: gr.Textbox
    look: gr.Button
    start: gr.Button
    planned: gr.HTML
    shown: tuple[gr.HTML, gr.HTML, gr.HTML, gr.Row, gr.Button]
    """State, curves, what was measured and answered, the row of controls, pause."""
    keep: gr.Button
    discard: gr.Button
    left: tuple[gr.Row, gr.Dropdown, gr.Button, gr.Button]
    """The row of interrupted runs: which, go on, discard."""


def build(app_state: AppState) -> tuple[gr.CheckboxGroup, gr.Textbox, gr.Row, gr.Dropdown]:
    """Lay the tab out and connect it; returns what is to be refreshed: pairs, name, and the interrupted runs."""
    parts, tab = _layout(app_state), Tab(app_state)
    seen, filled = gr.State(None), gr.State("")
    private: dict[str, Any] = {"api_visibility": "private"}
    at_once: dict[str, Any] = {"queue": False, **private}
    shown = [*parts.shown, seen]
    plan_out = [parts.recipe, filled, parts.planned, parts.start]
    parts.look.click(tab.show_plan, [*parts.choices, parts.recipe, filled], plan_out, **private)
    given = [*parts.choices, parts.recipe, parts.prompts]
    parts.start.click(tab.begin, given, [parts.start, parts.planned, *shown], **private)
    for control in parts.choices[:2]:
        control.change(_stale, None, [parts.start, parts.recipe, filled], show_progress="hidden", **at_once)
    # Another name, or settings changed by hand: they stay, but what is started is what was planned.
    parts.choices[2].change(_unplanned, None, parts.start, show_progress="hidden", **at_once)
    parts.recipe.input(_unplanned, None, parts.start, show_progress="hidden", **at_once)
    gr.Timer(LOOK_EVERY).tick(tab.follow, seen, shown, show_progress="hidden", **at_once)
    parts.shown[4].click(lambda: toggle(app_state), None, None, **at_once)
    parts.keep.click(lambda: end(app_state, keep=True), None, None, **at_once)
    parts.discard.click(lambda: end(app_state, keep=False), None, None, **at_once)
    row, which, go_on, drop = parts.left
    go_on.click(tab.go_on, [which, parts.prompts], [row, parts.planned, *shown], **private)
    drop.click(tab.drop, which, [row, which], **private)
    return parts.choices[0], parts.choices[2], row, which


def _layout(app_state: AppState) -> Parts:
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            choices = _choices(app_state)
            prompts = gr.Textbox(
                label=f"Prompts to watch, one a line (at most {WATCHED})",
                placeholder="Answered before, during and after the run",
                lines=2,
                max_lines=4,
                max_length=4_000,
                elem_id="train-prompts",
            )
            with gr.Accordion("Settings", open=False):
                recipe = gr.Textbox(
                    show_label=False,
                    lines=12,
                    max_lines=24,
                    max_length=20_000,
                    elem_id="train-recipe",
                    info="Filled in with the plan. What you change here is what is trained.",
                )
            with gr.Row():
                look = gr.Button("Show the plan", elem_id="train-plan", min_width=130)
                start = gr.Button("Start", variant="primary", interactive=False, elem_id="train-start", min_width=130)
        with gr.Column(scale=3, min_width=300):
            first = note("Choose pairs and see the plan: steps, minutes and memory. Then start.")
            left = _interrupted(app_state)
            planned = gr.HTML(first, elem_id="train-planned")
            state = gr.HTML("", elem_id="train-state")
            with gr.Row(visible=False) as controls:
                pause = gr.Button("Pause", size="md", elem_id="train-pause", min_width=100)
                keep = gr.Button("Stop and keep", size="md", elem_id="train-keep", min_width=100)
                discard = gr.Button("Stop, discard", size="md", variant="stop", elem_id="train-discard", min_width=100)
            drawn = gr.HTML("", elem_id="train-curves")
    told_of = gr.HTML("", elem_id="train-samples")
    shown = (state, drawn, told_of, controls, pause)
    return Parts(choices, prompts, recipe, look, start, planned, shown, keep, discard, left)


def _interrupted(app_state: AppState) -> tuple[gr.Row, gr.Dropdown, gr.Button, gr.Button]:
    names = app_state.interrupted()
    with gr.Row(visible=bool(names), elem_classes="bar") as row:
        which = gr.Dropdown(
            names,
            value=names[0] if names else None,
            label="Interrupted runs",
            filterable=False,
            elem_id="train-interrupted",
            scale=3,
        )
        go_on = gr.Button("Go on", size="md", elem_id="train-go-on", scale=1, min_width=90)
        drop = gr.Button("Discard", size="md", variant="stop", elem_id="train-drop", scale=1, min_width=90)
    return row, which, go_on, drop


def _choices(app_state: AppState) -> tuple[gr.CheckboxGroup, gr.Radio, gr.Textbox]:
    names = app_state.pairs.names()
    sources = gr.CheckboxGroup(
        names,
        value=[VOTES] if VOTES in names else names[:1],
        label="Pairs to train on",
        info="Votes and uploads.",
        elem_id="train-pairs",
    )
    presets = [(chosen.label, key) for key, chosen in PRESETS.items()]
    preset = gr.Radio(presets, value="balanced", label="How long", elem_id="train-preset")
    name = gr.Textbox(app_state.free_name(), label="Name of the new adapter", max_length=100, elem_id="train-name")
    return sources, preset, name


class Tab:
    """The tab's handlers."""

    def __init__(self, app_state: AppState) -> None:
        self.app_state = app_state

    @told
    def show_plan(self, chosen: list[str], kind: str, called: str, text: str, was: str) -> State:
        """What a run would do; then it may be started."""
        # Settings that were changed by hand are planned as they are; others follow the preset.
        changed = bool(text.strip()) and text.strip() != was.strip()
        made = drafted(self.app_state, chosen, kind, called, text if changed else "")
        text = settings_text(made)
        return text, text, facts(plan_lines(made)), gr.update(interactive=True)

    @told
    def begin(self, chosen: list[str], kind: str, called: str, text: str, asked: str) -> State:
        """Start the run."""
        made = drafted(self.app_state, chosen, kind, called, text)
        self.app_state.start_training(made, called.strip(), asked.splitlines())
        return gr.update(interactive=False), "", *self.follow(None)

    @told
    def go_on(self, which: str | None, asked: str) -> State:
        """Continue an interrupted run, with the settings it began with."""
        self.app_state.continue_training(which or "", asked.splitlines())
        return gr.update(visible=False), "", *self.follow(None)

    @told
    def drop(self, which: str | None) -> State:
        """Remove what an interrupted run left."""
        self.app_state.discard_training(which or "")
        return interrupted_update(self.app_state.interrupted())

    def follow(self, version: Any) -> State:
        """What changed since `version`, for a page that looks again and again."""
        now = self.app_state.training
        if now is None:
            return (*[gr.skip()] * 5, version)
        # Before what is shown is made: a run that ends meanwhile has another version, and is shown at the next look.
        shown = version_of(now)
        if shown == version:
            return (*[gr.skip()] * 5, version)
        view = now.watch.seen
        return (
            state_view(now),
            curves(view, now.beta) if view.steps else "",
            outcome_view(now) + samples_table(view),
            gr.update(visible=now.job.running),
            gr.update(value="Continue" if now.job.state == "paused" else "Pause"),
            shown,
        )


def interrupted_update(names: list[str]) -> tuple[Any, Any]:
    """The row of interrupted runs, and its choice."""
    return gr.update(visible=bool(names)), gr.update(choices=names, value=names[0] if names else None)


def _unplanned() -> Any:
    """The plan on the page has to be made anew."""
    return gr.update(interactive=False)


def _stale() -> State:
    """Another choice: the plan on the page is not its plan."""
    return gr.update(interactive=False), "", ""


def drafted(app_state: AppState, chosen: list[str], preset: str, called: str, text: str = "") -> Recipe:
    """The recipe of a preset for the chosen pairs, its settings changed as `text` says."""
    made = draft(
        app_state.host.model_section(),
        [app_state.pairs.path_of(name) for name in chosen],
        preset,
        output=app_state.output_of(called.strip()),
        folder=app_state.pairs.runs,
    ).recipe
    return with_settings(made, text) if text.strip() else made


def plan_lines(recipe: Recipe) -> list[tuple[str, str]]:
    """The plan of a recipe, as `lora-dpo plan` says it."""
    planned = plan(recipe)
    notes = [("note", text) for text in planned.notes]
    return [*lines(planned), *notes, ("", verdict(planned))]


def toggle(app_state: AppState) -> None:
    """Pause the run that goes on, or let the paused one go on."""
    pause(app_state, paused=app_state.training is not None and app_state.training.job.state != "paused")


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


def state_view(training: Training) -> str:
    """Where the run is, in a bar and a line."""
    view, state = training.watch.seen, training.job.state
    warnings = "".join(note(warned.text, kind="bad") for warned in view.notes if warned.warning)
    if state in ENDS:
        kind, text = ENDS[state]
        return note(text.format(name=training.job.name, error=training.job.error), kind=kind) + warnings
    if view.stage != "training" and not (view.steps and view.step < view.all_steps):
        label = f"{view.stage or 'getting ready'}: {view.done} of {view.total}" if view.total else "getting ready"
        return progress_bar(view.done, view.total, _with_state(label, state)) + warnings
    left = view.seconds_left(time.monotonic())
    label = f"step {view.step} of {view.all_steps or view.total}"
    if left is not None and state == "running":
        label += f", about {duration(left)} left"
    return progress_bar(view.step, view.all_steps or view.total, _with_state(label, state)) + warnings


def outcome_view(training: Training) -> str:
    """What was measured before and after, at the end of a run."""
    view = training.watch.seen
    parts = []
    if view.compared:
        parts.append("<h4>Held-out pairs, before and after</h4>")
        parts.append(table(("", "before", "after"), view.compared, right=(1, 2)))
    if view.answered:
        parts.append("<h4>Held-out answers, before and after</h4>")
        parts.append(table(("prompt", "before", "after"), view.answered))
    return "".join(parts)


def _with_state(label: str, state: str) -> str:
    words = {"paused": "paused at ", "stopping": "stopping after this step: "}
    return words.get(state, "") + label
