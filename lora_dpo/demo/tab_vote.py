"""The Vote tab: two answers without names, and the key or button for the better one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from lora_dpo.data import Message
from lora_dpo.data.prompts import Prompt, prompts_with_report
from lora_dpo.demo.arena import Match
from lora_dpo.demo.handlers import client_of, refusal, sampling_of, told
from lora_dpo.demo.html import answer_card, note, win_table
from lora_dpo.demo.pair_store import PROMPT_KINDS, check_upload
from lora_dpo.demo.session import AppState
from lora_dpo.errors import Busy, LoraDPOError, PromptTooLong

LABELS = {
    "a": ("A is better", "vote-a"),
    "b": ("B is better", "vote-b"),
    "both good": ("Both good", "vote-good"),
    "both bad": ("Both bad", "vote-bad"),
    "skip": ("Skip", "vote-skip"),
}
OUTPUTS = 7 + len(LABELS)
"""Box, prompt, cards, status, table, match and queue; then the buttons."""

State = tuple[Any, ...]


@dataclass(frozen=True)
class Parts:
    """What is on the tab."""

    players: gr.Dropdown
    load: gr.UploadButton
    box: gr.Textbox
    shown: tuple[gr.HTML, gr.HTML, gr.HTML, gr.HTML]
    """Prompt, cards, status, table."""
    buttons: dict[str, gr.Button]
    numbers: tuple[gr.Slider, gr.Slider]
    """Temperature and longest answer."""


def build(app_state: AppState, item: gr.Tab, *, public: bool = False) -> tuple[gr.Dropdown, gr.HTML]:
    """Lay the tab out and connect it; returns what is to be refreshed: the picker of players, and who wins.

    Args:
        public: visitors write their prompts; they bring no files.
    """
    parts = _layout(app_state)
    tab = Tab(app_state)
    match_id, queue = gr.State(""), gr.State([])
    outputs = [parts.box, *parts.shown, match_id, queue, *parts.buttons.values()]
    settings = [parts.players, *parts.numbers, queue]
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    parts.box.submit(tab.ask, [parts.box, *settings], outputs, **quiet)
    if public:
        parts.load.visible = False
    else:
        parts.load.upload(tab.bring, [parts.load, *settings], outputs, **quiet)
    for verdict, button in parts.buttons.items():
        button.click(tab.cast(verdict), [match_id, *settings], outputs, **quiet)
    item.select(lambda: win_table(app_state.pairs.book.records()), None, parts.shown[3], **quiet)
    return parts.players, parts.shown[3]


def _layout(app_state: AppState) -> Parts:
    names = app_state.names()
    with gr.Row(elem_classes="bar"):
        players = gr.Dropdown(
            names,
            value=names[:2],
            multiselect=True,
            label="Who answers: two of these, drawn each time; one alone twice",
            elem_id="vote-players",
            scale=3,
        )
        load = gr.UploadButton(
            "Import prompts", file_types=list(PROMPT_KINDS), size="md", elem_id="vote-import", scale=1, min_width=150
        )
    box = gr.Textbox(
        placeholder="Write a prompt…",
        show_label=False,
        lines=1,
        max_lines=8,
        submit_btn="Ask",
        max_length=32_000,
        elem_id="vote-box",
    )
    asked = gr.HTML(_asked(None), elem_id="vote-asked")
    cards = gr.HTML(_cards("", ""), elem_id="vote-cards")
    with gr.Row(elem_id="vote-buttons"):
        buttons = {
            verdict: gr.Button(
                label,
                elem_id=place,
                interactive=False,
                variant="primary" if verdict in ("a", "b") else "secondary",
                size="md",
            )
            for verdict, (label, place) in LABELS.items()
        }
    status = gr.HTML(note(""), elem_id="vote-status")
    with gr.Accordion("Settings", open=False), gr.Row():
        temperature = gr.Slider(0, 2, 0.8, step=0.05, label="Temperature")
        longest = gr.Slider(8, 1024, 160, step=8, label="Longest answer (tokens)", elem_id="vote-longest")
    gr.Markdown("#### Who wins")
    wins = gr.HTML(win_table(app_state.pairs.book.records()), elem_id="vote-wins")
    return Parts(players, load, box, (asked, cards, status, wins), buttons, (temperature, longest))


class Tab:
    """The tab's handlers. Each yields values for all `OUTPUTS`."""

    def __init__(self, app_state: AppState) -> None:
        self.app_state = app_state

    def ask(
        self, text: str, who: list[str], temp: float, most: float, left: list[Prompt], request: gr.Request
    ) -> Iterator[State]:
        """Two answers to a prompt that was written."""
        prompt = [Message(role="user", content=text.strip())]
        try:
            yield from self._play(prompt, who, (temp, most), left, client_of(request), note(""))
        except LoraDPOError as error:
            yield (gr.update(value=text, submit_btn="Ask"), *[gr.skip()] * (OUTPUTS - 1))
            raise refusal(error) from None

    @told
    def bring(
        self, file: str | None, who: list[str], temp: float, most: float, left: list[Prompt], request: gr.Request
    ) -> Iterator[State]:
        """The first of some imported prompts."""
        if file is None:
            return
        check_upload(Path(file), Path(file).name, PROMPT_KINDS)
        read, report = prompts_with_report(file)
        found = [_named(prompt, Path(file).name) for prompt in read]
        said = note(f"{len(found)} prompts imported: {report.summary(Path(file).name)}.", kind="good")
        yield from self._play_first(found, who, (temp, most), client_of(request), said)

    def cast(self, verdict: str) -> Callable[..., Iterator[State]]:
        """The handler of one verdict: write it down, tell the names, go on with the next imported prompt."""
        app_state = self.app_state

        @told
        def voted(
            match: str, who: list[str], temp: float, most: float, left: list[Prompt], request: gr.Request
        ) -> Iterator[State]:
            done = app_state.arena.vote(match, verdict)
            said = note(_told_after(app_state, done, verdict), kind="good")
            names = _cards(*(answer.text for answer in done.answers if answer), names=done.players)
            table = win_table(app_state.pairs.book.records())
            rest = left[1:] if left and tuple(left[0].messages) == done.prompt else left
            yield (gr.skip(), gr.skip(), names, said, table, "", rest, *_buttons(False))
            if left:
                yield from self._play_first(rest, who, (temp, most), client_of(request), said)

        return voted

    def _play_first(
        self, queue: list[Prompt], who: list[str], numbers: tuple[float, float], client: str, said: str
    ) -> Iterator[State]:
        """Show the first imported prompt that the model takes; one that it refuses is left out, and said."""
        while queue:
            try:
                yield from self._play(queue[0].messages, who, numbers, queue, client, said)
                return
            except LoraDPOError as error:
                if isinstance(error, Busy) and not isinstance(error, PromptTooLong):  # its turn comes again
                    yield (gr.update(submit_btn="Ask"), *[gr.skip()] * (OUTPUTS - 1))
                    raise
                said += note(f"The prompt of {queue[0].source}, row {queue[0].row}, is left out: {error}", kind="bad")
                queue = queue[1:]
        said += note("That was the last imported prompt. Import more, or write one.", kind="good")
        yield (gr.update(submit_btn="Ask"), gr.skip(), gr.skip(), said, gr.skip(), "", [], *_buttons(False))

    def _play(
        self,
        prompt: Sequence[Message],
        who: list[str],
        numbers: tuple[float, float],
        left: list[Prompt],
        client: str,
        was: str,
    ) -> Iterator[State]:
        """Draw a match and show its answers as they are written; then the buttons work."""
        arena = self.app_state.arena
        source = f"{left[0].source}:{left[0].row}" if left and tuple(left[0].messages) == tuple(prompt) else None
        match = arena.draw(prompt, who, sampling_of(numbers[0], 0.95, numbers[1], 0), source=source)
        box = gr.update(value="", submit_btn=False)
        empty = _cards("", "", writing=True)
        yield (box, _asked(match, left), empty, was, gr.skip(), match.id, left, *_buttons(False))
        for a, b in arena.answers(match, client=client):
            yield (gr.skip(), gr.skip(), _cards(a, b, writing=True), *[gr.skip()] * (OUTPUTS - 3))
        done = [said.text if said else "" for said in match.answers]
        box = gr.update(submit_btn="Ask")
        yield (box, gr.skip(), _cards(*done), *[gr.skip()] * 4, *_buttons(match.ready))


