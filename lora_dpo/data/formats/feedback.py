"""Thumbs up and down on single answers: two opposite votes after one prompt make a pair, the rest is counted."""

from __future__ import annotations

import heapq
import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_dpo.data.formats.published import prompt_and_answer
from lora_dpo.data.formats.trl import check_answer, check_prompt, checked_pair
from lora_dpo.data.messages import BadRow, Messages, conversation, message, number, tools_of, without_call_ids
from lora_dpo.data.pairs import Origin, PreferencePair, UnpairedAnswer
from lora_dpo.data.row_reading import Row

LABELS = ("label", "kto_tag")


def kto(row: Row, origin: Origin) -> UnpairedAnswer:
    """TRL's and LLaMA-Factory's unpaired format: `prompt` and `completion`, or one conversation, and a yes or no."""
    label = next((row[name] for name in LABELS if row.get(name) is not None), None)
    prompt, answer = prompt_and_answer(row)
    return _checked_vote(prompt, answer, _is_up(label), origin, row)


def open_webui(row: Row, origin: Origin) -> list[PreferencePair] | UnpairedAnswer:
    """Open WebUI's exported feedback: a rating of one message, and a snapshot of the chat it stands in.

    Rated among siblings (regenerated, or side by side) it is a comparison with each that has no rating of its own;
    alone it is a vote.
    """
    data, meta = (_dict(row.get(name)) for name in ("data", "meta"))
    chat = _dict(_dict(_dict(row.get("snapshot")).get("chat")).get("chat"))
    up = _is_up(data.get("rating"))
    known = _messages_of(chat)
    rated = known.get(str(meta.get("message_id")))
    if rated is None:
        raise BadRow("the rated message is not in the chat's snapshot", "missing")
    prompt = _path_to(known, rated)
    system = _dict(chat.get("params")).get("system")
    if isinstance(system, str) and system.strip():
        prompt = (message("system", system, "prompt"), *prompt)
    answer = _said(rated)
    vote = _checked_vote(prompt, (answer,), up, origin, {})
    if not data.get("sibling_model_ids"):
        return vote
    pairs, compared = [], {answer["content"]}
    for other in known.values():
        if other is rated or other.get("parentId") != rated.get("parentId") or other.get("role") != "assistant":
            continue
        content = other.get("content")
        if _dict(other.get("annotation")).get("rating") or not isinstance(content, str) or not content.strip():
            continue
        if content in compared:  # regenerated word for word: the same comparison again
            continue
        compared.add(content)
        sides = ((answer,), (_said(other),)) if up else ((_said(other),), (answer,))
        pairs.append(checked_pair(prompt, *sides, origin))
    return pairs or vote


@dataclass
class Ballot:
    """Votes by prompt and tools, each used once: an up with the first down that is left on another answer."""

    votes: dict[str, tuple[list[UnpairedAnswer], list[UnpairedAnswer]]] = field(default_factory=dict)

    def add(self, vote: UnpairedAnswer) -> None:
        """Keep a vote until all are in."""
        key = json.dumps([without_call_ids(vote.prompt), vote.tools], sort_keys=True)
        self.votes.setdefault(key, ([], []))[0 if vote.up else 1].append(vote)

    def count(self) -> Iterator[tuple[tuple[UnpairedAnswer, ...], PreferencePair | BadRow]]:
        """Yield the votes that were used and what they became: a pair, or a reason why not."""
        for ups, downs in self.votes.values():
            pairs, unused_ups, unused_downs = matched(ups, downs)
            for up, down in pairs:
                try:
                    pair = checked_pair(
                        up.prompt, up.answer, down.answer, up.origin, tools=up.tools, provenance=_made_of(up, down)
                    )
                except BadRow as bad:
                    yield (up, down), bad
                else:
                    yield (up, down), pair
            reason = (
                "the same answer has both votes"  # else they would be a pair
                if unused_ups and unused_downs
                else "a vote without an opposite vote after the same prompt"
            )
            for vote in [*unused_ups, *unused_downs]:
                yield (vote,), BadRow(reason, "vote")


