"""Single answers for SFT and KTO: from pairs, votes and demonstrations, as text and as ids."""

import json

import pytest

from lora_dpo.data import Origin, TokenPair, tokenize_pairs
from lora_dpo.data.answers import crossed, read_answers, tokenize_answers
from lora_dpo.data.read import read_pairs
from lora_dpo.errors import ConfigError, DataError

PAIR = {"prompt": "Hi?", "chosen": "Hello.", "rejected": "Go away."}
UP = {"prompt": "Why?", "completion": "Because.", "label": True}
DOWN = {"prompt": "Why?", "completion": "Dunno.", "label": False}
SHOWN = [
    {"prompt": "One?", "completion": "Two."},
    {"instruction": "Add", "input": "1 and 1", "output": "2"},
    {"messages": [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It."}]},
    {"system": "Be brief.", "conversations": [{"from": "human", "value": "Eh?"}, {"from": "gpt", "value": "Oh."}]},
]


@pytest.fixture
def write(tmp_path):
    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


def said(votes):
    return [(vote.prompt[-1]["content"], vote.answer[-1]["content"], vote.up) for vote in votes]


def test_a_pair_is_one_good_and_one_bad_answer(write):
    votes, report = read_answers(write(PAIR, UP, DOWN), good_only=False)
    assert said(votes) == [
        ("Hi?", "Hello.", True),
        ("Hi?", "Go away.", False),
        ("Why?", "Because.", True),
        ("Why?", "Dunno.", False),
    ]
    assert (report.rows, report.kept, report.dropped) == (3, 4, [])
    assert report.formats == {"TRL preference pairs": 1, "unpaired votes": 2}


def test_for_imitation_only_what_is_good_is_kept_and_the_rest_counted(write):
    votes, report = read_answers(write(PAIR, UP, DOWN), good_only=True)
    assert said(votes) == [("Hi?", "Hello.", True), ("Why?", "Because.", True)]
    assert report.kept == 2
    assert report.reasons() == [("a thumb down, and this method learns from good answers alone", 1)]


def test_rows_that_are_left_out_have_a_form_too_as_among_pairs(write):
    source = write(PAIR, DOWN, SHOWN[0], {**PAIR, "chosen": ""}, {"colour": "red"})
    _, report = read_answers(source, good_only=True)
    assert report.formats == {"TRL preference pairs": 2, "unpaired votes": 1, "demonstrations": 1, "no known format": 1}
    assert report.formats.total() == report.rows == 5
    assert [dropped.origin.row for dropped in report.dropped] == [2, 4, 5]
    assert read_pairs(source)[1].formats.total() == 5


@pytest.mark.parametrize("format", [None, "demonstrations"])
def test_demonstrations_in_their_usual_shapes(write, format):
    votes, report = read_answers(write(*SHOWN), good_only=True, format=format)
    assert said(votes) == [
        ("One?", "Two.", True),
        ("Add\n1 and 1", "2", True),
        ("Say it.", "It.", True),
        ("Eh?", "Oh.", True),
    ]
    assert votes[3].prompt[0] == {"role": "system", "content": "Be brief."}
    assert report.read_as == "demonstrations"


def test_a_conversation_that_waits_for_its_answer_finds_it_in_a_column(write):
    asked = [{"role": "user", "content": "Why?"}]
    whole = [*asked, {"role": "assistant", "content": "So: 42."}]
    rows = [{"messages": asked, "response": "Because."}, {"messages": whole, "answer": "42"}]
    votes, _ = read_answers(write(*rows), good_only=True)
    assert said(votes) == [("Why?", "Because.", True), ("Why?", "So: 42.", True)]


def test_kto_does_not_take_a_demonstration_for_a_vote(write):
    votes, report = read_answers(write(UP, DOWN, SHOWN[0]), good_only=False)
    assert len(votes) == 2
    assert "nobody judged" in report.dropped[0].reason
    with pytest.raises(DataError, match="row 3: an answer that nobody judged"):
        read_answers(write(UP, DOWN, SHOWN[0]), good_only=False, on_bad_row="error")
    with pytest.raises(DataError, match="holds no usable answer: an answer that nobody judged"):
        read_answers(write(SHOWN[0]), good_only=False)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "", "completion": "x"}, "empty prompt"),
        ({"prompt": "x", "completion": " "}, "empty shown answer"),
        ({"messages": [{"role": "user", "content": "x"}]}, "empty prompt"),
        ({"colour": "red"}, "without 'chosen'"),
    ],
)
def test_a_bad_row_says_why(write, row, reason):
    _, report = read_answers(write(row, SHOWN[0]), good_only=True)
    assert reason in report.dropped[0].reason


def test_unknown_forms_and_empty_lists_are_refused(write):
    with pytest.raises(ConfigError, match="not a format"):
        read_answers(write(PAIR), good_only=True, format="nonsense")
    with pytest.raises(DataError, match="empty"):
        read_answers([], good_only=True)


def test_answers_have_the_ids_of_their_side_of_a_pair(write, write_pairs, tokenizer):
    path = str(write_pairs())
    pairs, _ = tokenize_pairs(tokenizer, read_pairs(path)[0], max_length=None)
    votes, _ = tokenize_answers(tokenizer, read_answers(path, good_only=False)[0], max_length=None)
    # of a pair, what both answers begin with belongs to the answers: whole sequences are the same in any case
    assert [one.prompt + one.answer for one in votes[0::2]] == [pair.prompt + pair.chosen for pair in pairs]
    assert [one.prompt + one.answer for one in votes[1::2]] == [pair.prompt + pair.rejected for pair in pairs]
    assert all(one.answer[-1] == tokenizer.eos_token_id for one in votes)
    assert all(one.prompt[-len(b"assistant\n") :] == list(b"assistant\n") for one in votes)


def test_a_long_answer_is_cut_and_a_long_prompt_dropped(write, tokenizer):
    votes, _ = read_answers(write(UP, {**UP, "prompt": "Why? " * 30}), good_only=True)
    whole = tokenize_answers(tokenizer, votes[:1], max_length=None)[0][0]
    room = len(whole.prompt) + 3
    kept, dropped = tokenize_answers(tokenizer, votes, max_length=room)
    assert [(one.answer, one.truncated) for one in kept] == [(list(b"Bec"), True)]
    assert [one.reason for one in dropped] == [f"prompt fills max_length ({room} tokens)"]


def test_crossed_answers_are_pairs_of_what_fits_and_what_does_not(write, tokenizer):
    votes, _ = read_answers(write(*SHOWN[:2], DOWN, UP), good_only=False, format=None)
    answers, _ = tokenize_answers(tokenizer, votes, max_length=None)
    assert [one.up for one in answers] == [False, True]
    shown, _ = tokenize_answers(tokenizer, read_answers(write(*SHOWN[:2]), good_only=True)[0], max_length=None)
    pairs = crossed(shown)
    assert [(bytes(pair.chosen[:-1]), bytes(pair.rejected[:-1])) for pair in pairs] == [
        (b"Two.", b"2"),
        (b"2", b"Two."),
    ]
    assert isinstance(pairs[0], TokenPair)
    assert isinstance(pairs[0].origin, Origin)
