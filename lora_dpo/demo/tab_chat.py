"""The Chat tab: one model, or two side by side on the same words and the same seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from lora_dpo.demo.conversation import Conversation, StreamedAnswer, Turn, ask
from lora_dpo.demo.handlers import client_of, markdown, plain_text, refusal, sampling_of, told
from lora_dpo.demo.html import said_line
from lora_dpo.demo.session import AppState
from lora_dpo.errors import LoraDPOError

NOBODY = "(nobody)"
HEIGHT = "max(300px, calc(100vh - 430px))"

State = tuple[Any, ...]
_EMPTY: State = ([], [], "", "")
"""Both views and both lines of a new conversation."""


@dataclass(frozen=True)
class Parts:
    """What is on the tab."""

    left: gr.Dropdown
    right: gr.Dropdown
    right_column: gr.Column
    chats: tuple[gr.Chatbot, gr.Chatbot]
    lines: tuple[gr.HTML, gr.HTML]
    box: gr.Textbox
    settings: tuple[gr.Textbox, gr.Slider, gr.Slider, gr.Slider, gr.Number]
    """System prompt, temperature, top-p, longest answer, seed."""
    new: gr.Button


def build(app_state: AppState) -> list[tuple[gr.Dropdown, bool]]:
    """Lay the tab out and connect it; returns its pickers, and for each whether "nobody" can be picked."""
    parts = _layout(app_state)
    tab = Tab(app_state)
    conversation = gr.State(Conversation())
    settings = [conversation, parts.left, parts.right, *parts.settings]
    outputs = [parts.box, *parts.chats, *parts.lines, conversation]
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    at_once: dict[str, Any] = {"queue": False, "api_visibility": "private"}
    parts.box.submit(tab.send, [parts.box, *settings], outputs, **quiet)
    parts.box.stop(Conversation.stop, conversation, None, **at_once)
    for chat in parts.chats:
        chat.retry(tab.retry, settings, outputs, **quiet)
        chat.edit(tab.edit, settings, outputs, **quiet)
        chat.clear(tab.new, conversation, outputs, **at_once)
    parts.new.click(tab.new, conversation, outputs, **at_once)
    for picker in (parts.left, parts.right):
        picker.input(tab.tell_doubt, picker, None, **at_once)
    parts.right.change(lambda beside: gr.update(visible=beside != NOBODY), parts.right, parts.right_column, **at_once)
    return [(parts.left, False), (parts.right, True)]


def _layout(app_state: AppState) -> Parts:
    names = app_state.names()
    first = names[1] if len(names) > 1 else names[0]
    with gr.Row():
        left = gr.Dropdown(names, value=first, label="Model", elem_id="chat-left", filterable=len(names) > 8)
        right = gr.Dropdown([NOBODY, *names], value=NOBODY, label="Beside it", elem_id="chat-right", filterable=False)
    with gr.Row():
        with gr.Column(min_width=300):
            one, line = _chatbot(0), gr.HTML(said_line(None), elem_id="chat-line-0")
        with gr.Column(min_width=300, visible=False) as right_column:
            other, other_line = _chatbot(1), gr.HTML(said_line(None), elem_id="chat-line-1")
    box = gr.Textbox(
        placeholder="Ask something…",
        show_label=False,
        lines=1,
        max_lines=8,
        submit_btn="Send",
        autofocus=True,
        max_length=32_000,
        elem_id="chat-box",
    )
    with gr.Accordion("Settings", open=False):
        system = gr.Textbox(label="System prompt", lines=2, max_length=8_000, elem_id="chat-system")
        with gr.Row():
            temperature = gr.Slider(
                0, 2, 0.7, step=0.05, label="Temperature (0: always the likeliest word)", elem_id="chat-temperature"
            )
            top_p = gr.Slider(0.05, 1, 0.95, step=0.05, label="Top-p")
        with gr.Row():
            longest = gr.Slider(8, 1024, 256, step=8, label="Longest answer (tokens)", elem_id="chat-longest")
            seed = gr.Number(0, precision=0, label="Seed")
    new = gr.Button("New chat", size="sm", elem_id="chat-new")
    settings = (system, temperature, top_p, longest, seed)
    return Parts(left, right, right_column, (one, other), (line, other_line), box, settings, new)


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
        placeholder="Say something below. Each model answers with the same seed.",
        elem_id=f"chat-{side}",
    )


class Tab:
    """The tab's handlers. Gradio fills in events and requests by annotations, so settings are named one by one."""

    def __init__(self, app_state: AppState) -> None:
        self.app_state = app_state

    def send(
        self,
        text: str,
        conversation: Conversation,
        left: str,
        right: str,
        system: str,
        temperature: float,
        top_p: float,
        longest: float,
        seed: float,
        request: gr.Request,
    ) -> Iterator[State]:
        """Answer what was written."""
        chosen = (conversation, left, right, system, temperature, top_p, longest, seed)
        yield from self._answer(text, False, chosen, request)

    @told
    def retry(
        self,
        data: gr.RetryData,
        conversation: Conversation,
        left: str,
        right: str,
        system: str,
        temperature: float,
        top_p: float,
        longest: float,
        seed: float,
        request: gr.Request,
    ) -> Iterator[State]:
        """Answer the same words with another seed."""
        chosen = (conversation, left, right, system, temperature, top_p, longest, seed)
        cut = conversation.cut_from(_exchange(data.index))
        yield from self._answer(cut[0].user, True, chosen, request, cut)

    @told
    def edit(
        self,
        data: gr.EditData,
        conversation: Conversation,
        left: str,
        right: str,
        system: str,
        temperature: float,
        top_p: float,
        longest: float,
        seed: float,
        request: gr.Request,
    ) -> Iterator[State]:
        """Answer other words in their place."""
        cut = conversation.cut_from(_exchange(data.index))
        chosen = (conversation, left, right, system, temperature, top_p, longest, seed)
        yield from self._answer(plain_text(str(data.value)), False, chosen, request, cut)

    def tell_doubt(self, who: str) -> None:
        """Say what of the chosen adapter's base differs from this one."""
        if incompatibility := self.app_state.host.incompatibility(who):
            gr.Warning(escape(incompatibility), duration=15)  # HTML there, and it may quote a name from outside

    def new(self, conversation: Conversation) -> State:
        """Forget the conversation, also while an answer is being written."""
        conversation.dropped = True
        conversation.stop()
        return (gr.skip(), *_EMPTY, Conversation())

    def _answer(
        self, text: str, again: bool, chosen: tuple[Any, ...], request: gr.Request, cut: Sequence[Turn] = ()
    ) -> Iterator[State]:
        """Answer; `cut` is what the answer takes the place of, and comes back if the host refuses."""
        said, who, beside, system, *numbers = chosen
        players = [who] if beside == NOBODY else [who, beside]
        client = client_of(request)
        sampling = sampling_of(*numbers)
        busy = gr.update(value="", submit_btn=False, stop_btn="Stop")
        idle = gr.update(submit_btn="Send", stop_btn=False)
        host, before = self.app_state.host, len(said.exchanges)
        try:
            for exchange in ask(host, said, text, players, sampling, system=system, client=client, again=again):
                if said.dropped:
                    break
                yield (busy, *_views(said), *_lines(exchange.answers, players), said)
                busy = gr.skip()
        except LoraDPOError as error:
            if len(said.exchanges) == before:  # nothing has come in its place
                said.exchanges.extend(cut)
            if said.dropped:
                yield (idle, *_EMPTY, Conversation())
                return
            box = gr.update(value="" if again else text, submit_btn="Send", stop_btn=False)
            yield (box, *_views(said), "", "", said)
            raise refusal(error) from None
        if said.dropped:  # what was shown last may have reached the page after `new` had emptied it
            yield (idle, *_EMPTY, Conversation())
            return
        last = said.exchanges[-1].answers if said.exchanges else [None, None]
        yield (idle, *_views(said), *map(said_line, last), said)


def _exchange(index: Any) -> int:
    """The exchange that a message of the shown list belongs to: each is two messages."""
    return int(index[0] if isinstance(index, list | tuple) else index) // 2


def _views(conversation: Conversation) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    sides: tuple[list[dict[str, str]], list[dict[str, str]]] = ([], [])
    for exchange in conversation.exchanges:
        for side, said in zip(sides, exchange.answers, strict=True):
            side.append({"role": "user", "content": markdown(exchange.user)})
            side.append({"role": "assistant", "content": markdown(said.text) if said and said.text else "…"})
    return sides


def _lines(answers: list[StreamedAnswer | None], players: list[str]) -> tuple[str, str]:
    last = max((side for side, said in enumerate(answers) if said is not None), default=-1)
    shown = [said_line(said, writing=side == last) for side, said in enumerate(answers)]
    return shown[0], shown[1] if len(players) > 1 else ""
