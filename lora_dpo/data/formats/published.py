"""The formats in which other projects publish preferences: one small function each, from a row to pairs.

Written after each project's public description of its columns. All raise `BadRow` for a row that is none of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_dpo.data.formats.trl import checked_pair, columns_of, pair_from_row, scores_of
from lora_dpo.data.messages import (
    BadRow,
    Messages,
    answer_of,
    asked_in_transcript,
    conversation,
    from_json,
    is_transcript,
    message,
    number,
    prompt_of,
    says_the_same,
    split_shared_prefix,
    text_of,
    tools_of,
    transcript,
    with_system,
)
from lora_dpo.data.pairs import Origin, PreferencePair
from lora_dpo.data.row_reading import Row


def alpaca(row: Row, origin: Origin) -> PreferencePair:
    """`instruction`, `input` (may be empty), `chosen`, `rejected`; LLaMA-Factory adds `system` and `history`."""
    return _answered(row, origin, with_system(row, (*_history(row), alpaca_turn(row)), "system", "system_prompt"))


def alpaca_turn(row: Row) -> Any:
    """Instruction and input as one user turn, a line break between."""
    extra = row.get("input")
    text = text_of(row, "instruction")
    return message("user", f"{text}\n{extra}" if isinstance(extra, str) and extra else text, "instruction")


ANSWERS = ("completion", "output", "response", "answer")
"""Columns that hold one answer."""


def is_demonstration(row: Row) -> bool:
    """True for a row with one answer: a conversation, or a prompt beside it."""
    if row.get("messages") is not None or row.get("conversations") is not None:
        return True
    asked = any(row.get(name) is not None for name in ("prompt", "instruction"))
    return asked and any(row.get(name) is not None for name in ANSWERS)


def prompt_and_answer(row: Row) -> tuple[Messages, Messages]:
    """The two parts of a row with one answer: `prompt` or `instruction` with an answer column, or a conversation.

    A conversation that ends with the assistant is both, and its last turn is the answer; else it is the prompt of an
    answer column.
    """
    said = next((row[name] for name in ANSWERS if row.get(name) is not None), None)
    whole = next((row[name] for name in ("messages", "conversations") if row.get(name) is not None), None)
    if whole is not None:
        prompt = conversation(whole, "messages")
        if said is None or (prompt and prompt[-1]["role"] == "assistant"):
            return with_system(row, prompt[:-1], "system"), prompt[-1:]
    else:
        prompt = (alpaca_turn(row),) if row.get("prompt") is None else prompt_of(row["prompt"])
    if said is None:
        raise BadRow("without an answer", "missing")
    return with_system(row, prompt, "system"), answer_of(said, "completion")


def _history(row: Row) -> Messages:
    turns: list[Any] = []
    history = from_json(row.get("history"))
    if history is not None and not isinstance(history, list):
        raise BadRow("history is not a list of [question, answer]")
    for exchange in history or []:
        if not isinstance(exchange, list) or len(exchange) != 2 or not all(isinstance(text, str) for text in exchange):
            raise BadRow("history is not a list of [question, answer]")
        turns += [message("user", exchange[0], "history"), message("assistant", exchange[1], "history")]
    return tuple(turns)


def sharegpt(row: Row, origin: Origin) -> PreferencePair:
    """LLaMA-Factory's ShareGPT ranking: `conversations` so far, `chosen` and `rejected` as `{from, value}`."""
    so_far = conversation(row.get("conversations"), "conversations")
    return _answered(row, origin, with_system(row, so_far, "system"))


def llamafactory_v1(row: Row, origin: Origin) -> PreferencePair:
    """LLaMA-Factory's v1: `chosen_messages`, `rejected_messages`, whole conversations with typed content lists."""
    sides = [conversation(row.get(side), side) for side in ("chosen_messages", "rejected_messages")]
    return checked_pair(*split_shared_prefix(*sides), origin, scores=scores_of(row), tools=tools_of(row))


