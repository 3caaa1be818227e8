"""One request to a host: its place in the queue, and its answer on the way back."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lora_dpo.data import Message
from lora_dpo.errors import Busy, LoraDPOError, PromptTooLong
from lora_dpo.model.decoding import Sampling
from lora_dpo.model.device import out_of_memory
from lora_dpo.serving.fair_queue import FairQueue

MESSAGE = 4
"""Fewer tokens than that has no message in any chat template, an empty one neither: its role and its ends."""

CHARACTERS = 32
"""More characters than that a token, on average, are in no text that people write."""


@dataclass(frozen=True)
class Completion:
    """A whole answer, and what it took."""

    text: str
    tokens: int
    """Of the answer, without its end-of-turn token."""
    prompt_tokens: int
    finished: bool
    """True if the model ended the turn itself or came to a stop text, False if it was cut at its longest."""
    seconds: float
    """Computing it."""
    waited: float
    """Seconds in the queue before that."""
    thought_tokens: int = 0
    """Of `tokens`, those that were thought before or between what is said."""


StreamItem = str | Completion | LoraDPOError
"""What is delivered: pieces of text, and at the end the reply or an error."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What is wanted, of whom, for whom."""

    who: str
    prompt: Sequence[int]
    sampling: Sampling
    stop: tuple[str, ...]
    client: str
    thought: str = ""
    """The tag with which the prompt begins a thought, if it does: the answer's text goes on from there."""


class PendingRequest:
    """A request in the queue.

    Args:
        deliver: called for every piece and then once for the end, in the thread that computes, or in that of another
            request that this one gave way to; it must not block.
        compute: makes the answer and delivers it.
    """

    def __init__(
        self,
        asked: GenerationRequest,
        fair_queue: FairQueue,
        *,
        deliver: Callable[[StreamItem], None],
        compute: Callable[[PendingRequest], None],
    ) -> None:
        self.asked = asked
        self.since = time.monotonic()
        self.cancelled = False
        self.tokens = 0
        """Tokens of the answer so far."""
        self._fair_queue, self._deliver, self._compute = fair_queue, deliver, compute
        gone = fair_queue.put(asked.client, self)
        if isinstance(gone, PendingRequest):
            gone.deliver(Busy("Others wait who have fewer requests here: this one gave way. Try again in a moment."))

    def cancel(self) -> None:
        """Want nothing more, from any thread: the request leaves the queue, or its answer ends at its next token."""
        self.cancelled = True
        self._fair_queue.withdraw(self.asked.client, self)

    def run(self) -> None:
        """Compute the answer; called by the thread that computes."""
        self._compute(self)

    def deliver(self, outcome: StreamItem) -> None:
        """Hand over a piece or the end, unless nobody wants it any more."""
        if not self.cancelled:
            self._deliver(outcome)


class Stream(Iterator[str]):
    """Pieces of one answer as they come. When they end, `reply` is the whole of it.

    A stream that is closed, or that nobody holds any more, frees its turn.
    """

    def __init__(self, submit: Callable[[Callable[[StreamItem], None]], PendingRequest]) -> None:
        self.reply: Completion | None = None
        self._ended = True
        self._pieces: queue.SimpleQueue[StreamItem] = queue.SimpleQueue()
        self.request = submit(self._pieces.put)  # not the stream itself: the queue must not keep it alive
        self._ended = False

    def __next__(self) -> str:
        if not self._ended:
            outcome = self._pieces.get()
            if isinstance(outcome, str):
                return outcome
            self._ended = True
            if isinstance(outcome, LoraDPOError):
                raise outcome
            self.reply = outcome
        raise StopIteration

    def close(self) -> None:
        """Stop the answer."""
        if not self._ended:
            self._ended = True
            self.request.cancel()

    def __del__(self) -> None:
        self.close()


def refuse_long(conversation: Sequence[Message], *, most: int) -> None:
    """Raise `PromptTooLong` for what cannot be within `most` tokens, before a tokenizer is kept busy with it."""
    if len(conversation) > most // MESSAGE:
        raise PromptTooLong(
            f"The prompt has {len(conversation):,} messages; at most {most // MESSAGE:,} are taken. Leave out older "
            "turns."
        )
    characters = sum(len(said["content"]) + len(said.get("reasoning_content", "")) for said in conversation)
    if characters > CHARACTERS * most:
        raise PromptTooLong(
            f"The prompt has {characters:,} characters; at most {most} tokens are taken. Shorten it, or leave out "
            "older turns."
        )


def refuse_prompt(prompt: Sequence[int], *, most: int) -> None:
    """Raise `PromptTooLong` for a prompt of more than `most` token ids."""
    if len(prompt) > most:
        raise PromptTooLong(
            f"The prompt has {len(prompt)} tokens; at most {most} are taken. Shorten it, or leave out older turns."
        )


def why_it_failed(error: Exception) -> str:
    """A sentence on what nobody expected to go wrong with an answer."""
    if out_of_memory(error):
        return "Memory ran out for this answer. Shorten the prompt or the answer."
    first = (str(error).strip().splitlines() or ["no reason given"])[0]
    return f"The answer failed unexpectedly ({type(error).__name__}: {first}). The whole error is in the log."
