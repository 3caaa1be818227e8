"""TRL's format, which is ours too, and what every format must hold up to become a pair.

Formats of other projects are in `published.py` and `feedback.py`; which one a row has is decided in `registry.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_dpo.data.messages import (
    BadRow,
    Messages,
    Tools,
    answer_of,
    from_json,
    has_text,
    listed,
    message,
    number,
    prompt_of,
    says_the_same,
    shared_length,
    split_shared_prefix,
    tools_of,
    with_system,
    without_call_ids,
)
from lora_dpo.data.pairs import Origin, PreferencePair
from lora_dpo.data.row_reading import Row

SCORES = (
    ("chosen_score", "rejected_score"),
    ("score_chosen", "score_rejected"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_avg_rating", "rejected_avg_rating"),
    ("chosen_reward", "rejected_reward"),
)
"""Columns that hold what a judge gave both answers, in the wild."""


def pair_from_row(row: Row, origin: Origin) -> PreferencePair:
    """TRL's preference format: text or messages, explicit or implicit prompt; with scores, tools and origin if given.

    Raises:
        BadRow: a part is missing, empty or malformed, or both answers are the same.
    """
    for side in ("chosen", "rejected"):
        if row.get(side) is None:
            raise BadRow(f"without '{side}' {columns_of(row)}", "missing")
    chosen, rejected = row["chosen"], row["rejected"]
    if row.get("prompt") is None and isinstance(chosen, str) and isinstance(rejected, str):
        prompt, first, second = _split_text(row, chosen, rejected)
    else:
        first, second = (answer_of(row[side], side) for side in ("chosen", "rejected"))
        if row.get("prompt") is None:
            prompt, first, second = split_shared_prefix(first, second)
        else:
            prompt, first, second = without_prompt(prompt_of(row["prompt"]), first, second)
            prompt = with_system(row, prompt, "system", "system_prompt")
    provenance = from_json(row.get("origin"))
    return checked_pair(
        prompt,
        first,
        second,
        origin,
        scores=scores_of(row),
        tools=tools_of(row),
        provenance=provenance if isinstance(provenance, dict) else None,
    )


def checked_pair(
    prompt: Messages,
    chosen: Messages,
    rejected: Messages,
    origin: Origin,
    *,
    scores: tuple[float | None, float | None] = (None, None),
    tools: Tools = (),
    provenance: Mapping[str, Any] | None = None,
) -> PreferencePair:
    """The pair, if it says anything.

    Raises:
        BadRow: a part is empty, ends with the wrong role, or the answers or their scores are equal.
    """
    check_prompt(prompt)
    for side, messages in (("chosen", chosen), ("rejected", rejected)):
        check_answer(messages, side)
    if says_the_same(chosen, rejected):
        raise BadRow("chosen equals rejected", "equal")
    pair = PreferencePair(prompt, chosen, rejected, origin, *scores, tools, provenance)
    if pair.gap is not None and pair.gap <= 0:
        raise BadRow(
            "tie: both answers have the same score" if pair.gap == 0 else "the rejected answer has the higher score",
            "tie",
        )
    return pair


def check_prompt(messages: Messages) -> None:
    """Raise `BadRow` unless there is something to answer."""
    if not messages or not has_text(messages[-1]):
        raise BadRow("empty prompt", "empty")
    if messages[-1]["role"] == "assistant":
        raise BadRow("prompt ends with the assistant", "prefix")


def check_answer(messages: Messages, side: str) -> None:
    """Raise `BadRow` unless the assistant answers."""
    if not messages or not has_text(messages[-1]):
        raise BadRow(f"empty {side} answer", "empty")
    if messages[-1]["role"] != "assistant":
        raise BadRow(f"{side} does not end with the assistant", "roles")
    if messages[0]["role"] not in ("assistant", "tool"):
        raise BadRow(f"{side} starts with the {messages[0]['role']} and not with the prompt's messages", "prefix")


def scores_of(row: Row) -> tuple[float | None, float | None]:
    """Both scores of a row: from the first pair of columns that has them, distilabel's ratings, or an agreement."""
    named = [
        (number(row.get(ours)), number(row.get(theirs))) for ours, theirs in SCORES if ours in row or theirs in row
    ]
    found = [*named, _rated(row), _agreed(row)]
    return next((two for two in found if None not in two), found[0])


def _rated(row: Row) -> tuple[float | None, float | None]:
    """distilabel's `rating` of the two generations; its order is theirs, and the chosen one had the higher."""
    for column in ("rating", "ratings"):
        rated = from_json(row.get(column))
        if isinstance(rated, list) and len(rated) == 2:
            known = [score for score in map(number, rated) if score is not None]
            if len(known) == 2:
                return max(known), min(known)
    return None, None


def _agreed(row: Row) -> tuple[float | None, float | None]:
    """`agreement`, the share of raters who preferred the chosen answer; below a half it is another measure."""
    share = number(row.get("agreement"))
    return (share, 1 - share) if share is not None and 0.5 <= share <= 1 else (None, None)


def without_prompt(prompt: Messages, chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """Some data sets repeat the prompt at the start of both answers: it is the prompt only once.

    If the answers add a system turn or earlier turns before the prompt, these belong to it.
    """
    shared: Messages = ()
    if chosen and chosen[0]["role"] not in ("assistant", "tool"):
        shared = chosen[: shared_length(without_call_ids(chosen), without_call_ids(rejected))]
    for end in (len(prompt), len(shared)):
        start = chosen[:end]
        if (
            len(start) >= len(prompt)
            and says_the_same(start, rejected[:end])
            and says_the_same(start[len(start) - len(prompt) :], prompt)
        ):
            return start, chosen[end:], rejected[end:]
    ends = [len(prompt) if says_the_same(answer[: len(prompt)], prompt) else 0 for answer in (chosen, rejected)]
    return prompt, chosen[ends[0] :], rejected[ends[1] :]


def _split_text(row: Row, chosen: str, rejected: str) -> tuple[Messages, Messages, Messages]:
    """TRL's implicit prompt of plain texts: the words that both start with."""
    if listed(chosen):
        return split_shared_prefix(answer_of(chosen, "chosen"), answer_of(rejected, "rejected"))
    if chosen == rejected:
        raise BadRow("chosen equals rejected", "equal")
    others = [key for key, value in row.items() if isinstance(value, str) and key not in ("chosen", "rejected")]
    start = chosen[: shared_length(chosen, rejected)]
    start = start[: start.rfind(" ") + 1]  # whole words: "The sky is b" belongs to blue and to brown
    # Another text column may be the prompt under a name that we do not know: answers then start alike by accident.
    if others or not start.strip():
        raise BadRow("without 'prompt', and chosen and rejected share no first message", "prefix")
    rest = [
        (message("assistant", text[len(start) :], side),) for text, side in ((chosen, "chosen"), (rejected, "rejected"))
    ]
    return (message("user", start.rstrip(), "prompt"),), rest[0], rest[1]


def columns_of(row: Row) -> str:
    """`(columns: a, b)`, for a message; names that could paint a terminal are written escaped."""
    names = (name if name.isprintable() else ascii(name) for name in map(str, row))
    return f"(columns: {', '.join(sorted(names)) or 'none'})"