def hh_rlhf(row: Row, origin: Origin) -> PreferencePair:
    """HH-RLHF: two transcripts, or a transcript as `prompt` that ends with `Assistant:` and what follows."""
    start = row["prompt"] if is_transcript(row.get("prompt")) and not is_transcript(row.get("chosen")) else ""
    texts = [start + text_of(row, side) for side in ("chosen", "rejected")]
    prompt, chosen, rejected = split_shared_prefix(transcript(texts[0], "chosen"), transcript(texts[1], "rejected"))
    if prompt[-1]["role"] == "assistant":
        raise BadRow("the transcripts part at a Human turn: no answer was preferred", "prefix")
    return checked_pair(prompt, chosen, rejected, origin, scores=scores_of(row))


def argilla(row: Row, origin: Origin) -> PreferencePair:
    """Argilla and distilabel: `system`, `input` or `instruction`; `chosen`/`rejected` or `chosen_response`/…."""
    column = _asked_in(row, "input", "instruction", "prompt")
    prompt = with_system(row, prompt_of(row[column], column), "system", "system_prompt")
    named = {
        side: row[f"{side}_response"] for side in ("chosen", "rejected") if row.get(f"{side}_response") is not None
    }
    return _answered({**row, **named}, origin, prompt)


def ratings(row: Row, origin: Origin) -> PreferencePair:
    """distilabel before formatting: `generations` with one rating each; the best against the worst."""
    answers = from_json(row.get("generations"))
    rated = from_json(row.get("ratings") if row.get("ratings") is not None else row.get("rating"))
    if not isinstance(answers, list) or not isinstance(rated, list) or len(answers) != len(rated):
        raise BadRow("generations and ratings are not two lists of the same length")
    column = _asked_in(row, "instruction", "input", "prompt", "messages")
    prompt = with_system(row, prompt_of(row[column], column), "system", "system_prompt")
    scored = [(number(score), answer) for answer, score in zip(answers, rated, strict=True)]
    return _best_and_worst(prompt, scored, origin)


def nectar(row: Row, origin: Origin) -> PreferencePair:
    """Nectar: a transcript as `prompt`, and `answers` with a `rank` (1 is best); the best against the last."""
    answers = from_json(row.get("answers"))
    if not isinstance(answers, list) or not all(isinstance(item, dict) for item in answers):
        raise BadRow("answers is not a list of {answer, rank}")
    prompt = row.get("prompt")
    messages = asked_in_transcript(str(prompt)) if is_transcript(prompt) else prompt_of(prompt)
    ranks = [number(item.get("rank")) for item in answers]
    scored = [(None if rank is None else -rank, item.get("answer")) for item, rank in zip(answers, ranks, strict=True)]
    return _best_and_worst(messages, scored, origin)


def orca(row: Row, origin: Origin) -> PreferencePair:
    """Intel's Orca pairs: `system`, `question`, `chosen`, `rejected`."""
    prompt = prompt_of(row.get("question"), "question")
    return _answered(row, origin, with_system(row, prompt, "system", "system_prompt"))


def stackexchange(row: Row, origin: Origin) -> PreferencePair:
    """StackExchange paired: `question`, the better `response_j`, the worse `response_k`."""
    sides = [(message("assistant", text_of(row, f"response_{side}"), f"response_{side}"),) for side in "jk"]
    return checked_pair(prompt_of(text_of(row, "question")), sides[0], sides[1], origin)


def shp(row: Row, origin: Origin) -> PreferencePair:
    """SHP: `history`, two replies `human_ref_A` and `human_ref_B`, `labels` 1 if A is better, and their scores."""
    label = number(row.get("labels"))
    if label not in (0.0, 1.0):
        raise BadRow("labels is neither 1 (A is better) nor 0")
    better, worse = "AB" if label else "BA"
    sides = [
        (message("assistant", text_of(row, f"human_ref_{side}"), f"human_ref_{side}"),) for side in (better, worse)
    ]
    scores = number(row.get(f"score_{better}")), number(row.get(f"score_{worse}"))
    return checked_pair(prompt_of(text_of(row, "history")), sides[0], sides[1], origin, scores=scores)


