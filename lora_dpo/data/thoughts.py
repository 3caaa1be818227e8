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

CHANNELS = ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>")
"""How a thought begins in gpt-oss's format, and how an answer without one does."""

_BEGINNINGS = (*TAGS, (CHANNELS[1], ""))

_GOES_ON = f"{_NEXT}<|channel|>analysis<|message|>"
"""Between two parts of a thought."""

_OPENING = "|".join(re.escape(tag) for tag, _ in TAGS)
_EMPTY = "|".join(re.escape(tag) + r"\s*" + re.escape(close) for tag, close in TAGS)

EMPTY_THOUGHT = re.compile(rf"\s*(?:{_EMPTY})\s*")

OPENED = re.compile(rf"(?:{_OPENING})\s*\Z")
"""A text that ends with the tag that begins a thought."""

_TAIL = 16
"""Tokens at a prompt's end, or at an answer's start, that hold an opening tag and a line break beside it."""


class ThoughtSplitter:
    """Takes an answer apart while it is written: `feed` it pieces, then `end` it.

    Both yield `(is_thought, text)`. Text is held back while it may still be a part of a tag.
    """

    def __init__(self, *, opened: bool = False) -> None:
        self.inside = opened
        """True while what comes is a thought."""
        self._closers: tuple[str, ...] = tuple(close for _, close in TAGS)
        self.started = opened
        """True once it is known whether there is a thought."""
        self._held = ""
        self._between = False
        """True after a thought, until something but white space is said."""
        self.ended = False
        """True once a thought has been ended by its tag."""

    def feed(self, piece: str) -> Iterator[tuple[bool, str]]:
        """The parts that are certain now."""
        self._held += piece
        if not self.started and not self._start():
            return
        if self.inside:
            yield from self._think()
        if not self.inside:
            said = self._held.lstrip() if self._between else self._held
            self._held = ""
            if said:
                self._between = False
                yield False, said

    def end(self) -> Iterator[tuple[bool, str]]:
        """What was still held back."""
        if self._held:
            yield self.inside, self._held
            self._held = ""

    def _start(self) -> bool:
        """Whether it is known how the answer begins."""
        begun = self._held.lstrip()
        if any(tag != begun and tag.startswith(begun) for tag, _ in _BEGINNINGS):
            return False  # nothing, or the beginning of a tag
        self.started = True
        for tag, close in _BEGINNINGS:
            if begun.startswith(tag):
                self.inside, self._closers, self._held = True, (close,), begun.removeprefix(tag)
        return True

    def _think(self) -> Iterator[tuple[bool, str]]:
        found = [(self._held.find(tag), tag) for tag in self._closers if tag in self._held]
        if found:
            place, tag = min(found)
            thought, self._held = self._held[:place], self._held[place + len(tag) :]
            self.inside, self.ended, self._between = False, True, True
        else:
            keep = max(_overlap(self._held, tag) for tag in (*self._closers, _GOES_ON))
            thought, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        if thought := thought.replace(_GOES_ON, "\n\n"):
            yield True, thought


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
    """How many tokens at an answer's start are its thought, tags included; all of them if it was cut there."""

    decode = answer_decoder(tokenizer)

    def read(count: int) -> ThoughtSplitter:
        splitter = ThoughtSplitter(opened=opened)
        list(splitter.feed(decode(ids[:count])))
        return splitter

    if (head := read(_TAIL)).started and not head.inside and not head.ended:
        return 0  # without reading all of it
    whole = read(len(ids))
    if not whole.ended:
        return len(ids) if whole.inside else 0
    return bisect.bisect_left(range(len(ids)), True, key=lambda count: read(count).ended)
