"""What a model thinks before it answers, as text: `<think>…</think>` at an answer's start, or other `TAGS`.

Some prompts end with the opening tag already (`opened_thought`). Tags that a tokenizer holds as special tokens are in
the text that `answer_decoder` makes of ids, and in no other that skips special tokens.
"""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NEXT = "<|end|><|start|>assistant"
"""Between two messages of one answer in gpt-oss's response format."""

TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
    ("<|channel|>analysis<|message|>", f"{_NEXT}<|channel|>final<|message|>"),
)
"""How a thought begins and ends. The channels: https://developers.openai.com/cookbook/articles/openai-harmony"""

CHANNELS = ("<|channel|>analysis<|message|>", "<|channel|>commentary<|message|>", "<|channel|>final<|message|>")
"""How messages begin in gpt-oss's format: thoughts, what is told of them on the way (a preamble, which the format means
for the user as much as the answer), and the answer. `commentary to=…` is a call of a tool, and none of these."""

_SAID = CHANNELS[1:]

_BEGINNINGS = (*(tag for tag, _ in TAGS), *_SAID)

_CHANNEL_OF = {f"{_NEXT}{channel}": channel for channel in CHANNELS}
"""The marks between two messages of one answer, and the channel of the second."""

_OPENING = "|".join(re.escape(tag) for tag, _ in TAGS)
_EMPTY = "|".join(re.escape(tag) + r"\s*" + re.escape(close) for tag, close in TAGS)

EMPTY_THOUGHT = re.compile(rf"\s*(?:{_EMPTY})\s*")

OPENED = re.compile(rf"(?:{_OPENING})\s*\Z")
"""A text that ends with the tag that begins a thought."""

_TAIL = 16
"""Tokens at a prompt's end, or at an answer's start, that hold an opening tag and a line break beside it."""


class ThoughtSplitter:
    """Takes an answer apart while it is written: `feed` it pieces, then `end` it.

    Both yield `(is_thought, text)`. Text is held back while it may still be a part of a tag. In gpt-oss's channels
    thoughts may come between two things that are said; elsewhere all that follows the first thought is said.
    """

    def __init__(self, *, opened: bool = False) -> None:
        self.inside = opened
        """True while what comes is a thought."""
        self.turns = 0
        """How often a thought ended or another one began."""
        self._started = opened
        self._marks: tuple[str, ...] = (*(close for _, close in TAGS), *_CHANNEL_OF) if opened else ()
        """What may end the part that is read."""
        self._held = ""
        self._gap = ""
        """Goes before the next thing that is said: a break, where something was said before."""
        self._said = False
        self._between = False
        """True after a mark, until something but white space is said."""

    @property
    def settled(self) -> bool:
        """True once all that comes is said."""
        return self._started and not self._marks

    def feed(self, piece: str) -> Iterator[tuple[bool, str]]:
        """The parts that are certain now."""
        self._held += piece
        if not self._started and not self._start():
            return
        while found := [(self._held.find(mark), mark) for mark in self._marks if mark in self._held]:
            place, mark = min(found)
            part, self._held = self._held[:place], self._held[place + len(mark) :]
            yield from self._part(part)
            yield from self._pass(mark)
        keep = max((_overlap(self._held, mark) for mark in self._marks), default=0)
        part, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        yield from self._part(part)

    def end(self) -> Iterator[tuple[bool, str]]:
        """What was still held back."""
        part, self._held = self._held, ""
        yield from self._part(part)

    def _start(self) -> bool:
        """Whether it is known how the answer begins."""
        begun = self._held.lstrip()
        if any(tag != begun and tag.startswith(begun) for tag in _BEGINNINGS):
            return False  # nothing, or the beginning of a tag
        self._started = True
        for tag in _BEGINNINGS:
            if begun.startswith(tag):
                self._held = begun.removeprefix(tag)
                self.inside = True
                self._marks = tuple(_CHANNEL_OF) if tag in CHANNELS else (dict(TAGS)[tag],)
                if tag in _SAID:
                    self._say(tag)
        return True

    def _pass(self, mark: str) -> Iterator[tuple[bool, str]]:
        """Go on behind a mark."""
        channel = _CHANNEL_OF.get(mark, "")
        if channel == CHANNELS[0]:
            self.turns += not self.inside
            self.inside, self._marks = True, tuple(_CHANNEL_OF)
            yield True, "\n\n"
        else:
            self._say(channel)

    def _say(self, channel: str) -> None:
        self.turns += self.inside
        self.inside, self._between = False, True
        self._gap = "\n\n" if self._said else ""
        self._marks = tuple(_CHANNEL_OF) if channel == CHANNELS[1] else ()

    def _part(self, text: str) -> Iterator[tuple[bool, str]]:
        if not self.inside and self._between:
            text = text.lstrip()
        if not text:
            return
        if self.inside:
            yield True, text
            return
        yield False, self._gap + text
        self._said, self._between, self._gap = True, False, ""


