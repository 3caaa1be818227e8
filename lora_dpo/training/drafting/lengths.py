"""How long pairs are, in tokens: by the base's own tokenizer and template, or estimated from their text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, Any

from lora_dpo.config.template_kwargs import NO_KWARGS, TemplateKwargs
from lora_dpo.data import PreferencePair, tokenize_pairs
from lora_dpo.data.doctor.checks import Texts
from lora_dpo.errors import DataError
from lora_dpo.model.base import load_skeleton, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lora_dpo.config.recipe import ModelSection

BYTES_A_TOKEN = 2
"""English has four or more, German and code three, Chinese two to three: so few that an estimate is not too low."""
TEMPLATE = 64
"""Tokens that a chat template adds to a pair, generously."""
END = 8
"""The same for the end of an answer, and for words so short that they have no two bytes a token."""
NO_LIMIT = 1 << 30
"""Tokenizers that know no longest input say a number above this."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of the pairs of a file."""

    longest: int
    """Of the longest prompt with an answer."""
    answer: int
    """Nine in ten of the better answers have at most so many."""
    limit: int | None = None
    """What the base can read at once, if it says so."""
    measured: bool = False
    """By the base's tokenizer; otherwise this is an estimate from the text, and rather too high."""


def estimated_lengths(pairs: Sequence[PreferencePair]) -> Lengths:
    """Lengths from the bytes of the text alone: no model has to be here."""
    texts = [Texts.of(pair) for pair in pairs]
    whole = [_bytes(one.prompt) + max(_bytes(one.chosen), _bytes(one.rejected)) for one in texts]
    return Lengths(
        longest=_tokens(max(whole)) + TEMPLATE,
        answer=_tokens(_nine_in_ten([_bytes(one.chosen) for one in texts])) + END,
    )


def measured_lengths(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    *,
    chat_template_kwargs: TemplateKwargs = NO_KWARGS,
) -> Lengths:
    """Lengths by a base's tokenizer and chat template.

    Raises:
        ModelError: the template refuses a row, which is named.
        DataError: no pair is left once they are written for the model.
    """
    tokens, dropped = tokenize_pairs(tokenizer, pairs, max_length=None, chat_template_kwargs=chat_template_kwargs)
    if not tokens:
        raise DataError(f"No pair is left for {tokenizer.name_or_path}: {dropped[0].origin}: {dropped[0].reason}.")
    limit = int(tokenizer.model_max_length)
    return Lengths(
        longest=max(len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in tokens),
        answer=_nine_in_ten([len(pair.chosen) for pair in tokens]),
        limit=limit if limit < NO_LIMIT else None,
        measured=True,
    )


def looked_at(model: ModelSection, pairs: Sequence[PreferencePair]) -> tuple[Lengths, int]:
    """The pairs' lengths by the base's own tokenizer, and its parameters; no weights are loaded.

    Raises:
        ModelError: the model is not there, or its template refuses a row.
        DataError: no pair is left once they are written for the model.
    """
    where: dict[str, Any] = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    lengths = measured_lengths(load_tokenizer(model.name, **where), pairs, chat_template_kwargs=model.template)
    skeleton = load_skeleton(model.name, **where)
    reads = getattr(skeleton.config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (lengths.limit, reads) if limit]
    lengths = replace(lengths, limit=min(limits) if limits else None)
    return lengths, sum(parameter.numel() for parameter in skeleton.parameters())


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _tokens(size: int) -> int:
    return ceil(size / BYTES_A_TOKEN)


def _nine_in_ten(numbers: Sequence[int]) -> int:
    return sorted(numbers)[ceil(0.9 * len(numbers)) - 1]
