"""A few rows of every format, written for this test after the format's public description, and the pairs they mean."""

from __future__ import annotations

import copy
import csv
import gzip
import itertools
import json
import random
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_dpo.data import Message, Origin, read_pairs
from lora_dpo.data.answers import read_answers
from lora_dpo.data.chat_template import render
from lora_dpo.data.doctor.examination import examine
from lora_dpo.data.formats.feedback import matched
from lora_dpo.data.formats.registry import FORMATS, format_of
from lora_dpo.data.formats.trl import SCORES
from lora_dpo.data.messages import BadRow
from lora_dpo.data.pairs import UnpairedAnswer
from lora_dpo.data.tokenize import tokenize_pair
from lora_dpo.data.write import canonical_row
from lora_dpo.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]


def system(text: str) -> Message:
    return Message(role="system", content=text)


def user(text: str) -> Message:
    return Message(role="user", content=text)


def bot(text: str) -> Message:
    return Message(role="assistant", content=text)


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@dataclass
class Case:
    """Rows of one format; what they become, as (prompt, chosen, rejected); scores and tools by number of the pair."""

    format: str
    rows: list[dict[str, Any]]
    pairs: list[tuple[list[Message], list[Message], list[Message]]]
    scores: dict[int, tuple[float, float]] = field(default_factory=dict)
    tools: dict[int, tuple[dict[str, Any], ...]] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)


def said(number: str, role: str, content: str, parent: str | None, **more: Any) -> dict[str, Any]:
    return {"id": number, "role": role, "content": content, "parentId": parent, "childrenIds": [], **more}


def feedback(
    rating: Any, message_id: str, tree: list[dict[str, Any]], siblings: Any = None, **params: str
) -> dict[str, Any]:
    chat = {"title": "t", "models": ["m"], "params": params, "history": {"messages": {m["id"]: m for m in tree}}}
    return {
        "id": "f",
        "user_id": "u",
        "version": 0,
        "type": "rating",
        "data": {"rating": rating, "model_id": "m", "sibling_model_ids": siblings, "reason": "", "comment": ""},
        "meta": {"arena": False, "chat_id": "c", "message_id": message_id, "message_index": 1},
        "snapshot": {"chat": {"id": "c", "title": "t", "chat": chat}},
        "created_at": 1,
        "updated_at": 1,
    }


TEA = [
    said("a", "user", "Tea or coffee?", None),
    said("b", "assistant", "Tea.", "a"),
    said("c", "assistant", "Coffee, surely.", "a"),
    said("d", "user", "Why?", "b"),
    said("e", "assistant", "It is calmer.", "d"),
]
TOOL = {"name": "rain", "description": "Millimetres of rain.", "parameters": {"type": "object", "properties": {}}}
WRAPPED = {"type": "function", "function": TOOL}
CALL = {"type": "function", "function": {"name": "rain", "arguments": {"day": "Monday"}}}

ASK = [{"role": "user", "content": "Hello"}]
WELCOME, WHAT = {"role": "assistant", "content": "Hello, how can I help?"}, {"role": "assistant", "content": "What?"}
GREETING = ([user("Hello")], [bot("Hello, how can I help?")], [bot("What?")])
AFTER_SYSTEM = ([system("Be kind."), *GREETING[0]], *GREETING[1:])


def voted(winner: Any, column: str = "winner", names: tuple[str, str] = ("response_a", "response_b")) -> dict[str, Any]:
    return {"prompt": "Hello", names[0]: "Hello, how can I help?", names[1]: "What?", column: winner}


