"""The Chat tab: one model, or two side by side on the same words and the same seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from lora_dpo.adapters.package import BASE
from lora_dpo.demo.about import who_line
from lora_dpo.demo.conversation import Conversation, StreamedAnswer, Turn, ask
from lora_dpo.demo.handlers import (
    PRIVATE,
    Given,
    Update,
    client_of,
    folded,
    markdown,
    plain_text,
    refusal,
    sampling_of,
    terminal,
    told,
)
from lora_dpo.demo.html import said_line
from lora_dpo.demo.in_a_terminal import chat_command
from lora_dpo.demo.machine_paths import without_paths
from lora_dpo.demo.remembered import recalled, remembered
from lora_dpo.demo.session import AppState
from lora_dpo.demo.starters import EXAMPLES
from lora_dpo.errors import LoraDPOError
from lora_dpo.model.decoding import Sampling

NOBODY = "(nobody)"
HEIGHT = "max(260px, calc(100vh - 510px))"
FOCUS = "() => { if (matchMedia('(min-width: 900px)').matches) document.querySelector('#chat-box textarea')?.focus(); }"
"""Write at once, but on a phone, where the page would begin at its end."""
STORED = "lora-dpo-chat"
"""Where the browser keeps the conversation."""


@dataclass(frozen=True)
class Parts:
    """What is on the tab."""

    left: gr.Dropdown
    right: gr.Dropdown
    right_column: gr.Column
    who: tuple[gr.HTML, gr.HTML]
    chats: tuple[gr.Chatbot, gr.Chatbot]
    lines: tuple[gr.HTML, gr.HTML]
    examples: gr.Row
    example_buttons: list[gr.Button]
    to_vote: gr.Button
    """Leads to the Vote tab, with prompts of ours."""
    box: gr.Textbox
    system: gr.Textbox
    temperature: gr.Slider
    top_p: gr.Slider
    longest: gr.Slider
    seed: gr.Number
    new: gr.Button
    terminal: gr.Accordion
    command: gr.Textbox
    conversation: gr.State
    memory: gr.BrowserState

    @property
    def chosen(self) -> set[Any]:
        """What an answer depends on."""
        settings = {self.system, self.temperature, self.top_p, self.longest, self.seed}
        return {self.conversation, self.left, self.right} | settings

    @property
    def outputs(self) -> list[Any]:
        """What an answer changes."""
        return [self.box, *self.chats, *self.lines, self.examples, self.conversation, self.memory]


def build(app_state: AppState, page: gr.Blocks, *, public: bool = False) -> Parts:
    """Lay the tab out and connect it.

    Args:
        public: for visitors, who have no terminal here.
    """
    parts = _layout(app_state, public=public)
    tab = Tab(app_state, parts, public=public)
    quiet: dict[str, Any] = {"show_progress": "hidden", **PRIVATE}
    at_once: dict[str, Any] = {"queue": False, **quiet}
    parts.box.submit(tab.send, {parts.box, *parts.chosen}, parts.outputs, **quiet)
    parts.box.stop(Conversation.stop, parts.conversation, None, **at_once)
    for text, button in zip(EXAMPLES, parts.example_buttons, strict=True):
        button.click(tab.example(text), parts.chosen, parts.outputs, **quiet)
    for chat in parts.chats:
        chat.retry(tab.retry, parts.chosen, parts.outputs, **quiet)
        chat.edit(tab.edit, parts.chosen, parts.outputs, **quiet)
        chat.clear(tab.new, parts.conversation, parts.outputs, **at_once)
    parts.new.click(tab.new, parts.conversation, parts.outputs, **at_once)
    for picker in (parts.left, parts.right):
        picker.input(tab.tell_doubt, picker, None, **at_once)
        picker.change(tab.named, {parts.left, parts.right}, [parts.right_column, *parts.who], **at_once)
    named = [parts.left, parts.right, parts.right_column, *parts.who, parts.system]
    page.load(None, js=FOCUS, **PRIVATE)
    page.load(tab.restore, parts.memory, [*parts.outputs, *named], **at_once)
    if not public:
        settings: list[Any] = [parts.left, parts.right, parts.system]
        settings += [parts.temperature, parts.top_p, parts.longest, parts.seed]
        shown = [parts.terminal.expand, *(setting.change for setting in settings)]
        gr.on(shown, tab.in_a_terminal, parts.chosen, parts.command, **at_once)
    return parts


def _layout(app_state: AppState, *, public: bool) -> Parts:
    names = app_state.names()
    adapter = app_state.newest()
    beside = adapter or NOBODY
    with gr.Row(elem_classes="pickers"):
        left = gr.Dropdown(names, value=BASE, label="Model", elem_id="chat-left", filterable=len(names) > 8)
        right = gr.Dropdown([NOBODY, *names], value=beside, label="Beside it", elem_id="chat-right", filterable=False)
    sides = []
    with gr.Row(elem_id="chat-sides"):
        for side, name in enumerate((BASE, beside)):
            with gr.Column(min_width=300, visible=side == 0 or adapter is not None) as column:
                who = gr.HTML(_who(app_state, name, public=public), elem_id=f"chat-who-{side}")
                sides.append((column, who, _chatbot(side), gr.HTML("", elem_id=f"chat-line-{side}")))
    (_, who, chat, line), (right_column, other_who, other_chat, other_line) = sides
    with gr.Row(elem_id="chat-examples") as examples:
        buttons = [
            gr.Button(text, size="md", elem_id=f"chat-example-{number}", min_width=150)
            for number, text in enumerate(EXAMPLES)
        ]
        to_vote = gr.Button("Vote on 20 of ours\u00a0→", size="md", elem_id="chat-to-vote", min_width=150)
    box = gr.Textbox(
        placeholder="Ask something…",
        show_label=False,
        lines=1,
        max_lines=8,
        submit_btn="Send",
        max_length=32_000,
        elem_id="chat-box",
    )
    system, temperature, top_p, longest, seed = _settings()
    new = gr.Button("New chat", size="sm", elem_id="chat-new")
    folded, command = terminal("chat-command", visible=not public)
    return Parts(
        left=left,
        right=right,
        right_column=right_column,
        who=(who, other_who),
        chats=(chat, other_chat),
        lines=(line, other_line),
        examples=examples,
        example_buttons=buttons,
        to_vote=to_vote,
        box=box,
        system=system,
        temperature=temperature,
        top_p=top_p,
        longest=longest,
        seed=seed,
        new=new,
        terminal=folded,
        command=command,
        conversation=gr.State(Conversation()),
        memory=gr.BrowserState(None, storage_key=STORED, secret=STORED),  # so that it outlives this server, too
    )


def _settings() -> tuple[gr.Textbox, gr.Slider, gr.Slider, gr.Slider, gr.Number]:
    with gr.Accordion("Settings", open=False):
        system = gr.Textbox("", label="System prompt", lines=2, max_length=8_000, elem_id="chat-system")
        with gr.Row():
            temperature = gr.Slider(
                0, 2, 0.7, step=0.05, label="Temperature (0: always the likeliest word)", elem_id="chat-temperature"
            )
            top_p = gr.Slider(0.05, 1, 0.95, step=0.05, label="Top-p")
        with gr.Row():
            longest = gr.Slider(8, 1024, 256, step=8, label="Longest answer (tokens)", elem_id="chat-longest")
            seed = gr.Number(0, precision=0, label="Seed")
    return system, temperature, top_p, longest, seed


def _chatbot(side: int) -> gr.Chatbot:
    return gr.Chatbot(
        show_label=False,
        height=HEIGHT,
        editable="user",
        buttons=["copy"],
        latex_delimiters=[],
        sanitize_html=True,
        feedback_options=None,
        layout="bubble",
        placeholder="Click on an example below, or ask something of your own.",
        elem_id=f"chat-{side}",
    )


class Tab:
    """The tab's handlers. Each is given, and returns, values by their parts."""

    def __init__(self, app_state: AppState, parts: Parts, *, public: bool) -> None:
        self.app_state, self.parts, self.public = app_state, parts, public

    def send(self, given: Given, request: gr.Request) -> Iterator[Update]:
        """Answer what was written."""
        yield from self._answer(given[self.parts.box], given, request)

    def example(self, text: str) -> Callable[..., Iterator[Update]]:
        """The handler of a prompt of ours."""

        def clicked(given: Given, request: gr.Request) -> Iterator[Update]:
            yield from self._answer(text, given, request)

        return clicked

    @told
    def retry(self, data: gr.RetryData, given: Given, request: gr.Request) -> Iterator[Update]:
        """Answer the same words with another seed."""
        cut = given[self.parts.conversation].cut_from(_exchange(data.index))
        yield from self._answer(cut[0].user, given, request, cut=cut, again=True)

    @told
    def edit(self, data: gr.EditData, given: Given, request: gr.Request) -> Iterator[Update]:
        """Answer other words in their place."""
        cut = given[self.parts.conversation].cut_from(_exchange(data.index))
        yield from self._answer(plain_text(str(data.value)), given, request, cut=cut)

    @told
    def tell_doubt(self, who: str) -> None:
        """Say what of the chosen adapter's base differs from this one."""
        if incompatibility := self.app_state.host.incompatibility(who):
            # HTML there, and it may quote a name from outside
            gr.Warning(escape(without_paths(incompatibility)), duration=15)

    @told
    def named(self, given: Given) -> Update:
        """Say who answers."""
        left, right = given[self.parts.left], given[self.parts.right]
        names = (_who(self.app_state, name, public=self.public) for name in (left, right))
        return {self.parts.right_column: gr.update(visible=right != NOBODY), **_zip(self.parts.who, names)}

    def new(self, conversation: Conversation) -> Update:
        """Forget the conversation, also while an answer is being written."""
        conversation.dropped = True
        conversation.stop()
        return {**self._shown(Conversation()), self.parts.memory: {}}  # None would leave it as it was

    @told
    def restore(self, found: Any) -> Update:
        """The conversation that this browser had, as far as those who spoke are still here."""
        conversation, left, right, system = recalled(found)
        if not conversation.exchanges:
            return {self.parts.box: gr.skip()}
        names, shown = self.app_state.names(), self._shown(conversation)
        left = left if left in names else BASE
        right = right if right in names else NOBODY
        shown |= {self.parts.left: left, self.parts.right: right, self.parts.system: system}
        return shown | self.named({self.parts.left: left, self.parts.right: right})

    @told
    def in_a_terminal(self, given: Given) -> str:
        """The command line that does the same."""
        parts = self.parts
        return chat_command(self.app_state, self._players(given), self._sampling(given), given[parts.system])

    def _players(self, given: Given) -> list[str]:
        return [name for name in (given[self.parts.left], given[self.parts.right]) if name != NOBODY]

    def _sampling(self, given: Given) -> Sampling:
        parts = self.parts
        return sampling_of(*(given[part] for part in (parts.temperature, parts.top_p, parts.longest, parts.seed)))

    def _shown(self, conversation: Conversation) -> Update:
        """A conversation, and the examples where there is none yet."""
        parts = self.parts
        last = conversation.exchanges[-1].answers if conversation.exchanges else [None, None]
        return {
            **_zip(parts.chats, _views(conversation)),
            **_zip(parts.lines, map(said_line, last)),
            parts.examples: gr.update(visible=not conversation.exchanges),
            parts.conversation: conversation,
        }

    def _answer(
        self, text: str, given: Given, request: gr.Request, *, cut: Sequence[Turn] = (), again: bool = False
    ) -> Iterator[Update]:
        """Answer; `cut` is what the answer takes the place of, and comes back if the host refuses."""
        parts, said, players = self.parts, given[self.parts.conversation], self._players(given)
        system, client = given[parts.system], client_of(request)
        idle = {parts.box: gr.update(submit_btn="Send", stop_btn=False)}
        before = len(said.exchanges)
        busy: Update = {parts.box: gr.update(value="", submit_btn=False, stop_btn="Stop")}
        try:
            host, sampling = self.app_state.host, self._sampling(given)
            for exchange in ask(host, said, text, players, sampling, system=system, client=client, again=again):
                if said.dropped:
                    break
                yield {**busy, **self._shown(said), **_zip(parts.lines, _lines(exchange.answers, players))}
                busy = {}
        except LoraDPOError as error:
            if len(said.exchanges) == before:  # nothing has come in its place
                said.exchanges.extend(cut)
            if said.dropped:
                yield {**idle, **self._shown(Conversation())}
                return
            box = gr.update(value="" if again else text, submit_btn="Send", stop_btn=False)
            yield {parts.box: box, **self._shown(said), **_zip(parts.lines, ("", ""))}
            raise refusal(error) from None
        if said.dropped:  # what was shown last may have reached the page after `new` had emptied it
            yield {**idle, **self._shown(Conversation())}
            return
        memory = remembered(said, given[parts.left], given[parts.right], system)
        yield {**idle, **self._shown(said), parts.memory: memory}


def _who(app_state: AppState, name: str, *, public: bool) -> str:
    return "" if name == NOBODY else who_line(app_state, name, public=public)


def _exchange(index: Any) -> int:
    """The exchange that a message of the shown list belongs to: each is two messages."""
    return int(index[0] if isinstance(index, list | tuple) else index) // 2


def _zip(parts: Sequence[Any], values: Any) -> Update:
    return dict(zip(parts, values, strict=True))


def _views(conversation: Conversation) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    sides: tuple[list[dict[str, str]], list[dict[str, str]]] = ([], [])
    for exchange in conversation.exchanges:
        for side, said in zip(sides, exchange.answers, strict=True):
            side.append({"role": "user", "content": markdown(exchange.user)})
            side.append({"role": "assistant", "content": folded(said.text) if said and said.text else "…"})
    return sides


def _lines(answers: list[StreamedAnswer | None], players: list[str]) -> tuple[str, str]:
    last = max((side for side, said in enumerate(answers) if said is not None), default=-1)
    shown = [said_line(said, writing=side == last) for side, said in enumerate(answers)]
    return shown[0], shown[1] if len(players) > 1 else ""