def _overlap(text: str, tag: str) -> int:
    """Characters at the end of `text` that may be the beginning of `tag`."""
    lengths = range(min(len(tag) - 1, len(text)), 0, -1)
    return next((length for length in lengths if tag.startswith(text[-length:])), 0)


def split_thought(text: str) -> tuple[str, str]:
    """`(thought, said)` of a whole answer, both without white space around them; a cut thought leaves nothing said."""
    splitter = ThoughtSplitter()
    parts = [*splitter.feed(text), *splitter.end()]
    thought, said = ("".join(part for inside, part in parts if inside is wanted) for wanted in (True, False))
    return thought.strip(), said.strip()


def answer_decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[int]], str]:
    """What makes text of an answer's ids, all of them or its first: without special tokens but for a thought's tags."""
    tags, special = _special_ids(tokenizer, len(tokenizer))

    def decode(ids: Sequence[int]) -> str:
        if tags.isdisjoint(ids):
            return str(tokenizer.decode(list(ids), skip_special_tokens=True))
        return str(tokenizer.decode([token for token in ids if token in tags or token not in special]))

    return decode


@functools.lru_cache(maxsize=8)
def _special_ids(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[frozenset[int], frozenset[int]]:
    """Special tokens that are parts of a thought's tags, and all special tokens; `size` says that none came later."""
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    known = added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    # One or two characters are a padding token that somebody took from ordinary text, such as "!".
    names = {token for token in known.values() if len(token.strip()) > 2}
    # Phi's <|end|> is in the channels' tags, too: a kind is known by the token that begins it, or alone ends it.
    kinds = [begin + end for begin, end in TAGS if end in names or any(token in begin for token in names)]
    tags = {token for token in names if any(token in kind for kind in kinds)}
    return frozenset(number for number, token in known.items() if token in tags), frozenset(known)


def opened_thought(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> str:
    """The tag with which a prompt of token ids begins the answer's thought, and a line break; empty if it does not."""
    end = str(tokenizer.decode(list(prompt[-_TAIL:]))).rstrip()
    return next((f"{tag}\n" for tag, _ in TAGS if end.endswith(tag)), "")


def said_length(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], answer: Sequence[int]) -> int:
    """Tokens of an answer of the data, without the end of its turn and without the thought at its start."""
    said = answer[:-1]
    return len(said) - thought_tokens(tokenizer, said, opened=bool(opened_thought(tokenizer, prompt)))


def thought_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, opened: bool = False) -> int:
    """How many tokens of an answer are its thoughts, tags included; all of them if it was cut in the first."""

    decode = answer_decoder(tokenizer)

    def read(count: int) -> ThoughtSplitter:
        splitter = ThoughtSplitter(opened=opened)
        list(splitter.feed(decode(ids[:count])))
        return splitter

    if (head := read(_TAIL)).settled and not head.turns:
        return 0  # without reading all of it
    whole = read(len(ids))
    ends = [
        bisect.bisect_left(range(len(ids)), True, key=lambda count, turn=turn: read(count).turns > turn)  # type: ignore[misc]
        for turn in range(whole.turns)
    ]
    if whole.inside:
        ends.append(len(ids))
    if len(ends) % 2:
        ends.insert(0, 0)  # it begins with a thought
    return sum(ends[1::2]) - sum(ends[0::2])