def axolotl(row: Row, origin: Origin) -> PreferencePair:
    """Axolotl's: `messages` so far, `chosen` and `rejected` as a message each, or as text."""
    for side in ("chosen", "rejected"):
        if row.get(side) is None:
            raise BadRow(f"without '{side}' {columns_of(row)}", "missing")
    chosen, rejected = (answer_of(row[side], side) for side in ("chosen", "rejected"))
    if chosen and chosen[0]["role"] not in ("assistant", "tool"):
        return pair_from_row(row, origin)  # whole conversations; `messages` is one of them once more
    so_far = conversation(row.get("messages"), "messages")
    if says_the_same(so_far[-len(chosen) :], chosen):  # the conversation was kept with its answer
        so_far = so_far[: -len(chosen)]
    prompt = with_system(row, so_far, "system", "system_prompt")
    return checked_pair(prompt, chosen, rejected, origin, scores=scores_of(row), tools=tools_of(row))


def swift(row: Row, origin: Origin) -> PreferencePair:
    """ms-swift's: `messages` that end with the better answer, or `query` and `response`; the worse one in
    `rejected_response`, or the whole other conversation in `rejected_messages`."""
    if row.get("messages") is not None:
        whole = conversation(row["messages"], "messages")
    else:
        asked = prompt_of(row.get("query"), "query")
        whole = (*_history(row), *asked, *answer_of(row.get("response"), "response"))
    if row.get("rejected_messages") is not None:
        prompt, chosen, rejected = split_shared_prefix(
            whole, conversation(row["rejected_messages"], "rejected_messages")
        )
    else:
        prompt, chosen = whole[:-1], whole[-1:]
        rejected = answer_of(row.get("rejected_response"), "rejected_response")
    prompt = with_system(row, prompt, "system")
    return checked_pair(prompt, chosen, rejected, origin, scores=scores_of(row), tools=tools_of(row))


def openai(row: Row, origin: Origin) -> PreferencePair:
    """OpenAI's, Azure's and Together's: `input.messages`, `input.tools`, `preferred_output`, `non_preferred_output`."""
    given = from_json(row.get("input"))
    given = given if isinstance(given, dict) else {"messages": given}
    sides = []
    for name in ("preferred_output", "non_preferred_output"):
        if row.get(name) is None:
            raise BadRow(f"without '{name}' {columns_of(row)}", "missing")
        sides.append(answer_of(row[name], name))
    prompt = prompt_of(given.get("messages"), "input.messages")
    return checked_pair(prompt, sides[0], sides[1], origin, scores=scores_of(row), tools=tools_of(given))


def _asked_in(row: Row, *names: str) -> str:
    """The first of these columns that the row has. Raises `BadRow`."""
    found = next((name for name in names if row.get(name) is not None), None)
    if found is None:
        others = "', '".join(names[:-1])
        raise BadRow(f"without '{others}' or '{names[-1]}' {columns_of(row)}", "missing")
    return found


def _answered(row: Row, origin: Origin, prompt: Messages) -> PreferencePair:
    sides = []
    for side in ("chosen", "rejected"):
        if row.get(side) is None:
            raise BadRow(f"without '{side}' {columns_of(row)}", "missing")
        sides.append(answer_of(row[side], side))
    return checked_pair(prompt, sides[0], sides[1], origin, scores=scores_of(row), tools=tools_of(row))


def _best_and_worst(prompt: Messages, scored: Sequence[tuple[float | None, Any]], origin: Origin) -> PreferencePair:
    known = [(score, answer) for score, answer in scored if score is not None and answer is not None]
    if len(known) < 2:
        raise BadRow("fewer than two answers with a rating", "missing")
    best, worst = (choose(known, key=lambda item: item[0]) for choose in (max, min))
    if best[0] == worst[0]:
        raise BadRow("tie: both answers have the same score", "tie")
    chosen, rejected = answer_of(best[1], "generation"), answer_of(worst[1], "generation")
    return checked_pair(prompt, chosen, rejected, origin, scores=(best[0], worst[0]))
