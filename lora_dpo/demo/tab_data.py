"""The Data tab: what was collected and uploaded, what the doctor says, and a place to mend it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from lora_dpo.demo import column_pickers, look_through
from lora_dpo.demo.downloads import exported_pairs
from lora_dpo.demo.handlers import PRIVATE, Update, red_line, told
from lora_dpo.demo.html import findings, note, text_block
from lora_dpo.demo.pair_store import Entry
from lora_dpo.demo.session import AppState
from lora_dpo.errors import DataError, LoraDPOError, UnclearColumns

SHOWN = 200
"""Pairs in the list; the search finds the others."""
CUT = 140
"""Characters of a text in the list."""
COLUMNS = ["line", "prompt", "chosen", "rejected"]
NONE_YET = "There are no pairs yet: vote, or upload some."

State = tuple[Any, ...]


@dataclass(frozen=True)
class Parts:
    """What is on the tab."""

    name: gr.Dropdown
    load: gr.UploadButton
    take: gr.Button
    refused: gr.HTML
    """Why an upload was refused."""
    columns: column_pickers.Pickers
    file: gr.File
    doctor: gr.HTML
    search: gr.Textbox
    listed: tuple[gr.Dataframe, gr.HTML]
    editor: gr.Column
    earlier: gr.HTML
    texts: tuple[gr.Textbox, gr.Textbox, gr.Textbox]
    buttons: tuple[gr.Button, gr.Button, gr.Button]
    """Save, delete, close."""


def build(app_state: AppState, item: gr.Tab) -> gr.Dropdown:
    """Lay the tab out and connect it; returns the picker of files."""
    parts = _layout(app_state)
    look_through.build(app_state, item, parts.name)
    tab = Tab(app_state, parts.refused, parts.columns)
    picked = gr.State(None)
    # Of an error Gradio writes over what shows the progress: that is not to be the pairs.
    private: dict[str, Any] = {"show_progress_on": parts.doctor, **PRIVATE}
    quiet: dict[str, Any] = {"show_progress": "hidden", **PRIVATE}
    at = [parts.name, parts.search]
    editing = [parts.editor, picked]
    everything = [parts.doctor, *parts.listed, *editing]
    save, remove, close = parts.buttons
    parts.name.change(tab.show, at, everything, **private)
    item.select(tab.show, at, everything, **private)  # others may have voted meanwhile
    parts.search.submit(tab.find, at, [*parts.listed, *editing], **quiet)
    brought, columns = [parts.name, *everything, parts.refused, *parts.columns.outputs], parts.columns
    parts.load.upload(tab.bring, parts.load, brought, **private)
    columns.read.click(tab.bring_as, [columns.waiting, *columns.choices], brought, **private)
    parts.take.click(tab.export, parts.name, parts.file, **quiet)
    parts.listed[0].select(tab.pick, parts.name, [*editing, parts.earlier, *parts.texts], **quiet)
    save.click(tab.mend, [*at, picked, *parts.texts], everything, **private)
    remove.click(tab.drop, [*at, picked], everything, **private)
    close.click(_closed, None, editing, queue=False, **quiet)
    return parts.name


def _layout(app_state: AppState) -> Parts:
    names = app_state.pairs.names()
    first = names[0] if names else None
    with gr.Row(elem_classes="bar"):
        name = gr.Dropdown(names, value=first, label="Pairs", elem_id="data-name", scale=3, filterable=False)
        load = gr.UploadButton("Upload pairs", size="md", elem_id="data-upload", scale=1, min_width=140)
        take = gr.Button("Export", size="md", elem_id="data-export", scale=1, min_width=110)
    refused = gr.HTML("", elem_id="data-refused", elem_classes="refused")
    columns = column_pickers.build()
    file = gr.File(label="Exported, in the canonical form", visible=False, elem_id="data-file", interactive=False)
    with gr.Accordion("What the doctor says", open=True):
        doctor = gr.HTML(note("Vote, or upload pairs, and they are looked through here."), elem_id="data-doctor")
    search = gr.Textbox(
        placeholder="Search words…", show_label=False, elem_id="data-search", max_length=400, submit_btn="Search"
    )
    table = gr.Dataframe(
        headers=COLUMNS,
        datatype=["number", "str", "str", "str"],
        column_widths=["70px", "31%", "31%", "31%"],
        column_count=len(COLUMNS),
        interactive=False,
        type="array",
        wrap=True,
        max_height=380,
        buttons=[],
        show_label=False,
        elem_id="data-table",
    )
    count = gr.HTML(note(""), elem_id="data-count")
    return Parts(name, load, take, refused, columns, file, doctor, search, (table, count), *_editor())


Editor = tuple[gr.Column, gr.HTML, tuple[gr.Textbox, gr.Textbox, gr.Textbox], tuple[gr.Button, gr.Button, gr.Button]]


def _editor() -> Editor:
    with gr.Column(visible=False, elem_id="data-editor") as editor:
        earlier = gr.HTML("")
        prompt = gr.Textbox(label="Prompt", lines=2, max_lines=12, elem_id="data-prompt")
        with gr.Row():
            chosen = gr.Textbox(label="Chosen", lines=4, max_lines=16, elem_id="data-chosen", min_width=280)
            rejected = gr.Textbox(label="Rejected", lines=4, max_lines=16, elem_id="data-rejected", min_width=280)
        with gr.Row():
            save = gr.Button("Save", variant="primary", size="md", elem_id="data-save", min_width=110)
            remove = gr.Button("Delete this pair", variant="stop", size="md", elem_id="data-delete", min_width=110)
            close = gr.Button("Close", size="md", elem_id="data-close", min_width=110)
    return editor, earlier, (prompt, chosen, rejected), (save, remove, close)


class Tab:
    """The tab's handlers."""

    def __init__(self, app_state: AppState, refused: gr.HTML, columns: column_pickers.Pickers) -> None:
        self.app_state, self.refused, self.columns = app_state, refused, columns
        self.first_look: dict[str, tuple[int, str]] = {}
        """What the doctor said of an upload as it came, rows that are no pairs included, until the file is changed."""

    def rows(self, which: str | None, words: str) -> State:
        """The list and the line under it."""
        if not which or which not in self.app_state.pairs.names():
            return [], note(NONE_YET)
        entries = self.app_state.pairs.entries(which, words or "")
        shown = [[entry.line, *map(_short, entry.texts)] for entry in entries[:SHOWN]]
        more = f"; the first {SHOWN} are shown, search to see others" if len(entries) > SHOWN else ""
        return shown, note(f"{len(entries)} pairs{more}. Click on one to mend or remove it.")

    @told
    def show(self, which: str | None, words: str) -> State:
        """A file: findings and list."""
        if not which or which not in self.app_state.pairs.names():
            return note(NONE_YET), *self.rows(None, ""), *_closed()
        changed, said = self.first_look.get(which, (0, ""))
        if changed != self.app_state.pairs.path_of(which).stat().st_mtime_ns:
            said = findings(self.app_state.pairs.diagnose(which, self.app_state.tokenizer))
        return said, *self.rows(which, words), *_closed()

    @told
    def find(self, which: str | None, words: str) -> State:
        """The pairs with these words."""
        return *self.rows(which, words), *_closed()

    @told
    def bring(self, path: str | None) -> State | Update:
        """Take an upload in, or say under its button why not; then all else stays as it is."""
        if path is None:
            raise DataError("No file came. Choose one.")
        try:
            return *self._taken(path, None), *column_pickers.hidden()
        except UnclearColumns as unclear:  # the list and what the doctor says of it stay as they are
            return {self.refused: "", **self._asked(path, unclear)}
        except LoraDPOError as error:
            return {self.refused: red_line(error)}

    @told
    def bring_as(self, path: str | None, *choices: str | None) -> State | Update:
        """Take the upload in that waits for its columns."""
        if path is None:
            raise DataError("No file waits for its columns. Upload one.")
        try:
            return *self._taken(path, column_pickers.picked(choices)), *column_pickers.hidden()
        except LoraDPOError as error:
            return {self.refused: red_line(error)}

    def _asked(self, path: str, unclear: UnclearColumns) -> Update:
        return dict(zip(self.columns.outputs, column_pickers.asked(path, unclear), strict=True))

    def _taken(self, path: str, columns: Mapping[str, str] | None) -> State:
        taken = self.app_state.pairs.take_in(Path(path), Path(path).name, self.app_state.tokenizer, columns)
        said = findings(taken.diagnosis, taken.report)
        self.first_look[taken.name] = (self.app_state.pairs.path_of(taken.name).stat().st_mtime_ns, said)
        choices = gr.update(choices=self.app_state.pairs.names(), value=taken.name)
        return choices, said, *self.rows(taken.name, ""), *_closed(), ""

    @told
    def export(self, which: str | None) -> Any:
        """A file in the canonical form, to download."""
        if not which:
            raise DataError(NONE_YET)
        return gr.update(value=str(exported_pairs(self.app_state, which)), visible=True)

    @told
    def pick(self, data: gr.SelectData, which: str) -> State:
        """Open a pair of the list."""
        line, *shown = data.row_value  # whatever is searched for, and however the list is sorted
        entry = next((one for one in self.app_state.pairs.entries(which, "") if one.line == int(line)), None)
        if entry is None or [_short(text) for text in entry.texts] != shown:
            raise DataError("The list has changed meanwhile. Choose the pair again.")
        before = [f"{said['role']}: {said['content']}" for said in entry.pair.prompt[:-1]]
        turns = "".join(text_block(text, kind="asked") for text in before)
        return gr.update(visible=True), entry, turns, *entry.texts

    @told
    def mend(self, which: str, words: str, entry: Entry | None, *texts: str) -> State:
        """Write the words of the pair that is open."""
        if entry is None:
            raise DataError("No pair is chosen. Click on one in the list.")
        self.app_state.pairs.change(which, entry, prompt=texts[0], chosen=texts[1], rejected=texts[2])
        return self.show(which, words)

    @told
    def drop(self, which: str, words: str, entry: Entry | None) -> State:
        """Take the pair out that is open."""
        if entry is None:
            raise DataError("No pair is chosen. Click on one in the list.")
        self.app_state.pairs.delete(which, [entry])
        return self.show(which, words)


def _closed() -> State:
    return gr.update(visible=False), None


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= CUT else f"{line[: CUT - 1]}…"