CASES = {
    "axolotl": Case(
        "axolotl",
        [
            {"messages": ASK, "chosen": WELCOME, "rejected": WHAT},
            {"messages": [{"from": "human", "value": "Hello"}], "chosen": [WELCOME], "rejected": "What?"},
            {"messages": [*ASK, WELCOME], "chosen": WELCOME, "rejected": WHAT, "system": "Be kind."},
            {"messages": [*ASK, WELCOME], "chosen": [*ASK, WELCOME], "rejected": [*ASK, WHAT]},
            {"messages": [*ASK, WHAT], "chosen": WELCOME, "rejected": WHAT},
            {"messages": ASK, "chosen": WELCOME},
        ],
        [GREETING, GREETING, AFTER_SYSTEM, GREETING],
        dropped=["prompt ends with the assistant", "without 'rejected' (columns: chosen, messages)"],
    ),
    "swift": Case(
        "swift",
        [
            {"messages": [*ASK, WELCOME], "rejected_response": "What?"},
            {"messages": [*ASK, WELCOME], "rejected_messages": [*ASK, WHAT], "tools": [TOOL]},
            {"system": "Be kind.", "query": "Hello", "response": WELCOME["content"], "rejected_response": "What?"},
            {
                "history": [["Hi", "Yes?"]],
                "query": "Hello",
                "response": WELCOME["content"],
                "rejected_response": [WHAT],
            },
            {"messages": [*ASK, WELCOME], "rejected_response": WELCOME["content"]},
        ],
        [
            GREETING,
            GREETING,
            AFTER_SYSTEM,
            ([user("Hi"), bot("Yes?"), user("Hello")], *GREETING[1:]),
        ],
        tools={1: (WRAPPED,)},
        dropped=["chosen equals rejected"],
    ),
    "openai": Case(
        "openai",
        [
            {"input": {"messages": ASK, "tools": []}, "preferred_output": [WELCOME], "non_preferred_output": [WHAT]},
            {
                "input": {"messages": ASK, "tools": [WRAPPED], "parallel_tool_calls": True},
                "preferred_output": [WELCOME],
                "non_preferred_output": [WHAT],
            },
            {
                "input": json.dumps({"messages": ASK}),
                "preferred_output": WELCOME["content"],
                "non_preferred_output": WHAT,
            },
            {"input": {"messages": ASK}, "preferred_output": [WELCOME]},
        ],
        [GREETING, GREETING, GREETING],
        tools={1: (WRAPPED,)},
        dropped=["without 'non_preferred_output' (columns: input, preferred_output)"],
    ),
    "winner": Case(
        "winner",
        [
            voted("A"),
            voted("b", "preferred", ("response_b", "response_a")),
            voted("model_a"),
            voted("Response A", "Preferred", ("Response A", "Response B")),
            voted("[[A]]", "better", ("answerA", "answerB")),
            voted(2, "preference", ("completion_2", "completion_1")),
            voted("1", "choice", ("response1", "response2")),
            voted(0, "better_response_id", ("response_0", "response_1")),
            voted(0.0, "better_response_id", ("response_0", "response_1")),
            voted("Hello, how can I help?"),
            {"conversation_a": [*ASK, WHAT], "conversation_b": [*ASK, WELCOME], "winner": "model_b"},
            {
                "prompt": '["Hello"]',
                "response_a": '["Hello, how can I help?"]',
                "response_b": '["What?"]',
                "winner_model_a": 1,
                "winner_model_b": 0,
                "winner_tie": 0,
            },
            {**voted("a"), "system": "Be kind."},
            {
                "prompt": '["Hi", "Hello"]',
                "response_a": '["Yes?", "What?"]',
                "response_b": '["Yes?", "Hm."]',
                "winner": "B",
            },
        ],
        [*[GREETING] * 12, AFTER_SYSTEM, ([user("Hi"), bot("Yes?"), user("Hello")], [bot("Hm.")], [bot("What?")])],
    ),
    "winner-none": Case(
        "winner",
        [
            voted("A"),
            voted("tie"),
            voted("Tie (bothbad)"),
            voted("both_bad", "preferred"),
            voted("neither"),
            voted("no preference"),
            voted(""),
            voted("C"),
            voted(1),
            voted(True),
            {**voted("A"), "response_b": None},
            {"response_a": "Yes.", "response_b": "No.", "winner": "A"},
            {
                "prompt": "Hello",
                "response_a": "Yes.",
                "response_b": "No.",
                "winner_model_a": 0,
                "winner_model_b": 0,
                "winner_tie": 1,
            },
            {
                "prompt": "Hello",
                "response_a": "Yes.",
                "response_b": "No.",
                "winner_model_a": 0,
                "winner_model_b": 0,
                "winner_tie": 0,
            },
            {"prompt": '["Hi", "Hello"]', "response_a": '["Yes?"]', "response_b": '["Yes?", "Hm."]', "winner": "B"},
        ],
        [GREETING],
        dropped=[
            "tie: neither answer is preferred",
            *["tie: both answers are bad"] * 3,
            "tie: neither answer is preferred",
            "without a winner",
            *["the winner is neither a nor b nor a tie"] * 3,
            "without 'response_b' (columns: prompt, response_a, response_b, winner)",
            "without 'prompt' (columns: response_a, response_b, winner)",
            "tie: neither answer is preferred",
            "without a winner",
            "the two answers have not as many turns as the prompt",
        ],
    ),
    "trl-text": Case(
        "trl",
        [
            {"prompt": "Name a tree.", "chosen": "Oak.", "rejected": "Moss."},
            {"prompt": "Name a fish.", "chosen": "Pike.", "rejected": "Newt."},
        ],
        [
            ([user("Name a tree.")], [bot("Oak.")], [bot("Moss.")]),
            ([user("Name a fish.")], [bot("Pike.")], [bot("Newt.")]),
        ],
    ),
    "trl-text-implicit": Case(
        "trl",
        [{"chosen": "The moon is bright.", "rejected": "The moon is bread."}, {"chosen": "Yes", "rejected": "No"}],
        [([user("The moon is")], [bot("bright.")], [bot("bread.")])],
        dropped=["without 'prompt', and chosen and rejected share no first message"],
    ),
    "trl-chat": Case(
        "trl",
        [
            {
                "prompt": [system("Be brief."), user("Name a tree.")],
                "chosen": [bot("Oak.")],
                "rejected": [bot("There are many.")],
            }
        ],
        [([system("Be brief."), user("Name a tree.")], [bot("Oak.")], [bot("There are many.")])],
    ),
    "trl-chat-implicit": Case(
        "trl",
        [{"chosen": [user("Hi"), bot("Hello!")], "rejected": [user("Hi"), bot("What?")]}],
        [([user("Hi")], [bot("Hello!")], [bot("What?")])],
    ),
    "trl-tools": Case(
        "trl",
        [
            {
                "prompt": [user("Did it rain on Monday?")],
                "chosen": [
                    {"role": "assistant", "content": None, "tool_calls": [{"id": "1", **CALL}]},
                    {"role": "tool", "name": "rain", "content": "3"},
                    bot("Yes, 3 mm."),
                ],
                "rejected": [bot("No.")],
                "tools": [WRAPPED],
            }
        ],
        [
            (
                [user("Did it rain on Monday?")],
                [
                    {"role": "assistant", "content": "", "tool_calls": [{"id": "1", **CALL}]},
                    {"role": "tool", "content": "3", "name": "rain"},
                    bot("Yes, 3 mm."),
                ],
                [bot("No.")],
            )
        ],
        tools={0: (WRAPPED,)},
    ),
    "alpaca": Case(
        "alpaca",
        [
            {"instruction": "Translate.", "input": "chat", "chosen": "cat", "rejected": "talk", "tools": [TOOL]},
            {
                "instruction": "And now?",
                "input": "",
                "chosen": "dog",
                "rejected": "log",
                "system": "French.",
                "history": [["chat?", "cat"]],
            },
        ],
        [
            ([user("Translate.\nchat")], [bot("cat")], [bot("talk")]),
            ([system("French."), user("chat?"), bot("cat"), user("And now?")], [bot("dog")], [bot("log")]),
        ],
        tools={0: (WRAPPED,)},
    ),
    "sharegpt": Case(
        "sharegpt",
        [
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello"},
                    {"from": "human", "value": "Name a tree."},
                ],
                "chosen": {"from": "gpt", "value": "Oak."},
                "rejected": {"from": "gpt", "value": "Moss."},
                "system": "Be brief.",
            },
            {
                "conversations": [
                    {"from": "human", "value": "Rain on Monday?"},
                    {"from": "function_call", "value": '{"name": "rain", "arguments": {"day": "Monday"}}'},
                    {"from": "observation", "value": "3"},
                ],
                "chosen": {"from": "gpt", "value": "3 mm."},
                "rejected": {"from": "gpt", "value": "None."},
                "tools": json.dumps([TOOL]),
            },
        ],
        [
            (
                [system("Be brief."), user("Hi"), bot("Hello"), user("Name a tree.")],
                [bot("Oak.")],
                [bot("Moss.")],
            ),
            (
                [
                    user("Rain on Monday?"),
                    {"role": "assistant", "content": "", "tool_calls": [CALL]},
                    {"role": "tool", "content": "3"},
                ],
                [bot("3 mm.")],
                [bot("None.")],
            ),
        ],
        tools={1: (WRAPPED,)},
    ),
    "llamafactory-v1": Case(
        "llamafactory-v1",
        [
            {
                f"{side}_messages": [
                    {"role": "system", "content": [{"type": "text", "value": "Be brief."}], "loss_weight": 0.0},
                    {
                        "role": "user",
                        "content": [{"type": "text", "value": "Name "}, {"type": "text", "value": "two."}],
                    },
                    {"role": "assistant", "content": [{"type": "text", "value": answer}], "loss_weight": 1.0},
                ]
                for side, answer in (("chosen", "Oak, elm."), ("rejected", "Oak."))
            },
            {
                f"{side}_messages": [{"role": "user", "content": [{"type": "image_url", "value": "x.png"}]}]
                for side in ("chosen", "rejected")
            },
            {
                "chosen_messages": [
                    {"role": "user", "content": [{"type": "text", "value": "Rain on Monday?"}]},
                    {
                        "role": "assistant",
                        "content": [
                            {"type": "text", "value": "One moment."},
                            {"type": "tool_call", "value": '{"name": "rain", "arguments": {"day": "Monday"}}'},
                        ],
                    },
                ],
                "rejected_messages": [
                    {"role": "user", "content": [{"type": "text", "value": "Rain on Monday?"}]},
                    {"role": "assistant", "content": [{"type": "text", "value": "No."}]},
                ],
                "tools": json.dumps([TOOL]),
                "chosen_score": 2,
                "rejected_score": 1,
            },
        ],
        [
            ([system("Be brief."), user("Name two.")], [bot("Oak, elm.")], [bot("Oak.")]),
            (
                [user("Rain on Monday?")],
                [{"role": "assistant", "content": "One moment.", "tool_calls": [CALL]}],
                [bot("No.")],
            ),
        ],
        scores={1: (2.0, 1.0)},
        tools={1: (WRAPPED,)},
        dropped=["chosen_messages has content that is not text ('image_url')"],
    ),
    "hh-rlhf": Case(
        "hh-rlhf",
        [
            {  # they part at the last answer
                "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Name a tree.\n\nAssistant: Oak.",
                "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Name a tree.\n\nAssistant: No.\n\nReally.",
            },
            {  # at the first answer
                "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant: So long.",
                "rejected": "\n\nHuman: Hi\n\nAssistant: Go.",
            },
            {  # at a question
                "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: One?\n\nAssistant: 1",
                "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Two?\n\nAssistant: 2",
            },
            {  # within the prompt's first words
                "chosen": "\n\nHuman: One?\n\nAssistant: 1",
                "rejected": "\n\nHuman: Two?\n\nAssistant: 2",
            },
            {"prompt": "\n\nHuman: Name a fish.\n\nAssistant:", "chosen": " Pike.", "rejected": " Newt."},
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.",
                "rejected": "\n\nHuman: Hi\n\nAssistant: Go.",
                "chosen_score": 0.5,
                "rejected_score": "-1",
            },
        ],
        [
            (
                [user("Hi"), bot("Hello."), user("Name a tree.")],
                [bot("Oak.")],
                [bot("No.\n\nReally.")],
            ),
            ([user("Hi")], [bot("Hello."), user("Bye"), bot("So long.")], [bot("Go.")]),
            ([user("Name a fish.")], [bot("Pike.")], [bot("Newt.")]),
            ([user("Hi")], [bot("Hello.")], [bot("Go.")]),
        ],
        scores={3: (0.5, -1.0)},
        dropped=[
            "the transcripts part at a Human turn: no answer was preferred",
            "without 'prompt', and chosen and rejected share no first message",
        ],
    ),
    "ultrafeedback": Case(
        "trl",
        [
            {
                "prompt": "Name a tree.",
                "prompt_id": "0f",
                "messages": [user("Name a tree."), bot("Oak.")],
                "chosen": [user("Name a tree."), bot("Oak.")],
                "rejected": [user("Name a tree."), bot("Moss.")],
                "score_chosen": 8.5,
                "score_rejected": 3.0,
            },
            {
                "prompt": "Name a fish.",
                "chosen": [system("Be brief."), user("Name a fish."), bot("Pike.")],
                "rejected": [system("Be brief."), user("Name a fish."), bot("Newt.")],
                "score_chosen": 6,
                "score_rejected": 5,
            },
            {
                "prompt": "Tie?",
                "chosen": [user("Tie?"), bot("Yes.")],
                "rejected": [user("Tie?"), bot("No.")],
                "score_chosen": 7.0,
                "score_rejected": 7.0,
            },
        ],
        [
            ([user("Name a tree.")], [bot("Oak.")], [bot("Moss.")]),
            ([system("Be brief."), user("Name a fish.")], [bot("Pike.")], [bot("Newt.")]),
        ],
        scores={0: (8.5, 3.0), 1: (6.0, 5.0)},
        dropped=["tie: both answers have the same score"],
    ),
    "argilla": Case(
        "argilla",
        [
            {"system": "Be brief.", "input": "Name a tree.", "chosen": "Oak.", "rejected": "Moss.", "rating": [9, 4]},
            {
                "instruction": "Name a fish.",
                "chosen_response": "Pike.",
                "rejected_response": "Newt.",
                "chosen_avg_rating": 4.5,
                "rejected_avg_rating": 2.25,
                "tools": [TOOL],
            },
        ],
        [
            ([system("Be brief."), user("Name a tree.")], [bot("Oak.")], [bot("Moss.")]),
            ([user("Name a fish.")], [bot("Pike.")], [bot("Newt.")]),
        ],
        scores={0: (9.0, 4.0), 1: (4.5, 2.25)},
        tools={1: (WRAPPED,)},
    ),
    "ratings": Case(
        "ratings",
        [
            {
                "instruction": "Name a tree.",
                "system_prompt": "Be brief.",
                "generations": ["Fern.", "Oak.", "Moss."],
                "ratings": [2, 5, 1],
            },
            {"input": "Name a fish.", "generations": ["Pike.", "Newt."], "rating": [4.0, None]},
            {"instruction": "Tie?", "generations": ["Yes.", "No."], "ratings": [3, 3]},
        ],
        [([system("Be brief."), user("Name a tree.")], [bot("Oak.")], [bot("Moss.")])],
        scores={0: (5.0, 1.0)},
        dropped=["fewer than two answers with a rating", "tie: both answers have the same score"],
    ),
    "orca": Case(
        "orca",
        [
            {"system": "Be brief.", "question": "Name a tree.", "chosen": "Oak.", "rejected": "Moss."},
            {"system": "", "question": "Name a fish.", "chosen": "Pike.", "rejected": "Newt.", "tools": [TOOL]},
        ],
        [
            ([system("Be brief."), user("Name a tree.")], [bot("Oak.")], [bot("Moss.")]),
            ([user("Name a fish.")], [bot("Pike.")], [bot("Newt.")]),
        ],
        tools={1: (WRAPPED,)},
    ),
    "nectar": Case(
        "nectar",
        [
            {
                "prompt": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Name a tree.\n\nAssistant: ",
                "answers": [
                    {"answer": "Fern.", "model": "x", "rank": 2.0},
                    {"answer": "Moss.", "model": "y", "rank": 3.0},
                    {"answer": "Oak.", "model": "z", "rank": 1.0},
                ],
                "turns": 2,
                "num_responses": 3,
            }
        ],
        [([user("Hi"), bot("Hello."), user("Name a tree.")], [bot("Oak.")], [bot("Moss.")])],
        scores={0: (-1.0, -3.0)},
    ),
    "stackexchange": Case(
        "stackexchange",
        [
            {
                "qid": 1,
                "question": "Name a tree?",
                "date": "d",
                "metadata": [],
                "response_j": "Oak.",
                "response_k": "No.",
            }
        ],
        [([user("Name a tree?")], [bot("Oak.")], [bot("No.")])],
    ),
    "shp": Case(
        "shp",
        [
            {
                "history": "Name a tree?",
                "human_ref_A": "Oak.",
                "human_ref_B": "Moss.",
                "labels": 1,
                "score_A": 52,
                "score_B": 13,
            },
            {
                "history": "Name a fish?",
                "human_ref_A": "Newt.",
                "human_ref_B": "Pike.",
                "labels": 0,
                "score_A": 4,
                "score_B": 9,
            },
        ],
        [
            ([user("Name a tree?")], [bot("Oak.")], [bot("Moss.")]),
            ([user("Name a fish?")], [bot("Pike.")], [bot("Newt.")]),
        ],
        scores={0: (52.0, 13.0), 1: (9.0, 4.0)},
    ),
    "openwebui": Case(
        "openwebui",
        [
            feedback(1, "b", TEA, ["m2"]),  # side by side: the rated one won
            feedback(-1, "e", TEA, system="Be kind."),  # a thumb down on a later turn, alone
            feedback("1", "e", [*TEA[:4], said("e", "assistant", "Leaves.", "d")], system="Be kind."),
            feedback(1, "gone", TEA),
        ],
        [
            ([user("Tea or coffee?")], [bot("Tea.")], [bot("Coffee, surely.")]),
            (
                [system("Be kind."), user("Tea or coffee?"), bot("Tea."), user("Why?")],
                [bot("Leaves.")],
                [bot("It is calmer.")],
            ),
        ],
        dropped=["the rated message is not in the chat's snapshot"],
    ),
    "kto": Case(
        "kto",
        [
            {"prompt": "Name a tree.", "completion": "Moss.", "label": False},
            {"prompt": "Alone.", "completion": "Yes.", "label": True},
            {"prompt": [user("Name a tree.")], "completion": [bot("Oak.")], "label": True},
            {"prompt": "Name a tree.", "completion": "Elm.", "label": True},
            {"messages": [user("Hi"), bot("Hello")], "label": True},
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Go."}], "kto_tag": False},
            {"instruction": "Add.", "input": "1 1", "output": "2", "kto_tag": "true"},
            {"instruction": "Add.", "input": "1 1", "output": "3", "kto_tag": "False"},
        ],
        [
            ([user("Name a tree.")], [bot("Oak.")], [bot("Moss.")]),
            ([user("Hi")], [bot("Hello")], [bot("Go.")]),
            ([user("Add.\n1 1")], [bot("2")], [bot("3")]),
        ],
        dropped=["a vote without an opposite vote after the same prompt"] * 2,
    ),
}


