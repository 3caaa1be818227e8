"""What a run says of its data and the chat template before it trains; the doctor names the rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lora_dpo.data.answers import TokenAnswer
from lora_dpo.data.doctor.checks import templated
from lora_dpo.data.pairs import PreferencePair, UnpairedAnswer
from lora_dpo.data.tokenize import TokenPair, special_tokens
from lora_dpo.text import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def note_of_templates(
    rows: Sequence[PreferencePair] | Sequence[UnpairedAnswer],
    what: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> str | None:
    """How many rows have a chat template written in their text, as a sentence; None if there are none.

    Args:
        what: what the rows are, such as `training pairs`.
        tokenizer: its special tokens are looked for, too.
    """
    special = None if tokenizer is None else special_tokens(tokenizer)
    bos = None if tokenizer is None else tokenizer.bos_token
    pairs = (row.doubled() if isinstance(row, UnpairedAnswer) else row for row in rows)
    found = [text for text in (templated(pair, special, bos) for pair in pairs) if text is not None]
    if not found:
        return None
    return (
        f"{len(found)} of {len(rows)} {what} have text of a chat template inside their messages, such as "
        f"{shown(found[0], 60)}: the model reads a template inside a template. Split it into messages; "
        "lora-dpo data check names the rows."
    )


def notes_of_tokens(tokens: Sequence[TokenPair] | Sequence[TokenAnswer], what: str) -> Iterator[str]:
    """Sentences about what the template leaves out of answers, and about a generation prompt that none follows."""
    if left_out := sum(one.left_out for one in tokens):
        yield (
            f"{left_out} of {len(tokens)} {what}: the chat template leaves out a part of an answer, such as its "
            "reasoning, so that is not trained on. lora-dpo data check --model MODEL names the rows."
        )
    if other := sum(one.other_start for one in tokens):
        yield (
            f"{other} of {len(tokens)} {what}: the chat template asks for an answer with a text, such as <think>, that "
            "the answers do not follow, so a chat asks from where nothing is trained. "
            "lora-dpo data check --model MODEL shows it."
        )
