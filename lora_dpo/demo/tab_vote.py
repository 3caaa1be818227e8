"""The Vote tab: two answers without names, and the key or button for the better one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from lora_dpo.adapters.package import BASE
from lora_dpo.data import Message
from lora_dpo.data.prompts import Prompt, prompts_with_report
from lora_dpo.demo.arena import Match
from lora_dpo.demo.handlers import PRIVATE, Given, Update, client_of, red_line, refusal, sampling_of, terminal, told
from lora_dpo.demo.html import answer_card, note, win_table
from lora_dpo.demo.in_a_terminal import vote_commands
from lora_dpo.demo.pair_store import PROMPT_KINDS, check_upload
from lora_dpo.demo.session import AppState
from lora_dpo.demo.starters import starters
from lora_dpo.errors import Busy, LoraDPOError, PromptTooLong
from lora_dpo.text import counted, one_line

LABELS = {
    "a": ("A is better", "vote-a"),
    "b": ("B is better", "vote-b"),
    "both good": ("Both good", "vote-good"),
    "both bad": ("Both bad", "vote-bad"),
    "skip": ("Skip", "vote-skip"),
}
TYPED = ""
"""Where a prompt comes from that was written here."""
BLUR = "() => { const box = document.querySelector('#vote-box textarea'); if (box && !box.value) box.blur(); }"
"""The keys are for the verdict now, unless someone is writing the next prompt already."""


@dataclass(frozen=True)
class Parts:
    """What is on the tab."""

    players: gr.Dropdown
    ours: gr.Button
    load: gr.UploadButton
    refused: gr.HTML
    """Why an upload was refused."""
    box: gr.Textbox
    asked: gr.HTML
    cards: gr.HTML
    buttons: dict[str, gr.Button]
    go_on: gr.Button
    """The next prompt."""
    status: gr.HTML
    temperature: gr.Slider
    longest: gr.Slider
    wins: gr.HTML
    terminal: gr.Accordion
    commands: gr.Textbox
    match: gr.State
    """The id of the match that is shown."""
    queue: gr.State
    """Prompts that wait."""

    @property
    def chosen(self) -> set[Any]:
        """What a match depends on."""
        return {self.players, self.temperature, self.longest, self.match, self.queue}

    @property
    def outputs(self) -> list[Any]:
        """What a match changes."""
        shown = [self.refused, self.box, self.asked, self.cards, self.status, self.wins, self.go_on]
        return [*shown, self.match, self.queue, *self.buttons.values()]


def build(app_state: AppState, item: gr.Tab, tabs: gr.Tabs, to_vote: gr.Button, *, public: bool = False) -> Parts:
    """Lay the tab out and connect it.

    Args:
        to_vote: a button elsewhere that leads here, with prompts of ours.
        public: visitors write their prompts or take ours; they bring no files, and have no terminal here.
    """
    parts = _layout(app_state, public=public)
    tab = Tab(app_state, parts)
    quiet: dict[str, Any] = {"show_progress": "hidden", **PRIVATE}
    parts.box.submit(tab.ask, {parts.box, *parts.chosen}, parts.outputs, **quiet).then(None, js=BLUR, **PRIVATE)
    parts.ours.click(tab.take_ours, parts.chosen, parts.outputs, **quiet)
    come = to_vote.click(lambda: gr.Tabs(selected="vote"), None, tabs, queue=False, **quiet)
    come.then(tab.take_ours, parts.chosen, parts.outputs, **quiet)
    parts.go_on.click(tab.go_on, parts.chosen, parts.outputs, **quiet)
    if not public:
        parts.load.upload(tab.bring, {parts.load, *parts.chosen}, parts.outputs, **quiet)
        parts.terminal.expand(lambda: vote_commands(app_state), None, parts.commands, queue=False, **quiet)
    for verdict, button in parts.buttons.items():
        button.click(tab.cast(verdict), parts.chosen, parts.outputs, **quiet)
    item.select(lambda: win_table(app_state.pairs.book.records()), None, parts.wins, **quiet)
    return parts


def _layout(app_state: AppState, *, public: bool) -> Parts:
    players, ours, load = _who_and_what(app_state, public=public)
    refused = gr.HTML("", elem_id="vote-refused", elem_classes="refused")
    box = gr.Textbox(
        placeholder="Write a prompt…",
        show_label=False,
        lines=1,
        max_lines=8,
        submit_btn="Ask",
        max_length=32_000,
        elem_id="vote-box",
    )
    asked = gr.HTML("", elem_id="vote-asked")
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
    go_on = gr.Button("Next", size="md", visible=False, elem_id="vote-next")
    with gr.Accordion("Settings", open=False), gr.Row():
        temperature = gr.Slider(0, 2, 0.8, step=0.05, label="Temperature")
        longest = gr.Slider(8, 1024, 160, step=8, label="Longest answer (tokens)", elem_id="vote-longest")
    gr.Markdown("#### Who wins")
    wins = gr.HTML(win_table(app_state.pairs.book.records()), elem_id="vote-wins")
    folded, commands = terminal("vote-commands", visible=not public)
    return Parts(
        players=players,
        ours=ours,
        load=load,
        refused=refused,
        box=box,
        asked=asked,
        cards=cards,
        buttons=buttons,
        go_on=go_on,
        status=status,
        temperature=temperature,
        longest=longest,
        wins=wins,
        terminal=folded,
        commands=commands,
        match=gr.State(""),
        queue=gr.State([]),
    )


def _who_and_what(app_state: AppState, *, public: bool) -> tuple[gr.Dropdown, gr.Button, gr.UploadButton]:
    with gr.Row(elem_classes="bar"):
        players = gr.Dropdown(
            app_state.names(),
            value=[BASE, *filter(None, [app_state.newest()])],
            multiselect=True,
            label="Who answers: two of these, drawn each time; one alone twice",
            elem_id="vote-players",
            scale=3,
        )
        ours = gr.Button("Use 20 of ours", size="md", elem_id="vote-ours", scale=1, min_width=150)
        load = gr.UploadButton(
            "Import prompts", size="md", elem_id="vote-import", scale=1, min_width=150, visible=not public
        )
    return players, ours, load


class Tab:
    """The tab's handlers. Each is given, and yields, values by their parts."""

    def __init__(self, app_state: AppState, parts: Parts) -> None:
        self.app_state, self.parts = app_state, parts

    def ask(self, given: Given, request: gr.Request) -> Iterator[Update]:
        """Two answers to a prompt that was written."""
        text = given[self.parts.box]
        typed = Prompt((Message(role="user", content=text.strip()),), TYPED, 0)
        if text.strip() and self._unvoted(given):
            yield {self.parts.box: "", **self._wait(given, [typed, *given[self.parts.queue]], "Your prompt is next.")}
            return
        yield from self._play_first([typed, *given[self.parts.queue]], given, request, "")

    @told
    def take_ours(self, given: Given, request: gr.Request) -> Iterator[Update]:
        """Prompts of ours that have no vote yet."""
        waiting = given[self.parts.queue]
        known = [prompt.messages for prompt in waiting]
        if (match := self._unvoted(given)) is not None:
            known.append(match.prompt)
        found = [prompt for prompt in starters(self.app_state.pairs.book) if prompt.messages not in known]
        if not found and match is None and not waiting:
            yield self._offer(note("All of ours have your votes. Write a prompt, or import some.", kind="good"))
            return
        yield from self._take([*waiting, *found], given, request, f"{counted(len(found), 'prompt')} of ours.")

    def bring(self, given: Given, request: gr.Request) -> Iterator[Update]:
        """Imported prompts."""
        file = given[self.parts.load]
        if file is None:
            return
        try:
            check_upload(Path(file), Path(file).name, PROMPT_KINDS)
            read, report = prompts_with_report(file)
        except LoraDPOError as error:
            yield {self.parts.refused: red_line(error)}
            return
        found = [Prompt(prompt.messages, Path(file).name, prompt.row, prompt.accepted) for prompt in read]
        said = f"{counted(len(found), 'prompt')} imported: {report.summary(Path(file).name)}."
        yield {self.parts.refused: ""}
        yield from self._take([*given[self.parts.queue], *found], given, request, said)

    @told
    def go_on(self, given: Given, request: gr.Request) -> Iterator[Update]:
        """The next prompt: one that waits, or the one that was offered."""
        queue = given[self.parts.queue] or starters(self.app_state.pairs.book)[:1]
        if queue and self._unvoted(given) is None:
            yield from self._play_first(queue, given, request, "")

    def cast(self, verdict: str) -> Callable[..., Iterator[Update]]:
        """The handler of one verdict: write it down, tell the names, go on with the next prompt that waits."""

        @told
        def voted(given: Given, request: gr.Request) -> Iterator[Update]:
            done = self.app_state.arena.vote(given[self.parts.match], verdict)
            said = note(_told_after(self.app_state, done, verdict), kind="good")
            yield {
                self.parts.cards: _cards_of(done, names=done.players),
                self.parts.status: said,
                self.parts.wins: win_table(self.app_state.pairs.book.records()),
                self.parts.match: "",
                **self._buttons(False),
            }
            if given[self.parts.queue]:
                yield from self._play_first(given[self.parts.queue], given, request, said)
            else:
                yield self._offer(said)

        return voted

    def _take(self, queue: list[Prompt], given: Given, request: gr.Request, said: str) -> Iterator[Update]:
        """Begin with prompts that came, or let them wait: a match without its vote is never replaced."""
        if self._unvoted(given) is not None:
            yield self._wait(given, queue, said)
        else:
            yield from self._play_first(queue, given, request, note(said, kind="good"))

    def _unvoted(self, given: Given) -> Match | None:
        return self.app_state.arena.unvoted(given[self.parts.match])

    def _wait(self, given: Given, queue: list[Prompt], said: str) -> Update:
        first = "Vote on these two first, or skip them."
        return {
            self.parts.queue: queue,
            self.parts.asked: _asked(self._unvoted(given), len(queue)),
            self.parts.status: note(f"{said} {first}", kind="good"),
        }

    def _offer(self, said: str) -> Update:
        """Nothing is left to ask: offer a prompt of ours that is one key away."""
        ours = starters(self.app_state.pairs.book)[:1]
        label = f"Ask next: {one_line(ours[0].text, 60)}" if ours else ""
        return {self.parts.status: said, self.parts.go_on: gr.update(visible=bool(ours), value=label)}

    def _play_first(self, queue: list[Prompt], given: Given, request: gr.Request, said: str) -> Iterator[Update]:
        """Show the first prompt that the model takes; one from a file that it refuses is left out, and said."""
        parts = self.parts
        while queue:
            first, *rest = queue
            try:
                yield from self._play(first, rest, given, client_of(request), said)
                return
            except LoraDPOError as error:
                stopped: Update = {parts.match: "", **self._buttons(False)}
                if first.source == TYPED:
                    box = gr.update(value=first.text, submit_btn="Ask")
                    yield {**stopped, parts.box: box, parts.queue: rest}
                    raise refusal(error) from None
                if isinstance(error, Busy) and not isinstance(error, PromptTooLong):  # its turn comes again
                    again = gr.update(visible=True, value=f"Go on with {counted(len(queue), 'prompt')}")
                    yield {**stopped, parts.box: gr.update(submit_btn="Ask"), parts.queue: queue, parts.go_on: again}
                    raise refusal(error) from None
                said += note(f"The prompt of {first.source}, row {first.row}, is left out: {error}", kind="bad")
                queue = rest
        said += note("That was the last prompt. Import more, or write one.", kind="good")
        shown = {parts.box: gr.update(submit_btn="Ask"), parts.match: "", parts.queue: [], **self._buttons(False)}
        yield {**shown, **self._offer(said)}

    def _play(self, prompt: Prompt, rest: list[Prompt], given: Given, client: str, said: str) -> Iterator[Update]:
        """Draw a match and show its answers as they are written; then the buttons work."""
        arena, parts = self.app_state.arena, self.parts
        source = f"{prompt.source}:{prompt.row}" if prompt.source else None
        sampling = sampling_of(given[parts.temperature], 0.95, given[parts.longest], 0)
        match = arena.draw(prompt.messages, given[parts.players], sampling, source=source)
        yield {
            parts.box: gr.update(submit_btn=False) | ({"value": ""} if prompt.source == TYPED else {}),
            parts.asked: _asked(match, len(rest)),
            parts.cards: _cards("", "", writing=True),
            parts.status: said,
            parts.go_on: gr.update(visible=False),
            parts.match: match.id,
            parts.queue: rest,
            **self._buttons(False),
        }
        for a, b in arena.answers(match, client=client):
            yield {parts.cards: _cards(a, b, writing=True)}
        yield {parts.box: gr.update(submit_btn="Ask"), parts.cards: _cards_of(match), **self._buttons(match.ready)}

    def _buttons(self, on: bool) -> Update:
        return {button: gr.update(interactive=on) for button in self.parts.buttons.values()}


def _asked(match: Match | None, waiting: int = 0) -> str:
    if match is None:
        return ""
    more = f"<small>{counted(waiting, 'more prompt')} after this one</small>" if waiting else ""
    turns = "".join(
        f"<div><small>{escape(said['role'])}</small>{escape(said['content'])}</div>"
        if len(match.prompt) > 1
        else f"<div>{escape(said['content'])}</div>"
        for said in match.prompt
    )
    return f'<div class="asked text">{turns}{more}</div>'


def _cards_of(match: Match, *, names: Sequence[str | None] = (None, None)) -> str:
    """Both whole answers, those marked that were cut at their longest."""
    a, b = match.answers
    return _cards(a.text if a else "", b.text if b else "", names=names, cut=(bool(a and a.cut), bool(b and b.cut)))


def _cards(
    a: str,
    b: str,
    *,
    writing: bool = False,
    names: Sequence[str | None] = (None, None),
    cut: Sequence[bool] = (False, False),
) -> str:
    sides = zip("AB", (a, b), names, cut, strict=True)
    both = (answer_card(letter, text, writing=writing, name=name, cut=short) for letter, text, name, short in sides)
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
