"""A conversation with one model, or with two side by side on the same words: what a chat page does, without a page."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lora_dpo.config.template_kwargs import NO_KWARGS, TemplateKwargs
from lora_dpo.data import Message
from lora_dpo.data.chat_template import assistant_turn
from lora_dpo.errors import ConfigError, LoraDPOError
from lora_dpo.model.decoding import Sampling
from lora_dpo.serving.host import Host
from lora_dpo.serving.request import Completion, StreamItem

SHOW_EVERY = 0.05
"""Seconds between two states of an answer that is being written: faster than anyone reads."""
TELL_EVERY = 1.0
"""Seconds between two signs of life while waiting for a turn."""


@dataclass(frozen=True)
class StreamedAnswer:
    """One answer, whole or so far."""

    who: str
    text: str
    tokens: int = 0
    prompt_tokens: int = 0
    seconds: float = 0.0
    """From the first piece to the last: writing, without waiting."""
    waited: float = 0.0
    """Before the first piece: the queue, and reading the prompt."""
    cut: bool = False
    """Whether it was ended at its longest, and not by the model."""

    @property
    def speed(self) -> float | None:
        """Tokens a second while writing; None for an answer too short to tell."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 and self.seconds > 0 else None


@dataclass
class Turn:
    """What the user said, and the answers: the left one, and the right one if there is one."""

    user: str
    answers: list[StreamedAnswer | None] = field(default_factory=lambda: [None, None])


@dataclass
class Conversation:
    """One person's conversation."""

    exchanges: list[Turn] = field(default_factory=list)
    retries: int = 0
    """Of the last exchange: each draws with another seed."""
    dropped: bool = False
    """Whether another conversation has taken its place: what is still being written is not for the page any more."""
    signal: threading.Event | None = None
    """Ends the answer that is being written, or was written last: each answer has its own, so that a signal neither
    reaches the next one nor is taken back by it."""

    def stop(self) -> None:
        """End the answer that is being written, from any thread; what was said so far stays."""
        if self.signal is not None:
            self.signal.set()

    def conversation(self, side: int, system: str | None = None) -> list[Message]:
        """Messages as the model of one side sees them, up to the last thing said.

        Where this side has no answer (it joined later), it sees the other's.
        """
        turns = [Message(role="system", content=system)] if system and system.strip() else []
        for exchange in self.exchanges:
            turns.append(Message(role="user", content=exchange.user))
            said = exchange.answers[side] or exchange.answers[1 - side]
            if said is not None and said.text.strip():
                turns.append(assistant_turn(said.text.strip()))
        return turns

    def cut_from(self, index: int) -> list[Turn]:
        """Take an exchange and all after it out; returns them. Raises `ConfigError` if there is none."""
        if not 0 <= index < len(self.exchanges):
            raise ConfigError(f"There is no exchange {index + 1} in this conversation: it has {len(self.exchanges)}.")
        cut = self.exchanges[index:]
        del self.exchanges[index:]
        return cut


def conversation_of(history: Sequence[Mapping[str, Any]]) -> Conversation:
    """A conversation that was had elsewhere: messages of user and assistant in turn, ending with the assistant.

    Raises:
        ConfigError: they are not that.
    """
    conversation = Conversation()
    for said in history:
        role, content = (said.get(name) for name in ("role", "content")) if isinstance(said, Mapping) else (None, None)
        answered = not conversation.exchanges or conversation.exchanges[-1].answers[0] is not None
        if not isinstance(content, str) or role != ("user" if answered else "assistant"):
            raise ConfigError("The history must be messages of role and content, user and assistant in turn.")
        if role == "user":
            conversation.exchanges.append(Turn(content))
        else:
            conversation.exchanges[-1].answers = [StreamedAnswer("history", content)] * 2
    if conversation.exchanges and conversation.exchanges[-1].answers[0] is None:
        raise ConfigError("The history must end with the assistant: the new message follows it.")
    return conversation