@pytest.mark.parametrize("forced", [False, True], ids=["detected", "forced"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_form_means_these_messages(tmp_path, case, forced):
    source = write(tmp_path / "rows.jsonl", *case.rows)
    pairs, report = read_pairs(source, format=case.format if forced else None)
    assert [(list(pair.prompt), list(pair.chosen), list(pair.rejected)) for pair in pairs] == case.pairs
    numbers = range(len(case.pairs))
    assert [(pair.chosen_score, pair.rejected_score) for pair in pairs] == [
        case.scores.get(number, (None, None)) for number in numbers
    ]
    assert [pair.tools for pair in pairs] == [case.tools.get(number, ()) for number in numbers]
    assert sorted(drop.reason for drop in report.dropped) == sorted(case.dropped)
    assert report.read_as == next(format.title for format in FORMATS if format.name == case.format)
    assert (report.rows, report.kept) == (len(case.rows), len(pairs))


@pytest.mark.parametrize("written", [str, json.dumps], ids=["printed", "json"])
@pytest.mark.parametrize("name", ["sharegpt", "trl-chat", "trl-tools", "llamafactory-v1"])
def test_a_form_in_csv_means_the_same_messages(tmp_path, name, written):
    case = CASES[name]
    path = tmp_path / "rows.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, sorted({column for row in case.rows for column in row}))
        writer.writeheader()
        for row in case.rows:
            writer.writerow({key: value if isinstance(value, str) else written(value) for key, value in row.items()})
    pairs, report = read_pairs(str(path))
    assert [(list(pair.prompt), list(pair.chosen), list(pair.rejected)) for pair in pairs] == case.pairs
    assert sorted(drop.reason for drop in report.dropped) == sorted(case.dropped)


@pytest.mark.parametrize("written", [str, json.dumps], ids=["printed", "json"])
def test_an_answer_that_is_one_message_in_text_is_a_message(tmp_path, written):
    for name in ("sharegpt", "trl-chat"):
        rows = [
            {**row, **{side: written(one(row[side])) for side in ("chosen", "rejected")}} for row in CASES[name].rows
        ]
        pairs, _ = read_pairs(write(tmp_path / f"{name}.jsonl", *rows))
        assert [(list(pair.prompt), list(pair.chosen), list(pair.rejected)) for pair in pairs] == CASES[name].pairs


def one(answer: Any) -> Any:
    return answer[0] if isinstance(answer, list) else answer


def test_every_form_has_a_case_and_a_line_in_the_docs():
    assert {case.format for case in CASES.values()} == {format.name for format in FORMATS}
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert [format.name for format in FORMATS if f"| `{format.name}` | {format.title} |" not in page] == []


@pytest.mark.parametrize(
    "columns",
    [
        ("chosen_score", "rejected_score"),
        ("score_chosen", "score_rejected"),
        ("chosen_rating", "rejected_rating"),
        ("chosen-rating", "rejected-rating"),
        ("rating_chosen", "rating_rejected"),
        ("chosen_avg_rating", "rejected_avg_rating"),
        ("chosen_reward", "rejected_reward"),
    ],
    ids="-".join,
)
def test_scores_come_from_the_columns_that_have_them(tmp_path, columns):
    row = {"prompt": "Hi", "chosen": "Yes", "rejected": "No", columns[0]: "4.5", columns[1]: 2}
    [pair], _ = read_pairs(write(tmp_path / "a.jsonl", row))
    assert (pair.chosen_score, pair.rejected_score, pair.gap) == (4.5, 2.0, 2.5)
    assert columns in SCORES
    assert len(SCORES) == 7  # another column needs a line above


@pytest.mark.parametrize("score", [None, True, "high", float("nan"), float("inf"), [1], 10**400])
def test_what_is_no_finite_number_is_no_score(tmp_path, score):
    row = {"prompt": "Hi", "chosen": "Yes", "rejected": "No", "chosen_score": score, "rejected_score": 1}
    pairs, _ = read_pairs(write(tmp_path / "a.jsonl", row))
    assert (pairs[0].chosen_score, pairs[0].gap) == (None, None)


PAIRED = {"prompt": "Hi", "chosen": "Yes", "rejected": "No"}


@pytest.mark.parametrize(
    ("columns", "scores"),
    [
        ({"rating": [3.0, 4.5]}, (4.5, 3.0)),  # distilabel's order is that of the generations
        ({"ratings": "[5, 1]"}, (5, 1)),
        ({"rating": [3, 4, 5]}, (None, None)),
        ({"rating": [3, None]}, (None, None)),
        ({"rating": 4}, (None, None)),
        ({"rating": [1, 2], "chosen_score": 9, "rejected_score": 8}, (9, 8)),
        ({"rating": [1, 2], "chosen_score": 9}, (2, 1)),
        ({"chosen_score": 9}, (9, None)),
        ({"agreement": 0.75}, (0.75, 0.25)),
        ({"agreement": "1"}, (1, 0)),
        ({"agreement": 0.3}, (None, None)),  # not a share of those who preferred the chosen one
        ({"agreement": 80}, (None, None)),
        ({"agreement": 0.75, "rating": [1, 2]}, (2, 1)),
    ],
)
def test_ratings_and_agreement_are_scores(tmp_path, columns, scores):
    [pair], _ = read_pairs(write(tmp_path / "a.jsonl", {**PAIRED, **columns}))
    assert (pair.chosen_score, pair.rejected_score) == scores


@pytest.mark.parametrize("columns", [{"rating": [4, 4]}, {"agreement": 0.5}])
def test_equal_ratings_and_an_even_vote_are_ties(tmp_path, columns):
    _, report = read_pairs(write(tmp_path / "a.jsonl", PAIRED, {**PAIRED, **columns}))
    assert report.reasons() == [("tie: both answers have the same score", 1)]


def test_a_least_gap_drops_what_is_closer_and_what_has_no_scores(tmp_path):
    row = {"prompt": "Hi", "chosen": "Yes", "rejected": "No"}
    scored = [{**row, "chosen_score": score, "rejected_score": 1.0} for score in (4, 1.5, 2.5, 1, 0.5)]
    pairs, report = read_pairs(write(tmp_path / "a.jsonl", *scored, row), min_gap=1.5)
    assert [pair.gap for pair in pairs] == [3.0, 1.5]
    assert sorted(report.reasons()) == [
        ("score gap below 1.5", 1),
        ("the rejected answer has the higher score", 1),
        ("tie: both answers have the same score", 1),
        ("without scores, and a least gap is asked for", 1),
    ]
    assert (report.rows, report.kept) == (6, 2)


def test_the_canonical_form_keeps_scores_tools_and_origin(tmp_path):
    made = {"judge": "length", "seed": 3, "prompts": "p.txt"}
    row = {
        "prompt": [user("Hi")],
        "chosen": [bot("Yes")],
        "rejected": [bot("No")],
        "chosen_score": 2.0,
        "rejected_score": -1.0,
        "origin": made,
        "tools": [TOOL],
    }
    pairs, _ = read_pairs(write(tmp_path / "a.jsonl", row))
    assert (pairs[0].chosen_score, pairs[0].rejected_score, pairs[0].provenance) == (2.0, -1.0, made)
    assert pairs[0].tools == (WRAPPED,)
    assert pairs[0].origin == Origin(str(tmp_path / "a.jsonl"), 1)


@pytest.mark.parametrize(("own", "surplus"), [({}, 0), ({"annotation": {"rating": 1}}, -1)], ids=["first", "both"])
def test_siblings_with_a_rating_of_their_own_are_not_compared_twice(tmp_path, own, surplus):
    """The snapshot of the first rating may be older than the second rating, or know both."""
    both = [
        TEA[0],
        said("b", "assistant", "Tea.", "a", **own),
        said("c", "assistant", "Coffee, surely.", "a", annotation={"rating": -1}),
    ]
    source = write(tmp_path / "a.jsonl", feedback(1, "b", both, ["m2"]), feedback(-1, "c", both, ["m"]))
    pairs, report = read_pairs(source)
    assert [(list(pair.chosen), list(pair.rejected)) for pair in pairs] == [([bot("Tea.")], [bot("Coffee, surely.")])]
    assert (report.rows, report.kept, report.surplus) == (2, 1, surplus)


def test_one_rating_against_several_siblings_makes_several_pairs(tmp_path):
    tree = [*TEA, said("x", "assistant", "Water.", "a")]
    pairs, report = read_pairs(write(tmp_path / "a.jsonl", feedback(-1, "b", tree, ["m2", "m3"])))
    assert [list(pair.chosen) for pair in pairs] == [[bot("Coffee, surely.")], [bot("Water.")]]
    assert [list(pair.rejected) for pair in pairs] == [[bot("Tea.")]] * 2
    assert (report.rows, report.kept, report.surplus) == (1, 2, 1)


def test_a_rated_turn_of_sharegpt_is_compared_with_its_sibling(tmp_path):
    tree = [TEA[0], {"id": "b", "parentId": "a", "from": "gpt", "value": "Tea."}, TEA[2]]
    tree.append({**TEA[2], "id": "x", "content": "Tea."})  # the same words: no comparison
    [pair], _ = read_pairs(write(tmp_path / "a.jsonl", feedback(1, "b", tree, ["m"])))
    assert (pair.chosen, pair.rejected) == ((bot("Tea."),), (bot("Coffee, surely."),))


def test_a_sibling_that_repeats_another_is_compared_once(tmp_path):
    tree = [*TEA[:3], {**TEA[2], "id": "x"}]
    pairs, _ = read_pairs(write(tmp_path / "a.jsonl", feedback(1, "b", tree, ["m"])))
    assert [pair.rejected for pair in pairs] == [(bot("Coffee, surely."),)]


@pytest.mark.parametrize("history", [5, "5", {"a": 1}, [["one"]]])
def test_a_history_of_another_kind_drops_the_row(tmp_path, history):
    row = {"instruction": "Hi", "chosen": "Yes", "rejected": "No"}
    _, report = read_pairs(write(tmp_path / "a.jsonl", row, {**row, "history": history}))
    assert report.reasons() == [("history is not a list of [question, answer]", 1)]


@pytest.mark.parametrize("format", [None, "kto"])
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_a_vote_may_have_its_prompt_as_messages_and_its_answer_in_a_column(tmp_path, format, column):
    asked = [system("Be brief."), user("Why?")]
    rows = [{column: asked, "completion": text, "label": up} for text, up in (("So.", True), ("Dunno.", False))]
    [pair], _ = read_pairs(write(tmp_path / "a.jsonl", *rows), format=format)
    assert (pair.prompt, pair.chosen, pair.rejected) == (tuple(asked), (bot("So."),), (bot("Dunno."),))


def test_a_chat_that_goes_in_a_circle_is_dropped(tmp_path):
    tree = [said("a", "user", "Hi", "b"), said("b", "assistant", "Yes", "a")]
    with pytest.raises(DataError, match="goes in a circle"):
        read_pairs(write(tmp_path / "a.jsonl", feedback(1, "b", tree)))


def test_votes_are_used_once_and_remember_both_rows(tmp_path):
    votes = [{"prompt": "Hi", "completion": text, "label": up} for text, up in (("a", 1), ("b", 0), ("c", 0), ("d", 1))]
    source = write(tmp_path / "a.jsonl", *votes)
    pairs, report = read_pairs(source)
    assert [(pair.chosen[0]["content"], pair.rejected[0]["content"]) for pair in pairs] == [("a", "b"), ("d", "c")]
    assert pairs[1].provenance == {"file": source, "row": 4, "rejected_row": 3}
    assert (report.rows, report.kept, report.surplus) == (4, 2, -2)
    assert report.summary() == "2 pairs read, 0 dropped"


def vote(answer: str, up: bool, **more: Any) -> dict[str, Any]:
    return {"prompt": "Hi", "completion": answer, "label": up, **more}


def paired(tmp_path: Path, *votes: tuple[str, bool]) -> tuple[list[tuple[str, str]], list[tuple[str, int]]]:
    """What votes after one prompt became: `(chosen, rejected)` of each pair, and the reasons for the others."""
    filler = [vote(answer, answer == "y", prompt="Other") for answer in "yn"]  # a file without a pair is an error
    pairs, report = read_pairs(write(tmp_path / "votes.jsonl", *(vote(*given) for given in votes), *filler))
    assert report.rows == 2 * len(pairs) + len(report.dropped)
    assert {drop.kind for drop in report.dropped} <= {"vote"}
    return [(pair.chosen[0]["content"], pair.rejected[0]["content"]) for pair in pairs[:-1]], report.reasons()


BOTH, ALONE = "the same answer has both votes", "a vote without an opposite vote after the same prompt"


def test_votes_are_paired_with_the_first_opposite_vote_on_another_answer(tmp_path):
    assert paired(tmp_path, ("a", True), ("a", False), ("b", False)) == ([("a", "b")], [(ALONE, 1)])
    assert paired(tmp_path, ("a", True), ("b", True), ("a", False)) == ([("b", "a")], [(ALONE, 1)])
    assert paired(tmp_path, ("a", True), ("a", False)) == ([], [(BOTH, 2)])
    assert paired(tmp_path, ("a", True), ("a", False), ("a", False)) == ([], [(BOTH, 3)])


def test_a_pair_trades_its_vote_if_that_makes_another_pair(tmp_path):
    pairs, reasons = paired(tmp_path, ("x", True), ("a", True), ("y", False), ("a", False))
    assert (pairs, reasons) == ([("x", "a"), ("a", "y")], [])


def test_as_many_votes_are_paired_as_can_be():
    """Against every matching of the same votes; few answers and many votes, so that they often agree."""
    draw = random.Random(0)
    for _ in range(300):
        sides = [
            [
                UnpairedAnswer((user("Hi"),), (bot(draw.choice("abc")),), up, Origin("f", row))
                for row in range(draw.randint(0, 4))
            ]
            for up in (True, False)
        ]
        ups, downs = sides
        pairs, unused_ups, unused_downs = matched(ups, downs)
        assert all(up.answer != down.answer for up, down in pairs)
        used = [*(up for up, _ in pairs), *unused_ups], [*(down for _, down in pairs), *unused_downs]
        assert [sorted(vote.origin.row for vote in side) for side in used] == [
            [vote.origin.row for vote in side] for side in sides
        ]
        longer, shorter = sorted(sides, key=len, reverse=True)
        most = max(
            sum(one.answer != other.answer for one, other in zip(order, shorter, strict=False))
            for order in itertools.permutations(longer, len(shorter))
        )
        assert len(pairs) == most


def test_a_hundred_thousand_votes_on_one_answer_take_no_time():
    votes = [
        [UnpairedAnswer((user("Hi"),), (bot("a"),), up, Origin("f", row)) for row in range(50_000)]
        for up in (True, False)
    ]
    started = time.monotonic()
    assert matched(*votes)[0] == []
    assert time.monotonic() - started < 10


def test_votes_with_other_tools_are_not_paired(tmp_path):
    other = {**TOOL, "name": "snow"}
    rows = [
        vote("a", True, tools=[TOOL]),
        vote("b", False, tools=[other]),
        vote("c", False),
        vote("d", False, tools=[TOOL]),
    ]
    [pair], report = read_pairs(write(tmp_path / "a.jsonl", *rows))
    assert (pair.chosen, pair.rejected, pair.tools) == ((bot("a"),), (bot("d"),), (WRAPPED,))
    assert report.reasons() == [(ALONE, 2)]


def test_votes_are_paired_across_files_and_remember_both(tmp_path):
    ups, downs = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write(ups, vote("a", True))
    write(downs, vote("c", False, prompt="Alone"), vote("b", False))
    for source in (str(tmp_path), [str(ups), str(downs)]):
        [pair], report = read_pairs(source)
        assert pair.provenance == {"file": str(ups), "row": 1, "rejected_file": str(downs), "rejected_row": 2}
        assert (report.rows, report.kept, len(report.dropped)) == (3, 1, 1)
        found = examine([source] if isinstance(source, str) else source)
        assert (found.pairs, [*found.findings]) == (1, ["vote"])
    [kept], _ = read_pairs(write(tmp_path / "pairs.jsonl", canonical_row(pair)))
    assert kept.provenance == pair.provenance


def test_a_file_whose_votes_make_no_pair_is_named(tmp_path):
    sources = [
        write(tmp_path / "a.jsonl", vote("a", True), vote("b", False)),
        write(tmp_path / "b.jsonl", vote("c", True)),
    ]
    with pytest.raises(DataError, match=r"b\.jsonl holds no usable pair: a vote without an opposite vote"):
        read_pairs(sources)


def test_rows_of_several_forms_in_one_folder_are_each_recognised(tmp_path):
    (tmp_path / "deep").mkdir()
    write(tmp_path / "a.jsonl", CASES["orca"].rows[0], CASES["trl-text"].rows[0])
    (tmp_path / "deep" / "b.json.gz").write_bytes(gzip.compress(json.dumps(CASES["shp"].rows).encode(), mtime=0))
    (tmp_path / "notes.txt").write_text("no data")
    (tmp_path / ".hidden.jsonl").write_text("{")
    for name in ("dataset_infos.json", "deep/dataset_info.json", "deep/state.json"):
        (tmp_path / name).write_text('{"description": "no rows"}')
    for name in (
        "a.jsonl.dropped.jsonl",
        "p.jsonl.gz.dropped.jsonl.gz",
        "p.jsonl.samples.jsonl",
        "p.jsonl.scores.jsonl",
    ):
        (tmp_path / name).write_text("{")
    pairs, report = read_pairs(str(tmp_path))
    assert [str(pair.origin) for pair in pairs] == [
        f"{tmp_path}/a.jsonl:1",
        f"{tmp_path}/a.jsonl:2",
        f"{tmp_path}/deep/b.json.gz:1",
        f"{tmp_path}/deep/b.json.gz:2",
    ]
    assert report.read_as == "SHP (2), Intel Orca pairs (1), TRL preference pairs (1)"


def test_an_unknown_form_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"'alpca' is not a format.*alpaca"):
        read_pairs(write(tmp_path / "a.jsonl", {}), format="alpca")


def test_a_forced_form_says_what_a_row_lacks(tmp_path):
    with pytest.raises(DataError, match="without text in 'history'"):
        read_pairs(write(tmp_path / "a.jsonl", {"human_ref_A": "a", "human_ref_B": "b", "labels": 1}), format="shp")


def test_another_text_column_is_never_taken_for_no_prompt(tmp_path):
    row = {"my_text": "Why?", "chosen": "It is so.", "rejected": "It is not."}
    with pytest.raises(DataError, match="without 'prompt'"):
        read_pairs(write(tmp_path / "a.jsonl", row))


def test_a_row_of_no_known_form_is_called_so(tmp_path):
    _, report = read_pairs(write(tmp_path / "a.jsonl", CASES["trl-text"].rows[0], {"question": "Why?"}))
    assert report.read_as == "TRL preference pairs (1), no known format (1)"
    assert report.reasons() == [("without 'chosen' (columns: question)", 1)]


def test_a_prompt_that_only_mentions_a_transcript_stays_text():
    row = {"prompt": "What does '\n\nHuman: Hi\n\nAssistant:' mean?", "chosen": "A", "rejected": "B"}
    assert format_of(row).name == "trl"


def test_tools_reach_the_chat_template(tokenizer, tmp_path):
    import copy

    shows = copy.deepcopy(tokenizer)
    shows.chat_template = (
        "{% if tools %}{{ tools[0]['function']['name'] }};{% endif %}"
        "{% for message in messages %}{{ message['role'] }}:{{ message['content'] }}"
        "{% if message.tool_calls %}{{ message.tool_calls[0].function.arguments.day }}{% endif %}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    pairs, _ = read_pairs(write(tmp_path / "a.jsonl", *CASES["trl-tools"].rows))
    tokens = tokenize_pair(shows, pairs[0], max_length=None)
    assert shows.decode(tokens.prompt) == "rain;user:Did it rain on Monday?<|im_end|>assistant:"
    assert shows.decode(tokens.chosen) == "Monday<|im_end|>tool:3<|im_end|>assistant:Yes, 3 mm.<|im_end|>"
    plain = tokenize_pair(
        shows, read_pairs(write(tmp_path / "b.jsonl", CASES["trl-text"].rows[0]))[0][0], max_length=None
    )
    assert shows.decode(plain.prompt) == "user:Name a tree.<|im_end|>assistant:"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"tools": "[{"}, "tools is not a JSON list"),
        ({"tools": [1]}, "tools is not a list of function schemas"),
        ({"chosen": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "chosen has a tool call without a"),
        ({"chosen": [{"role": "assistant", "tool_calls": 3}]}, "chosen has a tool call without a function name"),
        ({"chosen": [{"from": "gpt", "value": None}]}, "chosen has a message without text content"),
        ({"chosen": [{"from": "bot", "value": "Hi"}]}, "chosen has a message with an unknown role ('bot')"),
        ({"chosen": [{"from": [], "value": "Hi"}]}, "chosen has a message with an unknown role ([])"),
        ({"chosen": [{"role": [], "content": "Hi"}]}, "chosen has a message with an unknown role ([])"),
        ({"chosen": [{"role": "assistant", "content": []}]}, "chosen has a message without text content"),
        ({"chosen": [{"role": "assistant", "content": "", "tool_calls": []}]}, "empty chosen answer"),
        (
            {"chosen": [{"role": "assistant", "content": [{"type": "tool_call", "value": "{"}]}]},
            "chosen has a tool call without a function name",
        ),
    ],
)
def test_what_is_malformed_is_dropped_with_its_reason(tmp_path, row, reason):
    good = {"prompt": "Hi", "chosen": "Yes", "rejected": "No"}
    _, report = read_pairs(write(tmp_path / "a.jsonl", good, {**good, **row}))
    assert report.dropped[0].reason.startswith(reason)


