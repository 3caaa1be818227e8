"""Pairs that disagree with an adapter, one at a time: keep, swap or drop each. What comes of it is a new file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from html import escape
from typing import Any

import gradio as gr

from lora_dpo.adapters.adapter import open_adapter
from lora_dpo.adapters.folder import attach_adapter
from lora_dpo.adapters.loading import LoadedModel
from lora_dpo.demo.handlers import PRIVATE, Update, red_line, told
from lora_dpo.demo.html import answer_html, note, text_block
from lora_dpo.demo.pair_store import Verdict
from lora_dpo.demo.session import AppState
from lora_dpo.errors import DataError, LoraDPOError
from lora_dpo.evaluation.suspicion import Suspect, Suspects, suspicious_pairs
from lora_dpo.model.base import Base
from lora_dpo.text import counted

MOST_SCORED = 500
"""Pairs that are scored here, between answers. More are for the command line."""
MOST_SHOWN = 200
SHARE = 0.2
"""Of the pairs, so many are shown, and all that the adapter orders the other way round."""


@dataclass(frozen=True)
class Review:
    """The pairs that are looked through, and what was decided of the first ones."""

    file: str
    adapter: str
    pairs: tuple[Suspect, ...]
    verdicts: tuple[Verdict, ...] = ()

    @property
    def now(self) -> Suspect | None:
        """The pair that is shown; None when all are decided."""
        return self.pairs[len(self.verdicts)] if len(self.verdicts) < len(self.pairs) else None

    def counts(self) -> str:
        """`3 kept, 1 swapped, 0 dropped`."""
        said = (("keep", "kept"), ("swap", "swapped"), ("drop", "dropped"))
        return ", ".join(f"{self.verdicts.count(name)} {word}" for name, word in said)


@dataclass(frozen=True)
class Parts:
    """What is in the fold."""

    adapter: gr.Dropdown
    find: gr.Button
    said: gr.HTML
    card: gr.HTML
    decide: gr.Row
    keep: gr.Button
    swap: gr.Button
    drop: gr.Button
    undo: gr.Button
    write: gr.Button
    review: gr.State


def build(app_state: AppState, item: gr.Tab, name: gr.Dropdown) -> Parts:
    """Lay the fold out and connect it.

    Args:
        item: the tab that it is on.
        name: the picker of files. A new file is chosen there when it is written.
    """
    parts = _layout(app_state)
    fold = LookThrough(app_state, parts, name)
    shown = [parts.said, parts.card, parts.decide, parts.undo, parts.write, parts.review]
    at: dict[str, Any] = {"show_progress_on": parts.card, **PRIVATE}
    quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", **PRIVATE}
    item.select(lambda: gr.update(choices=app_state.adapters()), None, parts.adapter, **quiet)
    name.change(fold.closed, None, shown, **quiet)
    parts.find.click(fold.find, [name, parts.adapter], shown, **at)
    for button, verdict in ((parts.keep, "keep"), (parts.swap, "swap"), (parts.drop, "drop")):
        button.click(fold.deciding(verdict), parts.review, shown, **quiet)  # type: ignore[arg-type]
    parts.undo.click(fold.undo, parts.review, shown, **quiet)
    parts.write.click(fold.write, parts.review, [*shown, name], **at)
    return parts


def _layout(app_state: AppState) -> Parts:
    names = app_state.adapters()
    with gr.Accordion("Pairs that disagree with the rest", open=False, elem_id="look-through"):
        with gr.Row(elem_classes="bar"):
            adapter = gr.Dropdown(
                names,
                value=app_state.newest() or (names[0] if names else None),
                label="By what this adapter has learnt",
                elem_id="look-adapter",
                scale=3,
                filterable=False,
            )
            find = gr.Button("Find them", size="md", elem_id="look-find", scale=1, min_width=110)
        hint = "Train on these pairs first; then those that stay wrong are shown here, one at a time."
        said = gr.HTML(note(hint), elem_id="look-said")
        card = gr.HTML("", elem_id="look-card")
        with gr.Row(visible=False, elem_classes="bar") as decide:
            keep = _button("Keep", "keep")
            swap = _button("Swap", "swap")
            drop = _button("Drop", "drop")
        with gr.Row(elem_classes="bar"):
            undo = _button("Undo", "undo", visible=False)
            write = _button("Write a new file", "write", visible=False, variant="primary")
    return Parts(adapter, find, said, card, decide, keep, swap, drop, undo, write, gr.State(None))


def _button(label: str, place: str, *, visible: bool = True, variant: Any = "secondary") -> gr.Button:
    return gr.Button(label, size="md", variant=variant, elem_id=f"look-{place}", min_width=90, visible=visible)


class LookThrough:
    """The fold's handlers."""

    def __init__(self, app_state: AppState, parts: Parts, name: gr.Dropdown) -> None:
        self.app_state, self.parts, self.name = app_state, parts, name

    def find(self, which: str | None, adapter: str | None) -> Update:
        """Order the pairs of a file by what an adapter has learnt, and show the first."""
        try:
            if not which:
                raise DataError("There are no pairs yet: vote, or upload some.")
            found = self._suspects(which, adapter or "")
        except LoraDPOError as error:
            return {**self.closed(), self.parts.said: red_line(error)}
        count = min(MOST_SHOWN, max(found.against, round(SHARE * len(found.pairs)), 1))
        how = "each scored now" if found.scored else "by the margins that its run kept"
        return self._shown(
            Review(which, adapter or "", found.pairs[:count]),
            f"{adapter} orders {found.against} of {counted(len(found.pairs), 'pair')} the other way round, {how}. ",
        )

    def _suspects(self, which: str, adapter: str) -> Suspects:
        folder, path = self.app_state.find(adapter), self.app_state.pairs.path_of(which)
        if not path.stat().st_size:
            raise DataError("There is no pair in this file.")

        def on(base: Base) -> LoadedModel:
            return LoadedModel(base, attach_adapter(base, folder), folder, open_adapter(folder).chat_template_kwargs)

        try:
            return suspicious_pairs(str(path), folder, load=_not_known)
        except _NotKnown:
            many = len(self.app_state.pairs.entries(which))
        if many > MOST_SCORED:
            raise DataError(
                f"{adapter} was not trained on these {many:,} pairs, and at most {MOST_SCORED} are scored here. Use "
                "lora-dpo data check FILE --learned ADAPTER."
            )
        # Between the answers, and on modules of its own: the adapters that answer stay as they are.
        return self.app_state.host.take_turn(lambda base: suspicious_pairs(str(path), folder, load=lambda: on(base)))

    @told
    def undo(self, review: Review | None) -> Update:
        """Take the last decision back."""
        if review is None or not review.verdicts:
            raise DataError("There is nothing to take back.")
        return self._shown(replace(review, verdicts=review.verdicts[:-1]))

    def deciding(self, verdict: Verdict) -> Any:
        """The handler of one of the three buttons."""

        @told
        def decide(review: Review | None) -> Update:
            if review is None or review.now is None:
                raise DataError("No pair is shown. Press Find them.")
            return self._shown(replace(review, verdicts=(*review.verdicts, verdict)))

        return decide

    @told
    def write(self, review: Review | None) -> Update:
        """Write what was decided to a new file, and choose it."""
        if review is None or not review.verdicts:
            raise DataError("Nothing is decided yet.")
        decided = zip(review.pairs, review.verdicts, strict=False)
        new = self.app_state.pairs.looked_through(review.file, [(one.pair, verdict) for one, verdict in decided])
        said = note(f"Written to {new}, a file of its own: {review.counts()}. {review.file} is as it was.", kind="good")
        choices = gr.update(choices=self.app_state.pairs.names(), value=new)
        return {**self.closed(), self.parts.said: said, self.name: choices}

    def closed(self) -> Update:
        """Nothing is looked through."""
        parts = self.parts
        hidden = {part: gr.update(visible=False) for part in (parts.decide, parts.undo, parts.write)}
        return {parts.card: "", parts.review: None, **hidden}

    def _shown(self, review: Review, first: str = "") -> Update:
        parts, one, done = self.parts, review.now, len(review.verdicts)
        if one is None:
            said = f"All {len(review.pairs)} are looked through: {review.counts()}. Write them to a new file, or undo."
        else:
            said = f"{first}Pair {done + 1} of {len(review.pairs)}; {review.counts()}."
        return {
            parts.said: note(said),
            parts.card: "" if one is None else _card(one),
            parts.decide: gr.update(visible=one is not None),
            parts.undo: gr.update(visible=done > 0),
            parts.write: gr.update(visible=done > 0),
            parts.review: review,
        }


class _NotKnown(Exception):
    """The adapter's run does not know all pairs."""


def _not_known() -> LoadedModel:
    raise _NotKnown


def _card(one: Suspect) -> str:
    """A pair with its margins: the prompt, and both answers side by side where there is room."""
    before = "" if one.before is None else f"{one.before:+.1f} nats before it was learnt from, "
    after = one.margin if one.after is None else one.after
    about = f"line {one.pair.origin.row} · {one.doubt:.0%} against its label · margin {before}{after:+.1f} after"
    asked = "".join(text_block(f"{said['content']}", kind="asked") for said in one.pair.prompt)
    sides = "".join(
        f'<section class="card" aria-label="{name}"><header><strong>{name}</strong></header>'
        f'<div class="text" id="look-{name}">{"".join(answer_html(said["content"]) for said in answer)}</div></section>'
        for name, answer in (("chosen", one.pair.chosen), ("rejected", one.pair.rejected))
    )
    return f'<p class="note">{escape(about)}</p>{asked}<div class="cards">{sides}</div>'
