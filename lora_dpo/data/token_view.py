"""One pair as the model will see it: token by token, what is trained on, and where `max_length` cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_dpo.config.template_kwargs import NO_KWARGS, TemplateKwargs
from lora_dpo.data.pairs import PreferencePair
from lora_dpo.data.tokenize import tokenize_pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Piece:
    """The text of a token, or of the few tokens that make one character."""

    text: str
    tokens: int
    special: bool
    cut: bool
    """True if `max_length` leaves it out."""


@dataclass(frozen=True)
class PairView:
    """The three parts of a pair in pieces; the prompt is read, the answers are trained on."""

    pair: PreferencePair
    prompt: list[Piece]
    chosen: list[Piece]
    rejected: list[Piece]


def view_pair(
    tokenizer: PreTrainedTokenizerBase,
    pair: PreferencePair,
    *,
    max_length: int | None,
    chat_template_kwargs: TemplateKwargs = NO_KWARGS,
) -> PairView:
    """Tokenise a pair and take it apart again."""
    tokens = tokenize_pair(tokenizer, pair, max_length=None, chat_template_kwargs=chat_template_kwargs)
    room = None if max_length is None else max(0, max_length - len(tokens.prompt))
    return PairView(
        pair,
        pieces_of(tokenizer, tokens.prompt, max_length),
        pieces_of(tokenizer, tokens.chosen, room),
        pieces_of(tokenizer, tokens.rejected, room),
    )


def pieces_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], room: int | None) -> list[Piece]:
    """Ids as texts; those of a character that is spread over several tokens stay together."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    pieces, waiting = [], list[int]()
    for place, token in enumerate(ids, start=1):
        waiting.append(token)
        text = str(tokenizer.decode(waiting))
        if text.endswith("\ufffd") and place < len(ids) and len(waiting) < 8:
            continue  # half of a character: its next token is needed
        pieces.append(Piece(text, len(waiting), token in special, room is not None and place > room))
        waiting = []
    return pieces