# --- compressed files -----------------------------------------------------------------------------


def test_a_gzip_of_each_kind_reads_like_the_file(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = CASES["trl-text"].rows
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    write(tmp_path / "a.jsonl", *rows)
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    for kind in ("parquet", "json", "jsonl", "csv"):
        packed = tmp_path / f"a.{kind}.gz"
        packed.write_bytes(gzip.compress((tmp_path / f"a.{kind}").read_bytes(), mtime=0))
        pairs, _ = read_pairs(str(packed))
        assert [(list(pair.prompt), list(pair.chosen), list(pair.rejected)) for pair in pairs] == CASES[
            "trl-text"
        ].pairs


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", b"not gzip", "broken gzip"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": 1}\n' * 999, mtime=0)[:-9], "broken gzip"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": \n', mtime=0), "line 1: broken JSON"),
        ("a.txt.gz", gzip.compress(b"x", mtime=0), "unknown kind of file"),
        ("a.parquet.gz", gzip.compress(b"x", mtime=0), "broken Parquet"),
        ("a.csv.gz", gzip.compress("é,é,é\n".encode() + b"\xe9", mtime=0), "is not UTF-8 text (byte 9)"),
    ],
)
def test_a_broken_gzip_says_so(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_pairs(str(tmp_path / name))
    assert message in str(caught.value)


def test_json_lines_under_the_name_json_are_read(tmp_path):
    path = tmp_path / "a.json"
    write(path, *CASES["trl-text"].rows)
    pairs, _ = read_pairs(str(path))
    assert [pair.origin.row for pair in pairs] == [1, 2]


# --- in a run -------------------------------------------------------------------------------------


def test_a_run_says_what_rows_were_read_as_and_heeds_format_and_gap(tmp_path, recipe_dict):
    from lora_dpo.config.reading import check_recipe
    from lora_dpo.events import Resolved, StopSignal
    from lora_dpo.training.prepare import prepare

    rows = [
        {
            "question": f"Name tree {gap}.",
            "chosen": "Oak.",
            "rejected": "Moss.",
            "chosen_score": gap,
            "rejected_score": 0,
        }
        for gap in (1, 2, 3)
    ]
    data = {"train": write(tmp_path / "a.jsonl", *rows), "min_gap": 2.0}
    lines: dict[str, str] = {}

    def hear(event: Any) -> None:
        if isinstance(event, Resolved):
            lines.update(event.lines)

    run = prepare(check_recipe(recipe_dict(data=data)), tmp_path / "out", hear, StopSignal())
    assert lines["train data"] == "2 pairs read, 1 dropped (1 score gap below 2), read as Intel Orca pairs"
    assert len(run.train) == 2
    with pytest.raises(DataError, match="holds no usable pair: without 'prompt'"):
        prepare(check_recipe(recipe_dict(data={**data, "format": "trl"})), tmp_path / "out", hear, StopSignal())


def test_a_run_and_its_plan_say_how_a_table_was_read(tmp_path, recipe_dict):
    from lora_dpo import plan
    from lora_dpo.config.reading import check_recipe, dump_recipe
    from lora_dpo.events import Resolved, StopSignal
    from lora_dpo.training.planning.lines import lines as plan_lines
    from lora_dpo.training.prepare import prepare

    path = tmp_path / "a.csv"
    path.write_text("Q;Besser;Schlechter;Notiz\nName a tree.;Oak.;Moss.;x\nAnd one more?;Elm.;Fern.;y\n")
    data = {"train": str(path), "columns": {"prompt": "Q"}}
    with pytest.raises(
        DataError, match=r"eval\.jsonl: there is no column 'Q', .*Its rows are TRL preference pairs and need"
    ):
        prepare(check_recipe(recipe_dict(data=data)), tmp_path / "out", print, StopSignal())
    (tmp_path / "b.csv").write_text("Q,Besser,Schlechter\nA third?,Ash.,Moss.\n")
    recipe = check_recipe(recipe_dict(data={**data, "eval": str(tmp_path / "b.csv")}))
    assert "columns:\n    prompt: Q\n" in dump_recipe(recipe)
    heard: list[tuple[str, str]] = []
    hear = lambda event: heard.extend(event.lines) if isinstance(event, Resolved) else None  # noqa: E731
    run = prepare(recipe, tmp_path / "out", hear, StopSignal())
    assert [pair.origin.row for pair in run.train] == [2, 3]
    said = [
        ("", "semicolons between its cells"),
        ("", "read 'Q' as prompt, 'Besser' as chosen, 'Schlechter' as rejected; not read: 'Notiz'"),
    ]
    at = heard.index(("train data", "2 pairs read, 0 dropped, read as TRL preference pairs"))
    assert heard[at + 1 : at + 3] == said
    planned = plan(recipe)
    assert planned.to_json()["data"]["train"]["notes"] == tuple(text for _, text in said)
    shown = list(plan_lines(planned))
    assert shown[shown.index(("train data", "2 pairs read, 0 dropped")) + 1 :][:2] == said


def test_a_leak_across_a_system_turn_is_said(tmp_path, recipe_dict):
    from lora_dpo.config.reading import check_recipe
    from lora_dpo.events import Note, StopSignal
    from lora_dpo.training.prepare import prepare

    framed, plain = CASES["trl-chat"].rows[0], CASES["trl-text"].rows[0]
    data = {"train": write(tmp_path / "a.jsonl", framed), "eval": write(tmp_path / "b.jsonl", plain)}
    notes: list[str] = []
    prepare(
        check_recipe(recipe_dict(data=data)),
        tmp_path / "out",
        lambda event: notes.append(event.text) if isinstance(event, Note) else None,
        StopSignal(),
    )
    assert any(note.startswith("1 of 1 held-out pairs have a prompt that is also trained on") for note in notes)


def weights_of(tmp_path, recipe_dict, scores, **trainer):
    from lora_dpo.config.reading import check_recipe
    from lora_dpo.events import StopSignal
    from lora_dpo.training.prepare import prepare

    rows = [
        {"question": f"Name tree {row}.", "chosen": "Oak.", "rejected": "Moss.", "chosen_score": c, "rejected_score": r}
        for row, (c, r) in enumerate(scores)
    ]
    data = {"train": write(tmp_path / "a.jsonl", *rows), "pair_weight": "gap"}
    recipe = check_recipe(recipe_dict(data=data, **({"trainer": trainer} if trainer else {})))
    return prepare(recipe, tmp_path / "out", lambda event: None, StopSignal()).weights


def test_a_pair_counts_by_its_gap_over_the_mean_gap_and_at_most_four_times(tmp_path, recipe_dict):
    assert weights_of(tmp_path, recipe_dict, [(1, 0), (2, 0), (5, 2)]) == [0.5, 1.0, 1.5]
    heavy = weights_of(tmp_path, recipe_dict, [(1, 0)] * 9 + [(91, 0)])  # a mean gap of 10
    assert heavy == [0.1] * 9 + [4.0]


def test_weights_need_scores_and_a_loss_that_is_a_mean_over_pairs(tmp_path, recipe_dict):
    with pytest.raises(DataError, match=r"1 of 2 training pairs have no two scores .* row 2\. Drop them"):
        weights_of(tmp_path, recipe_dict, [(1, 0), (1, None)])
    with pytest.raises(ConfigError, match=r"data\.pair_weight weights pairs, but the loss aot compares"):
        weights_of(tmp_path, recipe_dict, [(1, 0)], loss_type=["aot"])


def test_a_run_trains_with_the_weights_of_its_rows(tmp_path, recipe_dict, monkeypatch):
    from safetensors.torch import load_file

    from lora_dpo.config.reading import check_recipe
    from lora_dpo.training.run import train

    monkeypatch.chdir(tmp_path)
    rows = [
        {"question": f"Name {row}.", "chosen": "Oak.", "rejected": "Moss.", "chosen_score": row, "rejected_score": 0}
        for row in (1, 2, 9)
    ]
    adapters = {}
    for weight in ("gap", "equal"):
        data = {"train": write(tmp_path / "a.jsonl", *rows), "pair_weight": weight}
        found = train(check_recipe(recipe_dict(data=data, output=str(tmp_path / weight))))
        adapters[weight] = load_file(found.folder / "adapter_model.safetensors")
    assert any(not torch.equal(adapters["gap"][name], tensor) for name, tensor in adapters["equal"].items())


# --- tool calls and what stands around them -------------------------------------------------------

NEEDS_IDS = (
    "{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "{% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('an id of 9 characters') }}{% endif %}"
    "{{ c.function.name }}({{ c.function.arguments | tojson }})#{{ c.id }}{% endfor %}"
    "{% elif m.role == 'tool' %}[{{ m.tool_call_id }}:{{ m.content }}]{% else %}{{ m.content }}{% endif %}"
    "{{ eos_token }}{% endfor %}"
)
"""As Mistral's templates do."""


