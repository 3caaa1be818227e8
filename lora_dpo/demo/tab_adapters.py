"""The Adapters tab: what there is, what it was made from, and the ways in and out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from lora_dpo.adapters.describe import describe
from lora_dpo.adapters.exchange import install
from lora_dpo.adapters.passport import PASSPORT
from lora_dpo.adapters.store import list_adapters, record_verified, remove, rename
from lora_dpo.demo import downloads
from lora_dpo.demo.handlers import PRIVATE, Update, markdown, red_line, told
from lora_dpo.demo.html import curves, facts, framed, note, progress_bar, table, without_pictures
from lora_dpo.demo.machine_paths import without_paths
from lora_dpo.demo.run_state import RunSnapshot
from lora_dpo.demo.session import AppState
from lora_dpo.errors import AdapterError, LoraDPOError
from lora_dpo.evaluation.report.write import report_of
from lora_dpo.evaluation.verify_adapter import verify

EXPORTS = {
    "merged model folder": "merge",
    "GGUF model for llama.cpp": "gguf",
    "GGUF adapter for llama.cpp": "gguf-adapter",
    "Ollama folder": "ollama",
}
HEADERS = ("name", "base", "rank", "size", "made", "held-out accuracy", "checked here")
MAX_CARD = 100_000
NONE_YET = "There is no adapter yet. Train one, or install a package."


@dataclass(frozen=True)
class Parts:
    """What is on the tab."""

    listed: gr.HTML
    name: gr.Dropdown
    chat: gr.Button
    """Leads to the Chat tab, with this adapter beside the base."""
    verify: gr.Button
    report: gr.Button
    pack: gr.Button
    load: gr.UploadButton
    refused: gr.HTML
    """Why a package was refused."""
    status: gr.HTML
    package: gr.File
    page: gr.HTML
    """Its report."""
    new_name: gr.Textbox
    rename: gr.Button
    remove: gr.Button
    sure: gr.Row
    """Asks whether to remove it: yes, no."""
    yes: gr.Button
    no: gr.Button
    kind: gr.Dropdown
    write: gr.Button
    progress: gr.HTML
    exported: gr.File
    passport: gr.HTML
    drawn: gr.HTML
    card: gr.Markdown

    @property
    def shown(self) -> list[Any]:
        """What is said of one adapter."""
        return [self.passport, self.drawn, self.card, self.page, self.sure, self.package, self.new_name]

    @property
    def changed(self) -> list[Any]:
        """What another set of adapters changes."""
        return [self.listed, self.name, self.status, self.refused, *self.shown]


def build(app_state: AppState, page: gr.Blocks) -> Parts:
    """Lay the tab out and connect it."""
    parts = _layout(app_state)
    tab = Tab(app_state, parts)
    quiet: dict[str, Any] = {"show_progress": "hidden", **PRIVATE}
    working: dict[str, Any] = {"show_progress_on": parts.status, **PRIVATE}
    parts.name.change(tab.show, parts.name, parts.shown, **quiet)
    parts.name.input(lambda: "", None, parts.status, queue=False, **quiet)
    page.load(tab.show, parts.name, parts.shown, **quiet)
    parts.verify.click(tab.verify, parts.name, [parts.status, parts.listed], **working)
    parts.report.click(tab.report, parts.name, parts.page, **quiet)
    parts.pack.click(tab.packed, parts.name, parts.package, **quiet)
    parts.load.upload(tab.bring, parts.load, parts.changed, **working)
    parts.rename.click(tab.rename, [parts.name, parts.new_name], parts.changed, **quiet)
    parts.remove.click(tab.ask_whether, parts.name, [parts.sure, parts.yes], **quiet)
    parts.no.click(lambda: gr.update(visible=False), None, parts.sure, queue=False, **quiet)
    parts.yes.click(tab.remove, parts.name, parts.changed, **quiet)
    parts.write.click(tab.export, [parts.name, parts.kind], [parts.progress, parts.exported], **quiet)
    return parts


def _layout(app_state: AppState) -> Parts:
    listed = gr.HTML(adapters_table(app_state), elem_id="adapters-table")
    names = app_state.adapters()
    first = app_state.newest() or (names[0] if names else None)
    with gr.Row(elem_classes="bar"):
        name = gr.Dropdown(names, value=first, label="Adapter", elem_id="adapters-name", scale=3, filterable=False)
        chat = _button("Chat with it", "chat", variant="primary")
        check = _button("Verify", "verify")
        report = _button("Report", "report")
        pack = _button("Pack", "pack")
        load = gr.UploadButton("Install", size="md", elem_id="adapters-install", scale=1, min_width=130)
    refused = gr.HTML("", elem_id="adapters-refused", elem_classes="refused")
    status = gr.HTML(note(""), elem_id="adapters-status")
    package = gr.File(label="Packed", visible=False, interactive=False, elem_id="adapters-file")
    page = gr.HTML("", elem_id="adapters-page")
    with gr.Accordion("Passport", open=True):
        passport = gr.HTML("", elem_id="adapters-passport")
    with gr.Accordion("Curves of its training", open=False):
        drawn = gr.HTML("", elem_id="adapters-curves")
    with gr.Accordion("Model card", open=False):
        card = gr.Markdown("", sanitize_html=True, latex_delimiters=[], elem_id="adapters-card")
    with gr.Accordion("Merge or export", open=False):
        with gr.Row(elem_classes="bar"):
            kind = gr.Dropdown(list(EXPORTS), value=next(iter(EXPORTS)), label="As", filterable=False, scale=3)
            write = _button("Write", "write")
        progress = gr.HTML("", elem_id="adapters-progress")
        exported = gr.File(label="Exported", visible=False, interactive=False, elem_id="adapters-exported")
    with gr.Accordion("Rename or remove", open=False):
        with gr.Row(elem_classes="bar"):
            new_name = gr.Textbox(first or "", label="Its name", max_length=100, elem_id="adapters-new-name", scale=3)
            again = _button("Rename", "rename")
            gone = _button("Remove", "remove", variant="stop")
        with gr.Row(visible=False, elem_classes="bar") as sure:
            yes = _button("Remove it for good", "yes", variant="stop")
            no = _button("Keep it", "no")
    return Parts(
        listed=listed,
        name=name,
        chat=chat,
        verify=check,
        report=report,
        pack=pack,
        load=load,
        refused=refused,
        status=status,
        package=package,
        page=page,
        new_name=new_name,
        rename=again,
        remove=gone,
        sure=sure,
        yes=yes,
        no=no,
        kind=kind,
        write=write,
        progress=progress,
        exported=exported,
        passport=passport,
        drawn=drawn,
        card=card,
    )


def _button(label: str, place: str, *, variant: Any = "secondary") -> gr.Button:
    return gr.Button(label, size="md", variant=variant, elem_id=f"adapters-{place}", scale=1, min_width=100)


class Tab:
    """The tab's handlers. They return values by their parts."""

    def __init__(self, app_state: AppState, parts: Parts) -> None:
        self.app_state, self.parts = app_state, parts

    @told
    def show(self, which: str | None) -> Update:
        """What there is to say of an adapter."""
        parts = self.parts
        folded: Update = {
            parts.page: "",
            parts.sure: gr.update(visible=False),
            parts.package: gr.update(visible=False),
            parts.new_name: which or "",
        }
        if not which:
            return {**folded, parts.passport: note(NONE_YET), parts.drawn: "", parts.card: ""}
        folder = self.app_state.find(which)
        incompatibility = note(self.app_state.host.incompatibility(which) or "", kind="bad")
        passport = incompatibility + facts(describe(folder))
        return {**folded, parts.passport: passport, parts.drawn: _curves_of(folder), parts.card: _card_of(folder)}

    def verify(self, which: str | None) -> Update:
        """Score its stored pairs again, on the base in memory."""
        try:
            folder = self.app_state.find(which or "")
            found = self.app_state.host.take_turn(lambda base: verify(folder, base=base))
        except LoraDPOError as error:
            return {self.parts.status: red_line(error)}
        if not found.ok:
            return {self.parts.status: note(f"{which} is not verified. {found.reason}", kind="bad")}
        record_verified(folder, self.app_state.adapters_dir)
        said = note(f"Verified. {found.reason}", kind="good")
        return {self.parts.status: said, self.parts.listed: adapters_table(self.app_state)}

    @told
    def report(self, which: str | None) -> str:
        """Its report, made anew from its numbers: a page that runs no script and loads nothing, in a frame that lets
        it do neither."""
        folder = self.app_state.find(which or "")
        return framed(_without_its_paths(report_of([folder]), folder))

    @told
    def packed(self, which: str | None) -> Any:
        """One file of it, to download."""
        return gr.update(value=str(downloads.packed(self.app_state, which or "")), visible=True)

    def bring(self, path: str | None) -> Update:
        """Take a package in, or say under its button why not."""
        if path is None:
            return {self.parts.refused: ""}
        try:
            done = install(path, root=self.app_state.adapters_dir)
            shown = self.show(done.folder.name)
        except LoraDPOError as error:
            return {self.parts.refused: red_line(error)}
        said = note(f"Installed {done.folder.name}. {' '.join(done.notes)}", kind="good")
        return {**self._listed(done.folder.name), **shown, self.parts.status: said, self.parts.refused: ""}

    @told
    def rename(self, which: str | None, new: str) -> Update:
        """Give it another name."""
        folder = self.app_state.find(which or "")
        if new.strip() == which:
            raise AdapterError(f"It is called {which} already. Write another name.")
        target = rename(folder.name, new.strip(), self.app_state.adapters_dir)
        said = note(
            f"{which} is called {target.name} now. Votes keep the name that they were given under.", kind="good"
        )
        return {**self._listed(target.name), **self.show(target.name), self.parts.status: said}

    @told
    def ask_whether(self, which: str | None) -> Update:
        """Nothing is removed at one click."""
        name = self.app_state.find(which or "").name
        return {self.parts.sure: gr.update(visible=True), self.parts.yes: gr.update(value=f"Remove {name} for good")}

    @told
    def remove(self, which: str | None) -> Update:
        """Remove it."""
        folder = remove(self.app_state.find(which or "").name, self.app_state.adapters_dir)
        names = self.app_state.adapters()
        first = names[0] if names else None
        return {**self._listed(first), **self.show(first), self.parts.status: note(f"Removed {folder.name}.")}

    @told
    def export(self, which: str | None, kind: str) -> Iterator[Update]:
        """Write it in another form."""
        parts = self.parts
        for done, total, target in downloads.exported(self.app_state, which or "", EXPORTS.get(kind, kind)):
            said = progress_bar(done, total, f"writing {target.name}: {done} of {total}")
            yield {parts.progress: said, parts.exported: gr.update(visible=False)}
        if target.is_file():
            yield {parts.progress: note(""), parts.exported: gr.update(value=str(target), visible=True)}
        else:
            written = note(f"Written: {target}", kind="good")
            yield {parts.progress: written, parts.exported: gr.update(visible=False)}

    def _listed(self, chosen: str | None) -> Update:
        names = self.app_state.adapters()
        listed = adapters_table(self.app_state)
        return {self.parts.listed: listed, self.parts.name: gr.update(choices=names, value=chosen)}


