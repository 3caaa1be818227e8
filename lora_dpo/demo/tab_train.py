"""The Train tab: pairs and a preset, what to expect, then the run as it goes. It trains on the base that answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from lora_dpo.data.doctor.checks import Texts
from lora_dpo.demo.expectation import Line, before_the_click, what_it_takes
from lora_dpo.demo.handlers import PRIVATE, Given, Update, red_line, refusal, terminal, told
from lora_dpo.demo.html import curves, facts, folded, note
from lora_dpo.demo.in_a_terminal import train_recipe
from lora_dpo.demo.pair_store import VOTES
from lora_dpo.demo.search_view import first_candidate, outcome_view, search_controls, state_view
from lora_dpo.demo.session import SEARCH_MINUTES, WATCHED, AppState
from lora_dpo.demo.steering import end, has_adapter, press_pause, version_of
from lora_dpo.errors import LoraDPOError
from lora_dpo.training.drafting.presets import PRESETS, Draft, draft, settings_text, with_settings
from lora_dpo.training.planning.lines import lines, verdict
from lora_dpo.training.planning.make_plan import plan
from lora_dpo.training.planning.plan_values import Plan

LOOK_EVERY = 1.5
"""Seconds between two looks at a run."""
FILL_IN = "(now, since, coming, put) => [since ?? '', put].includes(now ?? '') ? [coming, coming] : [now, put]"
"""Settings that came for a choice are put in, unless others were typed since: in the browser, where that is known."""
NOTHING = "Choose pairs: vote on a few answers first, or upload some on the Data tab."


@dataclass(frozen=True)
class Parts:
    """What is on the tab."""

    sources: gr.CheckboxGroup
    preset: gr.Radio
    name: gr.Textbox
    prompts: gr.Textbox
    recipe: gr.Textbox
    """The settings, as text."""
    see_plan: gr.Button
    start: gr.Button
    minutes: gr.Number
    find: gr.Button
    """Searches for the best settings, so many minutes."""
    expected: gr.HTML
    planned: gr.HTML
    state: gr.HTML
    controls: gr.Row
    pause: gr.Button
    keep: gr.Button
    discard: gr.Button
    compare: gr.Button
    """Leads to the Chat tab, with the new adapter beside the base."""
    drawn: gr.HTML
    told_of: gr.HTML
    """What was measured and answered."""
    left: tuple[gr.Row, gr.Dropdown, gr.Button, gr.Button]
    """The row of interrupted runs: which, go on, discard."""
    terminal: gr.Accordion
    commands: gr.Textbox
    filled: gr.Textbox
    """The settings as they were filled in: others were changed by hand. Not shown; it is a box, and no state here, so
    that it comes from the browser together with the settings."""
    coming: tuple[gr.Textbox, gr.Textbox, gr.Textbox]
    """The settings as they were read, those to be put in their place, and those that were put in last; not shown."""
    refused: gr.State
    """Settings that do not fit by the plan; whoever starts them once more means it."""
    seen: gr.State
    """The version of the run that is shown."""

    @property
    def chosen(self) -> set[Any]:
        """What a run is made from."""
        return {self.sources, self.preset, self.name, self.recipe, self.filled}

    @property
    def followed(self) -> list[Any]:
        """What changes while a run goes on."""
        shown = [self.state, self.drawn, self.told_of, self.controls, self.pause, self.compare]
        return [*shown, self.start, self.find, self.seen]


def build(app_state: AppState, item: gr.Tab) -> Parts:
    """Lay the tab out and connect it."""
    parts = _layout(app_state)
    tab = Tab(app_state, parts)
    quiet: dict[str, Any] = {"show_progress": "hidden", **PRIVATE}
    at_once: dict[str, Any] = {"queue": False, **quiet}
    expect = [parts.expected, parts.filled, *parts.coming[:2]]
    seen = item.select(tab.look, parts.chosen, expect, **at_once)
    chosen = gr.on([parts.sources.change, parts.preset.change], tab.choose, parts.chosen, expect, **at_once)
    settings: Any = [parts.recipe, *parts.coming], [parts.recipe, parts.coming[2]]
    for event in (seen, chosen):
        event.then(None, *settings, js=FILL_IN, **PRIVATE).then(tab.expect, parts.chosen, parts.expected, **quiet)
    parts.see_plan.click(tab.show_plan, parts.chosen, [parts.expected, parts.planned], **quiet)
    begun = [parts.planned, parts.refused, *parts.followed]
    parts.start.click(tab.begin, {*parts.chosen, parts.prompts, parts.refused}, begun, **quiet)
    parts.find.click(tab.find, {*parts.chosen, parts.minutes, parts.refused}, begun, **quiet)
    gr.Timer(LOOK_EVERY).tick(tab.follow, parts.seen, parts.followed, **at_once)
    parts.pause.click(lambda said: press_pause(app_state, said), parts.pause, parts.pause, **at_once)
    parts.keep.click(lambda: end(app_state, keep=True), None, None, **at_once)
    parts.discard.click(lambda: end(app_state, keep=False), None, None, **at_once)
    row, which, go_on, drop = parts.left
    go_on.click(tab.go_on, [which, parts.prompts, parts.minutes], [row, parts.planned, *parts.followed], **quiet)
    drop.click(tab.drop, which, [row, which], **quiet)
    parts.terminal.expand(tab.in_a_terminal, parts.chosen, parts.commands, **quiet)
    return parts


def _layout(app_state: AppState) -> Parts:
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            sources, preset, name = _choices(app_state)
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
                    elem_classes="code",
                    info="What you change here is what is trained.",
                )
            (look, start), (minutes, find) = _buttons(), search_controls()
        with gr.Column(scale=3, min_width=300):
            expected = gr.HTML(note(NOTHING), elem_id="train-expected")
            left = _interrupted(app_state)
            planned = gr.HTML("", elem_id="train-planned")
            state = gr.HTML("", elem_id="train-state")
            controls, pause, keep, discard = _controls()
            compare = gr.Button("Compare it with the base", visible=False, size="md", elem_id="train-compare")
            drawn = gr.HTML("", elem_id="train-curves")
    told_of = gr.HTML("", elem_id="train-samples")
    folded, commands = terminal("train-commands")
    return Parts(
        sources=sources,
        preset=preset,
        name=name,
        prompts=prompts,
        recipe=recipe,
        see_plan=look,
        start=start,
        minutes=minutes,
        find=find,
        expected=expected,
        planned=planned,
        state=state,
        controls=controls,
        pause=pause,
        keep=keep,
        discard=discard,
        compare=compare,
        drawn=drawn,
        told_of=told_of,
        left=left,
        terminal=folded,
        commands=commands,
        filled=gr.Textbox("", visible=False),
        coming=(gr.Textbox("", visible=False), gr.Textbox("", visible=False), gr.Textbox("", visible=False)),
        refused=gr.State(""),
        seen=gr.State(None),
    )


def _buttons() -> tuple[gr.Button, gr.Button]:
    with gr.Row():
        look = gr.Button("Show the plan", elem_id="train-plan", min_width=130)
        return look, gr.Button("Start", variant="primary", elem_id="train-start", min_width=130)


def _controls() -> tuple[gr.Row, gr.Button, gr.Button, gr.Button]:
    with gr.Row(visible=False) as row:
        pause = gr.Button("Pause", size="md", elem_id="train-pause", min_width=100)
        keep = gr.Button("Stop and keep", size="md", elem_id="train-keep", min_width=100)
        discard = gr.Button("Stop, discard", size="md", variant="stop", elem_id="train-discard", min_width=100)
    return row, pause, keep, discard


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
    """The tab's handlers. Most are given, and return, values by their parts."""

    def __init__(self, app_state: AppState, parts: Parts) -> None:
        self.app_state, self.parts = app_state, parts

    def look(self, given: Given) -> Update:
        """What to expect of these pairs, and the settings that they would be trained with."""
        if not given[self.parts.sources]:
            return {self.parts.expected: note(NOTHING)}
        try:
            made = self._drafted(given)
            return {self.parts.expected: _notes(self._told_first(given, made)), **self._filled(given, made)}
        except LoraDPOError as error:
            return {self.parts.expected: red_line(error)}

    def choose(self, given: Given) -> Update:
        """Other pairs or another preset: settings of its own."""
        since, coming, _ = self.parts.coming
        fresh: Update = {self.parts.filled: "", coming: ""}
        return {**fresh, **self.look({**given, **fresh, self.parts.recipe: ""}), since: given[self.parts.recipe]}

    def expect(self, given: Given) -> str:
        """What to expect with time and memory, which take a second; not while a run goes on."""
        if not given[self.parts.sources]:
            return note(NOTHING)
        try:
            made = self._drafted(given)
            told_first = self._told_first(given, made)
            if self.app_state.training is not None and self.app_state.training.job.running:
                return _notes(told_first)
            return _notes([*told_first, what_it_takes(plan(made.recipe), measured=made.held_out > 0)])
        except LoraDPOError as error:
            return red_line(error)

    @told
    def show_plan(self, given: Given) -> Update:
        """Everything that the plan says."""
        made = self._drafted(given)
        planned = plan(made.recipe)
        expected = _notes([*self._told_first(given, made), what_it_takes(planned, measured=made.held_out > 0)])
        return {self.parts.expected: expected, self.parts.planned: _plan_view(planned, open=True)}

    def begin(self, given: Given) -> Iterator[Update]:
        """Train once."""

        def start(made: Draft, name: str, planned: Plan) -> None:
            asked = given[self.parts.prompts].splitlines()
            self.app_state.start_training(made.recipe, name, asked, planned=planned.time.seconds)

        yield from self._begun(given, start, "The plan")

    def find(self, given: Given) -> Iterator[Update]:
        """Search for the best settings; those of the page are the first candidate."""

        def start(made: Draft, name: str, planned: Plan) -> None:
            minutes = given[self.parts.minutes] or SEARCH_MINUTES
            self.app_state.start_search(first_candidate(made), name, minutes)

        yield from self._begun(given, start, "The plan of the first candidate")

    def _begun(self, given: Given, start: Callable[[Draft, str, Plan], None], title: str) -> Iterator[Update]:
        """Plan the run, show that, and start it; one that does not fit is started when it is asked for once more."""
        parts = self.parts
        ready: Update = {button: gr.update(interactive=True) for button in (parts.start, parts.find)}
        waiting: Update = dict.fromkeys(ready, gr.update(interactive=False))
        yield {**waiting, parts.planned: note("Looking at what it takes…", kind="wait")}
        try:
            made = self._drafted(given)
            planned, text = plan(made.recipe), settings_text(made.recipe)
            if planned.memory.fits is False and given[parts.refused] != text:
                fix = f" {', '.join(planned.fix.overrides)}." if planned.fix else ""
                said = note(f"{verdict(planned)}{fix} Change the settings, or start it again to try.", kind="bad")
                yield {**ready, parts.planned: said + _plan_view(planned, open=True), parts.refused: text}
                return
            start(made, given[parts.name].strip(), planned)
        except Exception as error:  # whatever it was, the buttons are there again
            yield {**ready, parts.planned: ""}
            if isinstance(error, LoraDPOError):
                raise refusal(error) from None
            raise
        yield {parts.planned: _plan_view(planned, title), parts.refused: "", **self.follow(None)}

    @told
    def go_on(self, which: str | None, asked: str, minutes: float | None) -> Update:
        """Continue an interrupted run or search, with the settings it began with."""
        self.app_state.continue_training(which or "", asked.splitlines(), minutes or SEARCH_MINUTES)
        return {self.parts.left[0]: gr.update(visible=False), self.parts.planned: "", **self.follow(None)}

    @told
    def drop(self, which: str | None) -> tuple[Any, Any]:
        """Remove what an interrupted run left."""
        self.app_state.discard_training(which or "")
        return interrupted_update(self.app_state.interrupted())

    @told
    def in_a_terminal(self, given: Given) -> str:
        """The recipe, and the command that runs it."""
        return train_recipe(self._drafted(given).recipe, given[self.parts.name].strip())

    def follow(self, version: Any) -> Update:
        """What changed since `version`, for a page that looks again and again; while a run goes on, its time does."""
        parts, now = self.parts, self.app_state.training
        if now is None:
            return {parts.seen: gr.skip()}
        # Before what is shown is made: a run that ends meanwhile has another version, and is shown at the next look.
        shown, running = version_of(now), now.job.running
        if shown == version:
            return {parts.state: state_view(now, time.monotonic()) if running else gr.skip()}
        view = now.watch.seen
        return {
            parts.state: state_view(now, time.monotonic()),
            parts.drawn: curves(view, now.beta) if view.steps else "",
            parts.told_of: outcome_view(now),
            parts.controls: gr.update(visible=running),
            parts.pause: gr.update(value="Continue" if now.job.state == "paused" else "Pause"),
            parts.compare: gr.update(visible=has_adapter(now)),
            parts.start: gr.update(interactive=not running),
            parts.find: gr.update(interactive=not running),
            parts.seen: shown,
        }

    def _drafted(self, given: Given) -> Draft:
        """The run of the page's choices; settings that were changed by hand are kept, others follow the preset."""
        parts = self.parts
        chosen = given[parts.sources], given[parts.preset], given[parts.name]
        return drafted(self.app_state, *chosen, given[parts.recipe] if self._is_changed(given) else "")

    def _is_changed(self, given: Given) -> bool:
        text, filled = given[self.parts.recipe] or "", given[self.parts.filled] or ""
        return bool(text.strip()) and text.strip() != filled.strip()

    def _filled(self, given: Given, made: Draft) -> Update:
        """The whole settings; those that were changed by hand stay known as that."""
        text, (since, coming, _) = settings_text(made.recipe), self.parts.coming
        filled = {} if self._is_changed(given) else {self.parts.filled: text}
        return {since: given[self.parts.recipe], coming: text, **filled}

    def _told_first(self, given: Given, made: Draft) -> list[Line]:
        entries = (entry for name in given[self.parts.sources] for entry in self.app_state.pairs.entries(name))
        prompts = len({Texts.of(entry.pair).prompt for entry in entries})
        answers = made.recipe.evaluation.answers if made.held_out else 0
        return before_the_click(pairs=made.pairs, prompts=prompts, held_out=made.held_out, answers=answers)


def interrupted_update(names: list[str]) -> tuple[Any, Any]:
    """The row of interrupted runs, and its choice."""
    return gr.update(visible=bool(names)), gr.update(choices=names, value=names[0] if names else None)


def drafted(app_state: AppState, chosen: list[str], preset: str, called: str, text: str = "") -> Draft:
    """The run of a preset on the chosen pairs, its settings changed as `text` says."""
    made = draft(
        app_state.host.model_section(),
        [app_state.pairs.path_of(name) for name in chosen],
        preset,
        output=app_state.output_of(called.strip()),
        folder=app_state.pairs.runs,
    )
    return Draft(with_settings(made.recipe, text), made.pairs, made.held_out) if text.strip() else made


def plan_lines(planned: Plan) -> list[tuple[str, str]]:
    """A plan, as `lora-dpo plan` says it."""
    notes = [("note", text) for text in planned.notes]
    return [*lines(planned), *notes, ("", verdict(planned))]


def _plan_view(planned: Plan, title: str = "The plan", *, open: bool = False) -> str:
    return folded(title, facts(plan_lines(planned)), open=open)


def _notes(told_: list[Line]) -> str:
    return "".join(note(text, kind=kind) for text, kind in told_)