def called(name: str, arguments: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An assistant turn that calls a function."""
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{**more, "type": "function", "function": {"name": name, "arguments": arguments}}],
    }


def test_the_id_of_a_tool_call_reaches_the_template(tokenizer, tmp_path):
    prompt = [user("How warm is Oslo?"), called("weather", {"city": "Oslo"}, id="a1B2c3D4e")]
    answered = {"role": "tool", "name": "weather", "tool_call_id": "a1B2c3D4e", "content": "4"}
    row = {"prompt": [*prompt, answered], "chosen": [bot("Four.")], "rejected": [bot("No idea.")]}
    other = {"prompt": [user("Oslo?")], "chosen": [prompt[1]], "rejected": [called("add", {}, id="z1B2c3D4e")]}
    asks = copy.deepcopy(tokenizer)
    asks.chat_template = NEEDS_IDS
    for one in read_pairs(write(tmp_path / "a.jsonl", row, other))[0]:
        whole = render(asks, [*one.prompt, *one.chosen])
        assert 'weather({"city": "Oslo"})#a1B2c3D4e' in whole
        again = write(tmp_path / f"{one.origin.row}.jsonl", canonical_row(one))
        assert [render(asks, [*pair.prompt, *pair.chosen]) for pair in read_pairs(again)[0]] == [whole]


def test_answers_that_differ_in_the_ids_of_their_calls_alone_are_equal(tmp_path):
    sides = [[called("weather", {"city": "Oslo"}, id=name)] for name in ("a1B2c3D4e", "f5G6h7I8j")]
    whole = {"chosen": [user("Oslo?"), *sides[0]], "rejected": [user("Oslo?"), *sides[1]]}
    explicit = {"prompt": [user("Oslo?")], "chosen": sides[0], "rejected": sides[1]}
    for number, row in enumerate((whole, explicit)):
        with pytest.raises(DataError, match="chosen equals rejected"):
            read_pairs(write(tmp_path / f"{number}.jsonl", row))


def test_conversations_part_at_their_answers_and_not_at_the_ids_of_their_calls(tmp_path):
    sides = [
        [
            user("Oslo?"),
            called("weather", {"city": "Oslo"}, id=name),
            {"role": "tool", "tool_call_id": name, "content": "4"},
            bot(answer),
        ]
        for name, answer in (("a1B2c3D4e", "Four."), ("f5G6h7I8j", "No idea."))
    ]
    (pair,), _ = read_pairs(write(tmp_path / "a.jsonl", {"chosen": sides[0], "rejected": sides[1]}))
    assert (list(pair.prompt), *pair.chosen, *pair.rejected) == (sides[0][:3], bot("Four."), bot("No idea."))


def calling_row(asked: str, name: str, arguments: dict[str, Any], **schema: Any) -> dict[str, Any]:
    """A row whose messages have different keys, as its tools have different parameters."""
    parameters = {"type": "object", "properties": schema}
    return {
        "prompt": [user(asked), called(name, arguments), {"role": "tool", "name": name, "content": "4"}],
        "chosen": [bot("4")],
        "rejected": [bot("No idea.")],
        "tools": [{"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}],
    }


CALLING = [
    calling_row("How warm is Oslo?", "weather", {"city": {"name": "Oslo"}}, city={"type": "string", "enum": ["Oslo"]}),
    calling_row("1+3?", "add", {"a": 1, "b": [{"c": 3}, {"d": 4}]}, a={"type": "number"}, b={"type": "array"}),
    calling_row("Now?", "clock", {}),
]


@pytest.mark.parametrize("packed", ["parquet", "hub"])
def test_arrow_adds_nothing_to_calls_and_schemas(tmp_path, monkeypatch, packed):
    import datasets

    plain, _ = read_pairs(write(tmp_path / "a.jsonl", *CALLING))
    stored = datasets.Dataset.from_list(CALLING)
    source = str(tmp_path / "a.parquet")
    if packed == "hub":
        source = "owner/name"
        monkeypatch.setattr(datasets, "load_dataset", lambda *names, split: stored)
    else:
        stored.to_parquet(source)
    read, _ = read_pairs(source)
    contents = [[(one.prompt, one.chosen, one.rejected, one.tools) for one in pairs] for pairs in (plain, read)]
    assert contents[0] == contents[1]


def test_a_null_that_a_row_wrote_itself_stays(tmp_path):
    row = calling_row("Hi?", "find", {"after": None}, after={"type": "string", "default": None})
    (pair,), _ = read_pairs(write(tmp_path / "a.jsonl", row))
    assert pair.prompt[1]["tool_calls"][0]["function"]["arguments"] == {"after": None}
    assert pair.tools[0]["function"]["parameters"]["properties"]["after"]["default"] is None


@pytest.mark.parametrize(
    "row",
    [
        {**voted("A"), "response_c": "Well."},
        {"prompt": "Hello", "response_a": "Yes.", "answer_b": "No.", "winner": "A"},
        {"prompt": "Hello", "response_a": "Yes.", "response_2": "No.", "winner": "A"},
        {"prompt": "Hello", "response_a": "Yes.", "response_b": "No."},
        {"prompt": "Hello", "response_a": "Yes.", "response_b": "No.", "winner_model_a": 1},
        {**voted("A"), "chosen": "Yes.", "rejected": "No."},
    ],
)
def test_what_is_no_comparison_of_two_answers_is_not_taken_for_one(row):
    assert format_of(row).name != "winner"


ONE_TWO = ("response_1", "response_2")


@pytest.mark.parametrize(
    ("names", "winners"),
    [
        (ONE_TWO, [-1, 1]),
        (ONE_TWO, [1, 2, -2]),
        (ONE_TWO, [0, 1]),
        (ONE_TWO, ["1", "0"]),
        (ONE_TWO, [1, 2, 3]),
        (ONE_TWO, [1.0, 1.5]),
        (("response_0", "response_1"), [-1, 0, 1]),
        (("response_0", "response_1"), [1, 2]),
    ],
)
@pytest.mark.parametrize("end", ["jsonl", "csv"])
def test_numbers_that_can_be_read_in_two_ways_are_refused(tmp_path, names, winners, end):
    rows = [{**voted(winner, "preference", names), "prompt": f"Hello {at}"} for at, winner in enumerate(winners)]
    path = tmp_path / f"votes.{end}"
    if end == "jsonl":
        write(path, *rows)
    else:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
    for read in (read_pairs, partial(read_answers, good_only=True)):
        with pytest.raises(
            DataError, match=r"votes\.\w+: the column 'preference' has the numbers .* in two ways\. Write"
        ):
            read(str(path))


@pytest.mark.parametrize(
    ("winner", "names"),
    [
        *((winner, ONE_TWO) for winner in (-1, -2, "-1", "- 1", 0, 1.5, 12, True)),
        *(
            (winner, ("response_a", "response_b"))
            for winner in ("-A", "!A", "A>B", "A<B", "A+", "not A", "A is worse", 1)
        ),
    ],
)
def test_what_names_no_answer_makes_no_pair(winner, names):
    with pytest.raises(BadRow, match="the winner is neither"):
        format_of(row := voted(winner, names=names)).read(row, Origin("a.jsonl", 1))


def test_a_letter_that_is_the_other_answers_text_makes_no_pair():
    choices = {"prompt": "Which? A) red B) blue", "response_a": "B", "response_b": "A"}
    for winner in ("A", "B"):
        with pytest.raises(BadRow, match="the letter or number of one answer and the text of the other"):
            format_of(row := {**choices, "winner": winner}).read(row, Origin("a.jsonl", 1))
    alike = {**choices, "response_a": "A", "response_b": "B", "winner": "B"}
    assert format_of(alike).read(alike, Origin("a.jsonl", 1)).chosen[0]["content"] == "B"
    flagged = {**choices, "winner_model_a": 1, "winner_model_b": 0}
    assert format_of(flagged).read(flagged, Origin("a.jsonl", 1)).chosen[0]["content"] == "B"


def test_winners_in_two_forms_are_told(tmp_path):
    rows = [voted("A"), {**voted("Hello, how can I help?"), "prompt": "Hi"}, {**voted("B"), "prompt": "Hey"}]
    pairs, report = read_pairs(write(tmp_path / "votes.jsonl", *rows))
    assert len(pairs) == 3
    (note,) = report.noted()
    assert note == "its column 'winner' names answers by their letters or numbers and by their texts"
