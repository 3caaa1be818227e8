"""The Adapters tab: what there is, what it was made from, and the ways in and out.

`build` is longer than 60 lines: it lays the tab out from top to bottom and connects it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from lora_dpo.adapters.describe import describe
from lora_dpo.adapters.exchange import install
from lora_dpo.adapters.package import SUFFIX
from lora_dpo.adapters.store import list_adapters
from lora_dpo.demo import downloads
from lora_dpo.demo.handlers import markdown, told
from lora_dpo.demo.html import curves, facts, note, progress_bar, table, without_pictures
from lora_dpo.demo.run_state import RunSnapshot
from lora_dpo.demo.session import AppState
from lora_dpo.errors import AdapterError

EXPORTS = {
    "merged model folder": "merge",
    "GGUF model for llama.cpp": "gguf",
    "GGUF adapter for llama.cpp": "gguf-adapter",
    "Ollama folder": "ollama",
}
HEADERS = ("name", "base", "rank", "size", "made", "accuracy", "checked here")
MAX_CARD = 100_000

State = tuple[Any, ...]


def build(app_state: AppState, page: gr.Blocks) -> tuple[gr.Dropdown, gr.HTML]:
    """Lay the tab out; returns the picker and the table, to be refreshed when an adapter is new."""
    listed = gr.HTML(adapters_table(app_state), elem_id="adapters-table")
    names = app_state.adapters()
    first = names[0] if names else None
    with gr.Row(elem_classes="bar"):
        name = gr.Dropdown(names, value=first, label="Adapter", elem_id="adapters-name", scale=3, filterable=False)
        pack_it = gr.Button("Pack to download", size="md", elem_id="adapters-pack", scale=1, min_width=150)
        load = gr.UploadButton(
            f"Install a {SUFFIX}", file_types=[".zip"], size="md", elem_id="adapters-install", scale=1, min_width=150
        )
    package = gr.File(label="Packed", visible=False, interactive=False, elem_id="adapters-file")
    status = gr.HTML(note(""), elem_id="adapters-status")
    with gr.Row(elem_classes="bar"):
        kind = gr.Dropdown(list(EXPORTS), value=next(iter(EXPORTS)), label="Merge or export", filterable=False, scale=3)
        write = gr.Button("Write", size="md", elem_id="adapters-write", scale=1, min_width=110)
    progress = gr.HTML("", elem_id="adapters-progress")
    exported = gr.File(label="Exported", visible=False, interactive=False, elem_id="adapters-exported")
    with gr.Accordion("Passport", open=True):
        passport = gr.HTML("", elem_id="adapters-passport")
    with gr.Accordion("Curves of its training", open=False):
        drawn = gr.HTML("", elem_id="adapters-curves")
    with gr.Accordion("Model card", open=False):
        card = gr.Markdown("", sanitize_html=True, latex_delimiters=[], elem_id="adapters-card")

    @told
    def show(which: str | None) -> State:
        if not which:
            return note("There is no adapter yet. Train one, or install a package."), "", ""
        folder = app_state.find(which)
        incompatibility = note(app_state.host.incompatibility(which) or "", kind="bad")
        return incompatibility + facts(describe(folder)), _curves_of(folder), _card_of(folder)

    @told
    def packed(which: str | None) -> Any:
        return gr.update(value=str(downloads.packed(app_state, which or "")), visible=True)

    @told
    def bring(path: str | None) -> State:
        if path is None:
            raise AdapterError("No file came. Choose one.")
        done = install(path, root=app_state.adapters_dir)
        names = app_state.adapters()
        said = note(f"Installed {done.folder.name}. {' '.join(done.notes)}", kind="good")
        return (
            adapters_table(app_state),
            gr.update(choices=names, value=done.folder.name),
            said,
            *show(done.folder.name),
        )

    @told
    def export_it(which: str | None, kind: str) -> Iterator[State]:
        for done, total, target in downloads.exported(app_state, which or "", EXPORTS.get(kind, kind)):
            yield progress_bar(done, total, f"writing {target.name}: {done} of {total}"), gr.update(visible=False)
        if target.is_file():
            yield note(""), gr.update(value=str(target), visible=True)
        else:
            yield note(f"Written: {target}", kind="good"), gr.update(visible=False)

    private: dict[str, Any] = {"api_visibility": "private"}
    shown = [passport, drawn, card]
    name.change(show, name, shown, **private)
    page.load(show, name, shown, **private)
    pack_it.click(packed, name, package, **private)
    load.upload(bring, load, [listed, name, status, *shown], **private)
    write.click(export_it, [name, kind], [progress, exported], show_progress="hidden", **private)
    return name, listed


def adapters_table(app_state: AppState) -> str:
    """The table of `lora-dpo adapters list`."""
    rows = list_adapters(app_state.adapters_dir)
    if not rows:
        return note(f"There is no adapter in {app_state.adapters_dir} yet.")
    cells = [
        (
            row.name,
            row.base,
            str(row.rank or ""),
            f"{row.size / 1e6:.1f} MB",
            row.created,
            "" if row.accuracy is None else f"{row.accuracy:.3f}",
            row.state,
        )
        for row in rows
    ]
    return table(HEADERS, cells, right=(2, 3, 5), kind="names")


def _curves_of(folder: Path) -> str:
    """The curves of `metrics.jsonl`, as the Train tab draws them."""
    rows = []
    try:
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int) and "loss" in row:
                rows.append((row["step"], {key: float(v) for key, v in row.items() if isinstance(v, int | float)}))
        beta = float(json.loads((folder / "passport.json").read_text("utf-8"))["recipe"]["trainer"].get("beta", 0.1))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return note("It brings no curves of its training.")
    if not rows or not beta > 0:
        return note("It brings no curves of its training.")
    return curves(RunSnapshot(folder.name, steps=tuple(rows), all_steps=rows[-1][0]), beta)


def _card_of(folder: Path) -> str:
    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")[:MAX_CARD]
    except OSError:
        return "It brings no model card."
    return markdown(without_pictures(text))