def matched(
    ups: Sequence[UnpairedAnswer], downs: Sequence[UnpairedAnswer]
) -> tuple[list[tuple[UnpairedAnswer, UnpairedAnswer]], Sequence[UnpairedAnswer], Sequence[UnpairedAnswer]]:
    """As many pairs of opposite votes on different answers as there are, in order, and the votes that are left.

    Each up gets the first down that is left on another answer. If only downs on its own answer are left, it trades
    with an earlier pair that has that answer on neither side.
    """
    answers: dict[str, deque[int]] = {}  # the downs that are left, by answer
    for place, down in enumerate(downs):
        answers.setdefault(_words(down), deque()).append(place)
    heads = [(places[0], answer) for answer, places in answers.items()]  # by place: a heap
    pairs: list[tuple[UnpairedAnswer, UnpairedAnswer]] = []
    unused, traded = [], 0
    for up in ups:
        own = _words(up)
        aside = heapq.heappop(heads) if heads and heads[0][1] == own else None
        if heads:
            place, answer = heapq.heappop(heads)
            answers[answer].popleft()
            if answers[answer]:
                heapq.heappush(heads, (answers[answer][0], answer))
            pairs.append((up, downs[place]))
        elif aside is not None:  # from here on nothing else is left, so a pair that is passed over stays unfit
            while traded < len(pairs) and own in map(_words, pairs[traded]):
                traded += 1
            if traded < len(pairs):
                other_up, other_down = pairs[traded]
                pairs[traded] = (other_up, downs[answers[own].popleft()])
                pairs.append((up, other_down))
                aside = (answers[own][0], own) if answers[own] else None
            else:
                unused.append(up)
        else:
            unused.append(up)
        if aside is not None:
            heapq.heappush(heads, aside)
    left = sorted(place for places in answers.values() for place in places)
    return pairs, unused, [downs[place] for place in left]


def _words(vote: UnpairedAnswer) -> str:
    return json.dumps(without_call_ids(vote.answer), sort_keys=True)


def _made_of(up: UnpairedAnswer, down: UnpairedAnswer) -> dict[str, Any]:
    """Where both votes are: `rejected_file` only if the second is in another file."""
    made: dict[str, Any] = {"file": up.origin.source, "row": up.origin.row}
    if down.origin.source != up.origin.source:
        made["rejected_file"] = down.origin.source
    return {**made, "rejected_row": down.origin.row}


def _checked_vote(prompt: Messages, answer: Messages, up: bool, origin: Origin, row: Row) -> UnpairedAnswer:
    check_prompt(prompt)
    check_answer(answer, "voted")
    return UnpairedAnswer(prompt, answer, up, origin, tools_of(row))


def _is_up(value: Any) -> bool:
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    found = 1.0 if value is True else 0.0 if value is False else number(value)
    if found not in (1.0, 0.0, -1.0):
        raise BadRow("a vote that is neither up nor down")
    return found == 1.0


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _messages_of(chat: dict[str, Any]) -> dict[str, dict[str, Any]]:
    tree = _dict(chat.get("history")).get("messages")
    items = list(tree.values()) if isinstance(tree, dict) else chat.get("messages")
    found = [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []
    return {str(item["id"]): item for item in found if item.get("id") is not None}


def _path_to(known: dict[str, dict[str, Any]], rated: dict[str, Any]) -> Messages:
    """The turns above a message, from the first one on."""
    path: list[dict[str, Any]] = []
    parent = rated.get("parentId")
    while parent is not None and str(parent) in known and len(path) <= len(known):
        path.append(known[str(parent)])
        parent = path[-1].get("parentId")
    if len(path) > len(known):
        raise BadRow("the chat's snapshot goes in a circle")
    return tuple(_said(item) for item in reversed(path))


def _said(item: dict[str, Any]) -> Any:
    return conversation([item], "snapshot")[0]