def ask(
    host: Host,
    conversation: Conversation,
    text: str,
    players: Sequence[str],
    sampling: Sampling,
    *,
    system: str | None = None,
    client: str = "one",
    again: bool = False,
) -> Iterator[Turn]:
    """Say something to one or two models and yield the exchange as its answers grow.

    Both get the same words and the same seed, and the base gets the template's keywords of the adapter beside it.
    Ended by `Conversation.stop`, what was said so far is kept; an exchange without any answer is taken out of the
    conversation again, so that it does not confuse the next one. An answer of this conversation that is still being
    written is ended.

    Args:
        players: who answers: one name, or two.
        again: draw with another seed than the last time.

    Raises:
        ConfigError: nothing was said.
        LoraDPOError: the host refuses (too many are waiting, the prompt is too long).
    """
    if not text.strip():
        raise ConfigError("There is nothing to answer: write something first.")
    conversation.stop()
    stop = conversation.signal = threading.Event()
    conversation.retries = conversation.retries + 1 if again else 0
    sampling = replace(sampling, seed=sampling.seed + conversation.retries)
    exchange = Turn(text.strip())
    conversation.exchanges.append(exchange)
    # Before anything is answered: the left answer to these words is not for the right model to see.
    conversations = [conversation.conversation(side, system) for side in range(2)]
    try:
        keywords = host.keywords_compared(players[:2])
        for side, who in enumerate(players[:2]):
            if stop.is_set():
                break
            how: dict[str, Any] = {"client": client, "stop": stop, "chat_template_kwargs": keywords[side]}
            for said in write(host, who, conversations[side], sampling, **how):
                exchange.answers[side] = said
                yield exchange
    finally:
        if (
            not any(said is not None and said.text.strip() for said in exchange.answers)
            and exchange in conversation.exchanges
        ):
            conversation.exchanges.remove(exchange)


def write(
    host: Host,
    who: str,
    conversation: Sequence[Message],
    sampling: Sampling,
    *,
    client: str,
    stop: threading.Event | None = None,
    chat_template_kwargs: TemplateKwargs = NO_KWARGS,
) -> Generator[StreamedAnswer, None, None]:
    """Yield one answer as it grows, at most every `SHOW_EVERY` seconds, and at last the whole one with its counts.

    A `stop` is seen while it waits for its turn, too; leaving the iterator frees the turn.

    Args:
        chat_template_kwargs: keywords for the chat template, on top of those that the adapter was trained with.
    """
    outcomes: queue.SimpleQueue[StreamItem] = queue.SimpleQueue()
    said = StreamedAnswer(who, "")
    yield said
    how: dict[str, Any] = {"client": client, "chat_template_kwargs": chat_template_kwargs}
    request = host.submit(who, conversation, sampling, deliver=outcomes.put, **how)
    opened = request.asked.thought
    said = replace(said, prompt_tokens=len(request.asked.prompt))
    began = first = shown = time.monotonic()
    try:
        while not (stop is not None and stop.is_set()):
            try:
                outcome = outcomes.get(timeout=2 * SHOW_EVERY)
            except queue.Empty:
                if time.monotonic() - shown >= TELL_EVERY:
                    shown = time.monotonic()
                    yield said  # nothing new; but whoever has left is noticed only when something is yielded
                continue
            if isinstance(outcome, LoraDPOError):
                raise outcome
            if isinstance(outcome, Completion):
                yield replace(said, text=opened + outcome.text, tokens=outcome.tokens, cut=not outcome.finished)
                return
            now = time.monotonic()
            if not said.text:
                first = now
            text = (said.text or opened) + outcome
            said = replace(said, text=text, tokens=request.tokens, waited=first - began, seconds=now - first)
            if now - shown >= SHOW_EVERY:
                shown = now
                yield said
    finally:
        request.cancel()
    yield said  # stopped
