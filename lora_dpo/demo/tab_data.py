"""The Data tab: what was collected and uploaded, what the doctor says, and a place to mend it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import gradio as gr

from lora_dpo.collection import KINDS, Entry
from lora_dpo.demo.draw import findings, note, text_block
from lora_dpo.demo.kit import told
from lora_dpo.desk import Desk
from lora_dpo.errors import DataError

SHOWN = 200
"""Pairs in the list; the search finds the others."""
CUT = 140
"""Characters of a text in the list."""
COLUMNS = ["line", "prompt", "chosen", "rejected"]

State = tuple[Any, ...]


def build(desk: Desk) -> gr.Dropdown:
    """Lay the tab out; returns the picker of files."""
    names = desk.pairs.names()
    with gr.Row(elem_classes="bar"):
        name = gr.Dropdown(
            names, value=names[0] if names else None, label="Pairs", elem_id="data-name", scale=3, filterable=False
        )
        load = gr.UploadButton(
            "Upload pairs", file_types=list(KINDS), size="md", elem_id="data-upload", scale=1, min_width=140
        )
        take = gr.Button("Export", size="md", elem_id="data-export", scale=1, min_width=110)
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
    picked = gr.State(None)
    listed = [table, count]
    editing = [editor, picked]

    def rows(which: str | None, words: str) -> State:
        if not which or which not in desk.pairs.names():
            return [], note("There are no pairs yet.")
        entries = desk.pairs.entries(which, words or "")
        shown = [[entry.line, *map(_short, entry.texts)] for entry in entries[:SHOWN]]
        more = f"; the first {SHOWN} are shown, search to see others" if len(entries) > SHOWN else ""
        return shown, note(f"{len(entries)} pairs{more}. Click on one to mend or remove it.")

    @told
    def show(which: str | None, words: str) -> State:
        if not which or which not in desk.pairs.names():
            return note("There are no pairs yet: vote, or upload some."), *rows(None, ""), *_closed()
        diagnosis = desk.pairs.diagnose(which, desk.host.base.tokenizer)
        return findings(diagnosis), *rows(which, words), *_closed()

    @told
    def find(which: str | None, words: str) -> State:
        return *rows(which, words), *_closed()

    @told
    def bring(path: str | None) -> State:
        if path is None:
            raise DataError("No file came. Choose one.")
        taken = desk.pairs.take_in(Path(path), Path(path).name, desk.host.base.tokenizer)
        choices = gr.update(choices=desk.pairs.names(), value=taken.name)
        return choices, findings(taken.diagnosis, taken.report), *rows(taken.name, ""), *_closed()

    @told
    def export(which: str | None) -> Any:
        if not which:
            raise DataError("There are no pairs yet: vote, or upload some.")
        folder = Path(tempfile.mkdtemp(dir=desk.scratch))
        return gr.update(value=str(desk.pairs.export([which], folder / f"{which}.jsonl")), visible=True)

    @told
    def pick(data: gr.SelectData, which: str, words: str) -> State:
        entries = desk.pairs.entries(which, words or "")
        index = int(data.index[0])
        if index >= len(entries):
            raise DataError("The list has changed meanwhile. Choose the pair again.")
        entry = entries[index]
        before = [f"{said['role']}: {said['content']}" for said in entry.pair.prompt[:-1]]
        turns = "".join(text_block(text, kind="asked") for text in before)
        return gr.update(visible=True), entry, turns, *entry.texts

    @told
    def mend(which: str, words: str, entry: Entry | None, *texts: str) -> State:
        if entry is None:
            raise DataError("No pair is chosen. Click on one in the list.")
        desk.pairs.change(which, entry, prompt=texts[0], chosen=texts[1], rejected=texts[2])
        return show(which, words)

    @told
    def drop(which: str, words: str, entry: Entry | None) -> State:
        if entry is None:
            raise DataError("No pair is chosen. Click on one in the list.")
        desk.pairs.delete(which, [entry])
        return show(which, words)

    private: dict[str, Any] = {"api_visibility": "private"}
    everything = [doctor, *listed, *editing]
    name.change(show, [name, search], everything, **private)
    search.submit(find, [name, search], [*listed, *editing], **private)
    load.upload(bring, load, [name, *everything], **private)
    take.click(export, name, file, api_name="export_pairs")
    table.select(pick, [name, search], [*editing, earlier, prompt, chosen, rejected], show_progress="hidden", **private)
    save.click(mend, [name, search, picked, prompt, chosen, rejected], everything, **private)
    remove.click(drop, [name, search, picked], everything, **private)
    close.click(lambda: _closed(), None, editing, queue=False, **private)
    name.select(show, [name, search], everything, **private)
    return name


def _closed() -> State:
    return gr.update(visible=False), None


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= CUT else f"{line[: CUT - 1]}…"
