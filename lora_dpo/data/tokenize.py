"""Pairs to token ids: what the model reads and what it is trained on."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_dpo.config.template_kwargs import NO_KWARGS, TemplateKwargs
from lora_dpo.data.chat_template import Message, encode, render
from lora_dpo.data.pairs import Dropped, Origin, PreferencePair, pair_mark
from lora_dpo.data.thoughts import EMPTY_THOUGHT, OPENED, TAGS
from lora_dpo.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAME_AS_WRITTEN = "chosen and rejected are identical once written for the model"


@dataclass(frozen=True)
class TokenPair:
    """One pair as ids. Sequences are `prompt + chosen` and `prompt + rejected`."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    origin: Origin
    truncated: bool
    """True if `max_length` cut an answer, so its end-of-turn token is gone."""
    gap: float | None = None
    """Score of the chosen answer less that of the rejected one, where the row has both."""
    left_out: bool = False
    """True if the chat template leaves out a part of an answer, such as its reasoning."""
    other_start: bool = False
    """True if an answer, as the template writes it, does not follow what it asks for one with in a chat."""
    mark: str = field(default="", compare=False)
    """What the pair says as text, by `pairs.pair_mark`. Two pairs of the same ids are equal whatever it is."""


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    *,
    max_length: int | None,
    chat_template_kwargs: TemplateKwargs = NO_KWARGS,
    on_pair: Callable[[int], None] | None = None,
) -> tuple[list[TokenPair], list[Dropped]]:
    """Tokenise through the chat template; drop pairs that carry no signal.

    Dropped are pairs whose prompt alone fills `max_length`, and pairs whose answers are equal as
    the model reads them, because of `max_length` or the chat template.

    Args:
        max_length: longest sequence (prompt and answer) in tokens; answers are cut at their end.
        chat_template_kwargs: keywords for the chat template.
        on_pair: called with the number of pairs done so far.

    Raises:
        ModelError: the tokenizer has no chat template, or it refuses a row, which is named.
    """
    kept: list[TokenPair] = []
    dropped: list[Dropped] = []
    for done, pair in enumerate(pairs, start=1):
        tokens = tokenize_row(tokenizer, pair, max_length=max_length, chat_template_kwargs=chat_template_kwargs)
        if max_length is not None and len(tokens.prompt) >= max_length:
            dropped.append(Dropped(pair.origin, f"prompt fills max_length ({max_length} tokens)"))
        elif tokens.chosen == tokens.rejected:
            reason = "identical after truncation" if tokens.truncated else _SAME_AS_WRITTEN
            dropped.append(Dropped(pair.origin, reason))
        else:
            kept.append(tokens)
        if on_pair:
            on_pair(done)
    return kept, dropped


def tokenize_row(
    tokenizer: PreTrainedTokenizerBase,
    pair: PreferencePair,
    *,
    max_length: int | None,
    chat_template_kwargs: TemplateKwargs = NO_KWARGS,
) -> TokenPair:
    """As `tokenize_pair`; what the chat template refuses is said with the row it is in."""
    try:
        return tokenize_pair(tokenizer, pair, max_length=max_length, chat_template_kwargs=chat_template_kwargs)
    except ModelError as error:
        if not tokenizer.chat_template:
            raise
        where = f"{pair.origin.source}, row {pair.origin.row}"
        raise ModelError(
            f"{where}: {str(error).rstrip('.')}. lora-dpo data check --model MODEL finds all such rows."
        ) from error