def _buttons(on: bool) -> list[Any]:
    return [gr.update(interactive=on)] * len(LABELS)


def _named(prompt: Prompt, name: str) -> Prompt:
    return Prompt(prompt.messages, name, prompt.row, prompt.accepted)


def _asked(match: Match | None, left: Sequence[Prompt] = ()) -> str:
    if match is None:
        return ""
    more = f"<small>{len(left) - 1} more imported prompts after this one</small>" if len(left) > 1 else ""
    turns = "".join(
        f"<div><small>{escape(said['role'])}</small>{escape(said['content'])}</div>"
        if len(match.prompt) > 1
        else f"<div>{escape(said['content'])}</div>"
        for said in match.prompt
    )
    return f'<div class="asked text">{turns}{more}</div>'


def _cards(a: str, b: str, *, writing: bool = False, names: Sequence[str | None] = (None, None)) -> str:
    both = (answer_card("A", a, writing=writing, name=names[0]), answer_card("B", b, writing=writing, name=names[1]))
    return f'<div class="cards">{"".join(both)}</div>'


def _told_after(app_state: AppState, match: Match, verdict: str) -> str:
    a, b = match.players
    pairs, others = app_state.pairs.book.count()
    kept = f"Saved: {pairs} {'pair' if pairs == 1 else 'pairs'} to train on, {others} other votes."
    if a == b:
        return f"Both were {a}. {kept}"
    if verdict in ("a", "b"):
        winner, loser = (a, b) if verdict == "a" else (b, a)
        return f"You preferred {winner} over {loser}. {kept}"
    return f"A was {a}, B was {b}. {kept}"
