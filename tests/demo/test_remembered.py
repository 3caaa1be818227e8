"""What a browser keeps of a chat, and what is believed of what comes back."""

import json

import pytest

from lora_dpo.demo import remembered as module
from lora_dpo.demo.conversation import Conversation, StreamedAnswer, Turn
from lora_dpo.demo.remembered import MOST_TURNS, recalled, remembered


def turn(user="Hi.", left="Yes.", right=None, cut=False):
    return Turn(user, [StreamedAnswer("base", left, 3, 9, 0.5, 0.1, cut), right and StreamedAnswer("mine", right)])


def again(conversation, left="base", right="mine", system="Be brief."):
    """Through a browser and back."""
    return recalled(json.loads(json.dumps(remembered(conversation, left, right, system))))


def test_a_conversation_comes_back_with_its_names_and_its_system_prompt():
    found, left, right, system = again(Conversation([turn(cut=True), turn("More.", "No.", "Well.")]))
    assert (left, right, system) == ("base", "mine", "Be brief.")
    assert [said.user for said in found.exchanges] == ["Hi.", "More."]
    assert [(a and (a.who, a.text, a.cut)) for a in found.exchanges[0].answers] == [("base", "Yes.", True), None]
    assert found.exchanges[1].answers[1].text == "Well."
    assert found.conversation(0)[-1] == {"role": "assistant", "content": "No."}


def test_the_last_turns_are_kept_as_many_as_there_is_room_for(monkeypatch):
    many = Conversation([turn(str(number)) for number in range(MOST_TURNS + 5)])
    assert [said.user for said in again(many)[0].exchanges] == [str(number) for number in range(5, MOST_TURNS + 5)]
    monkeypatch.setattr(module, "MOST_CHARACTERS", 40)
    long = Conversation([turn("a" * 10, "b" * 10), turn("c" * 10, "d" * 10)])
    assert [said.user for said in again(long, system="")[0].exchanges] == ["a" * 10, "c" * 10]
    assert [said.user for said in again(long, system="x")[0].exchanges] == ["c" * 10]


GOOD = {"user": "Hi.", "answers": [{"who": "base", "text": "Yes.", "cut": False}, None]}


@pytest.mark.parametrize(
    "found",
    [
        None, {}, [], "text", 3, {"turns": None}, {"turns": [3]}, {"turns": [{}]}, {"turns": [{**GOOD, "user": 3}]},
        {"turns": [{**GOOD, "user": " "}]}, {"turns": [{**GOOD, "answers": [None, None]}]},
        {"turns": [{**GOOD, "answers": GOOD["answers"] * 2}]}, {"turns": [{**GOOD, "answers": [{"who": "x"}, None]}]},
        {"turns": [GOOD, {**GOOD, "user": "x" * 300_000}]},
    ],
)  # fmt: skip
def test_anything_else_is_no_conversation(found):
    conversation, *names = recalled(found)
    assert conversation.exchanges == []
    assert names == ["", "", ""]


def test_of_names_only_texts_are_taken():
    conversation, left, right, system = recalled({"turns": [GOOD], "left": 3, "right": ["x"], "system": None})
    assert len(conversation.exchanges) == 1
    assert (left, right, system) == ("", "", "")