def tokenize_pair(
    tokenizer: PreTrainedTokenizerBase,
    pair: PreferencePair,
    *,
    max_length: int | None,
    chat_template_kwargs: TemplateKwargs = NO_KWARGS,
) -> TokenPair:
    """One pair to ids. The prompt is the common start of prompt, prompt + chosen and prompt + rejected.

    An empty thought that the template itself writes before both answers is prompt, too.
    """

    def write(*answer: Message, ask: bool = False) -> str:
        turns = [*pair.prompt, *answer]
        return render(
            tokenizer,
            turns,
            add_generation_prompt=ask,
            tools=pair.tools,
            chat_template_kwargs=chat_template_kwargs,
        )

    asked = write(ask=True)
    # Templates write a line break after the end-of-turn token. The model never writes it, since
    # decoding stops at the token before; so it is no part of the answer.
    texts = [write(*side).rstrip() for side in (pair.chosen, pair.rejected)]
    context = _with_empty_thought(asked, texts, (pair.chosen, pair.rejected))
    prompt, *sides = encode(tokenizer, context), *(_conversation_ids(tokenizer, text) for text in texts)
    # Templates may render a prompt alone differently (some add a thinking block): what is not shared
    # belongs to the answers, as in TRL.
    shared = min(common_prefix_length(prompt, side) for side in sides)
    room = None if max_length is None else max(0, max_length - shared)
    chosen, rejected = (side[shared:][:room] for side in sides)
    return TokenPair(
        prompt[:shared],
        chosen,
        rejected,
        pair.origin,
        truncated=len(chosen) + shared < len(sides[0]) or len(rejected) + shared < len(sides[1]),
        gap=pair.gap,
        left_out=_is_cut(pair, asked, texts, write),
        other_start=not all(text.startswith(asked.rstrip()) for text in texts),
        mark=pair_mark(pair),
    )


def _with_empty_thought(asked: str, texts: Sequence[str], answers: Sequence[Sequence[Message]]) -> str:
    """The prompt as text, with the empty thought that follows it in both texts and in neither answer's own."""
    start = min(_shared(asked, text) for text in texts)
    if opened := OPENED.search(asked[:start]):
        start = opened.start()
    found = [EMPTY_THOUGHT.match(text, start) for text in texts]
    own = any(EMPTY_THOUGHT.match(said["content"]) for answer in answers for said in answer[:1])
    if own or None in found or len({match[0].rstrip() for match in found if match}) > 1:
        return asked
    return texts[0][: min(match.end() for match in found if match)]


def _is_cut(pair: PreferencePair, asked: str, texts: Sequence[str], write: Callable[[], str]) -> bool:
    """True if something that an answer says or calls is not in its text. Templates may change white space."""
    answers = (pair.chosen, pair.rejected)
    if _hold(texts, answers, [_shared(asked, text) for text in texts]):
        return False
    # The generation prompt may have begun the answer: <think> is its own, too.
    base_of = write()
    return not _hold(texts, answers, [_shared(base_of, text) for text in texts])


def _hold(texts: Sequence[str], answers: Sequence[Sequence[Message]], starts: Sequence[int]) -> bool:
    written = ["".join(text[start:].split()) for text, start in zip(texts, starts, strict=True)]
    return all(
        "".join(word.split()) in text
        for text, answer in zip(written, answers, strict=True)
        for said in answer
        if said["role"] == "assistant"
        for word in _words(said)
    )


def _words(said: Message) -> list[str]:
    """What a turn says, and the functions that it calls."""
    texts = [str(value) for key, value in said.items() if key in ("content", "reasoning_content")]
    return [*texts, *(str(call["function"]["name"]) for call in said.get("tool_calls", []))]


def _shared(left: str, right: str) -> int:
    return len(os.path.commonprefix([left, right]))  # noqa: RUF071 - characters are meant


def common_prefix_length(left: Sequence[int], right: Sequence[int]) -> int:
    """How many leading tokens two sequences share."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def _conversation_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = encode(tokenizer, text)
    if ids[-1] not in _special_ids(tokenizer) and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)  # the template leaves the turn open
    return ids


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """What a tokenizer takes out of any text as a special token, the longest first; None if there is nothing.

    Added tokens that are not special, such as Qwen's `<think>`, are meant to be written in messages; so are a thought's
    tags in any case.
    """
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    # One or two characters are a padding token that somebody took from ordinary text, such as "!".
    known = {token for token in (*tokenizer.all_special_tokens, *added) if len(token.strip()) > 2}
    known -= {tag for tags in TAGS for tag in tags}
    return re.compile("|".join(map(re.escape, sorted(known, key=len, reverse=True)))) if known else None


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
