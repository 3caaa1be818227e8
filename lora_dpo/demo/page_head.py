"""The head of the page: the way through it, the base in memory, and another one in its place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from lora_dpo.demo.about import way
from lora_dpo.demo.base_choice import bases, fit
from lora_dpo.demo.handlers import PRIVATE, Update, red_line, told
from lora_dpo.demo.html import note
from lora_dpo.demo.machine_paths import without_paths
from lora_dpo.demo.session import AppState
from lora_dpo.demo.theme import TITLE
from lora_dpo.errors import LoraDPOError
from lora_dpo.model.stored_form import held_text


@dataclass(frozen=True)
class Parts:
    """What is in the head; in public its lines alone are shown."""

    lines: gr.HTML
    open: gr.Button
    choice: gr.Row
    base: gr.Dropdown
    load: gr.Button
    close: gr.Button
    fits: gr.HTML


def build(app_state: AppState, *, public: bool) -> gr.HTML:
    """Lay the head out and connect it; returns its lines, to be refreshed when the base is another one.

    Args:
        public: for visitors, who have no choice of the base.
    """
    with gr.Row(elem_id="head"):
        lines = gr.HTML(head_lines(app_state, public=public))
        if public:
            return lines
        opened = gr.Button("Change the base", size="sm", elem_id="base-open", min_width=130)
    loaded = app_state.host.base.name
    with gr.Row(visible=False, elem_classes="bar") as choice:
        base = gr.Dropdown(bases(loaded), value=loaded, label="Base", elem_id="base-name", filterable=False, scale=4)
        load = gr.Button("Load it", size="md", variant="primary", elem_id="base-load", scale=1, min_width=110)
        close = gr.Button("Close", size="md", elem_id="base-close", scale=1, min_width=90)
    fits = gr.HTML("", elem_id="base-fits")
    parts = Parts(lines, opened, choice, base, load, close, fits)
    tab = Choice(app_state, parts)
    quiet: dict[str, Any] = {"show_progress": "hidden", **PRIVATE}
    opened.click(tab.open, None, [choice, base, fits], **quiet)
    close.click(lambda: (gr.update(visible=False), ""), None, [choice, fits], queue=False, **quiet)
    base.input(tab.tell_fit, base, fits, **quiet)
    load.click(tab.load, base, [lines, choice, load, fits], **quiet)
    return lines


def head_lines(app_state: AppState, *, public: bool = False) -> str:
    """The title, the way through the page, and the base in memory."""
    base = f'<span id="base-line">{escape(base_line(app_state))}</span>'
    return f'<div id="head-lines"><h1>{TITLE}</h1>{way(public=public)}{base}</div>'


def base_line(app_state: AppState) -> str:
    """The base in memory, or the one that is being loaded, or why there is none."""
    if app_state.coming is not None:
        return f"loading {without_paths(app_state.coming)} …"
    try:
        base = app_state.host.base
    except LoraDPOError as error:  # none: it says why
        return str(error)
    held = held_text(base.quantize, base.kept_share)
    return f"one loaded base: {without_paths(base.name)} ({held}, {base.dtype})"


class Choice:
    """The handlers of the choice. They return values by their parts."""

    def __init__(self, app_state: AppState, parts: Parts) -> None:
        self.app_state, self.parts = app_state, parts

    @told
    def open(self) -> Update:
        """Show what there is."""
        parts, loaded = self.parts, self.app_state.host.base.name
        names = gr.update(choices=bases(loaded), value=loaded)
        said = note("Packaged models, and folders in models/. The present one leaves memory first; its adapters stay.")
        return {parts.choice: gr.update(visible=True), parts.base: names, parts.fits: said}

    def tell_fit(self, name: str) -> str:
        """Whether it fits, before it is loaded."""
        try:
            if name not in bases(self.app_state.host.base.name):
                return ""
            found = fit(name, self.app_state.host.base)
        except LoraDPOError as error:
            return red_line(error)
        if found is None:
            return note("It is not here yet: it is fetched when you load it (some 90 MB, then a minute).")
        return note(found.text, kind="" if found.fits else "bad")

    def load(self, name: str) -> Iterator[Update]:
        """Load it in place of the one in memory."""
        parts = self.parts
        going = note("Waiting for the answers that are being written; then it is loaded.", kind="wait")
        yield {parts.load: gr.update(interactive=False), parts.fits: going}
        ready: Update = {parts.load: gr.update(interactive=True)}
        try:
            self.app_state.change_base(name)
        except LoraDPOError as error:
            yield {**ready, parts.fits: red_line(error)}
            return
        said = note(f"{name} is loaded. Adapters that were made on another base cannot be chosen now.", kind="good")
        yield {
            **ready,
            parts.lines: head_lines(self.app_state),
            parts.choice: gr.update(visible=False),
            parts.fits: said,
        }