def adapters_table(app_state: AppState) -> str:
    """The table of `lora-dpo adapters list`."""
    rows = list_adapters(app_state.adapters_dir)
    if not rows:
        return note(NONE_YET)
    cells = [
        (
            row.name,
            without_paths(row.base),
            str(row.rank or ""),
            f"{row.size / 1e6:.1f} MB",
            row.created,
            "" if row.accuracy is None else f"{row.accuracy:.2f}",
            without_paths(row.state),
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
    return markdown(without_pictures(_without_its_paths(text, folder)))


def _without_its_paths(text: str, folder: Path) -> str:
    """A text about an adapter without folders of the machine that it was made on; what a model said stays as it is."""
    paths = sorted(filter(lambda found: without_paths(found) != found, _texts_of(folder)), key=len, reverse=True)
    for path in paths:
        for written in (path, escape(path)):
            text = text.replace(written, without_paths(path))
    return text


def _texts_of(folder: Path) -> set[str]:
    """Every text in an adapter's passport, keys among them."""
    try:
        left = [json.loads((folder / PASSPORT).read_text(encoding="utf-8"))]
    except (OSError, ValueError, RecursionError):
        return set()
    found = {str(folder), str(folder.absolute())}
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list):
            left += value
        elif isinstance(value, str):
            found.add(value)
    return found
