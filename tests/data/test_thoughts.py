"""What is thought before an answer: told apart as it comes, counted, and kept from what looks at answers."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import CHANNELS, THINKING, with_template

from lora_dpo.data import Message, read_pairs
from lora_dpo.data.chat_template import render
from lora_dpo.data.doctor.checks import Texts
from lora_dpo.data.prompts import Prompt
from lora_dpo.data.thoughts import ThoughtSplitter, opened_thought, said_length, split_thought, thought_tokens
from lora_dpo.data.tokenize import tokenize_pair
from lora_dpo.data.write import canonical_row
from lora_dpo.evaluation.evaluate import describe
from lora_dpo.evaluation.metrics import answer_metrics
from lora_dpo.judging import open_judge
from lora_dpo.judging.judge import Judge, add_up
from lora_dpo.model.decoding import Answer, answer_of, note_of_thoughts

THOUGHT = "<think>\nHm, hm.\n</think>\n\nTwo."


@pytest.mark.parametrize(
    ("text", "thought", "said"),
    [
        ("Two.", "", "Two."),
        (THOUGHT, "Hm, hm.", "Two."),
        ("\n <think>Hm</think>Two.", "Hm", "Two."),
        ("<think></think>Two.", "", "Two."),
        ("<think>\nHm", "Hm", ""),
        ("<thinking>a < b</thinking> Two", "a < b", "Two"),
        ("<seed:think>a</think>b</seed:think>Two", "a</think>b", "Two"),
        ("Write <think> first.", "", "Write <think> first."),
        ("a</think>b", "", "a</think>b"),
        ("<th", "", "<th"),
        ("<think>a</think>b<think>c</think>", "a", "b<think>c</think>"),
        ("", "", ""),
    ],
)
def test_a_thought_at_the_start_is_told_apart(text, thought, said):
    assert split_thought(text) == (thought, said)


@given(st.text("<think/> ab\n", max_size=30), st.lists(st.integers(1, 6), max_size=12), st.booleans())
@settings(max_examples=200, deadline=None)
def test_pieces_make_what_the_whole_makes(text, sizes, closed):
    whole = f"<think>{text}</think>{text}" if closed else text
    splitter, parts, rest = ThoughtSplitter(), [], whole
    for size in sizes:
        parts += splitter.feed(rest[:size])
        rest = rest[size:]
    parts += [*splitter.feed(rest), *splitter.end()]
    joined = tuple("".join(part for inside, part in parts if inside is wanted).strip() for wanted in (True, False))
    assert joined == split_thought(whole)


@pytest.mark.parametrize(
    ("text", "opened", "count"),
    [
        ("Two.", False, 0),
        (THOUGHT, False, len("<think>\nHm, hm.\n</think>")),
        ("<think>\nHm", False, 10),
        ("Hm.</think>Two.", True, 11),
        ("Hm.</think>Two.", False, 0),
        ("Hm.", True, 3),
        ("", True, 0),
    ],
)
def test_tokens_of_a_thought_are_counted(tokenizer, text, opened, count):
    assert thought_tokens(tokenizer, list(text.encode()), opened=opened) == count


def test_a_prompt_that_opens_a_thought_is_seen(tokenizer):
    assert opened_thought(tokenizer, list(b"a question <think>\n")) == "<think>\n"
    assert opened_thought(tokenizer, list(b"a question <seed:think>\n")) == "<seed:think>\n"
    assert opened_thought(tokenizer, list(b"<think>\n\n</think>\n\n")) == ""
    assert opened_thought(tokenizer, []) == ""


def test_an_answer_of_the_data_is_as_long_as_what_it_says(tokenizer):
    assert said_length(tokenizer, list(b"Hi"), [*THOUGHT.encode(), 257]) == len("\n\nTwo.")
    assert said_length(tokenizer, list(b"Hi"), [*b"Two.", 257]) == 4
    assert said_length(tokenizer, list(b"<think>\n"), [*b"a</think>b", 257]) == 1


def answer(text, finished=True):
    count = len(text.encode())
    thought = (
        len(text.partition("</think>")[0]) + 8 if "</think>" in text else count if text.startswith("<think>") else 0
    )
    return Answer(text, count, finished, thought)


def test_ids_become_an_answer_with_its_thought(tokenizer):
    found = answer_of(tokenizer, list(b"Hi"), [*THOUGHT.encode(), 257], frozenset({257}))
    assert found == answer(THOUGHT)
    assert (found.said, found.said_tokens) == ("Two.", len("\n\nTwo."))
    opened = answer_of(tokenizer, list(b"<think>\n"), [*b"Hm.</think>b"], frozenset({257}))
    assert (opened.text, opened.said, opened.tokens, opened.said_tokens) == ("<think>\nHm.</think>b", "b", 12, 1)
    assert not opened.finished


def test_judges_see_what_is_said_but_for_those_that_read_likelihoods():
    seen = []

    def note(prompt, answers):
        seen.extend(answers)
        return [0.0] * len(answers)

    prompt = Prompt((Message(role="user", content="?"),), "p", 1)
    asked = [answer(THOUGHT), answer(" Two. ")]
    add_up([(1.0, Judge("a", note)), (2.0, Judge("b", note, reads_thoughts=True))]).score(prompt, asked)
    assert seen == [Answer("Two.", 6, True), asked[1], *asked]
    judge = open_judge(["rules:length<=1", "rules:no-keywords=hm"])
    assert judge.score(prompt, asked) == [2.0, 2.0]
    assert open_judge(["rules:length<=1"]).score(prompt, [answer("<think>\nHm")]) == [0.0]


def test_lengths_and_repetition_leave_thoughts_out():
    loop = answer("<think>\n" + "so it is " * 30 + "</think>Two.")
    part = describe([loop, loop])
    assert (part.tokens.value, part.repetition.value) == (4.0, 0.0)
    metrics = answer_metrics([loop, answer("Two")], chosen_mean_tokens=1.0)
    assert (metrics.mean_tokens, metrics.thought_tokens) == (3.5, loop.thought_tokens / 2)
    said = note_of_thoughts([loop, answer("Two"), answer("<think>Hm", finished=False)])
    assert said.startswith(
        "2 of 3 answers begin with a thought: lengths, repetition and judges leave it out; 1 were cut"
    )
    assert note_of_thoughts([answer("Two")]) is None


# --- beside the content ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_beside_the_content_is_kept_and_trained_on(tokenizer, tmp_path, name):
    def bot(thought, content):
        return [{"role": "assistant", name: thought, "content": content}]

    rows = [
        {"prompt": "2+2*3?", "chosen": bot("Times first.", "8"), "rejected": bot("From the left.", "12")},
        {"prompt": "2+2*3?", "chosen": bot("Times first.", "8"), "rejected": bot("I guess.", "8")},
        {"prompt": "2+2*3?", "chosen": bot(" ", "8"), "rejected": bot(None, "9")},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pairs, report = read_pairs(str(path))
    assert (len(pairs), report.dropped) == (3, [])
    assert "reasoning_content" not in pairs[2].chosen[0]
    thinking = with_template(tokenizer, THINKING)
    tokens = tokenize_pair(thinking, pairs[1], max_length=None)
    assert thinking.decode(tokens.chosen) == "<think>\nTimes first.\n</think>\n\n8<|im_end|>"
    assert thinking.decode(tokens.rejected) == "<think>\nI guess.\n</think>\n\n8<|im_end|>"
    assert canonical_row(pairs[0])["chosen"] == [
        {"role": "assistant", "content": "8", "reasoning_content": "Times first."}
    ]
    assert Texts.of(pairs[1]).chosen != Texts.of(pairs[1]).rejected
    # a template that does not read it says so
    assert tokenize_pair(tokenizer, pairs[0], max_length=None).left_out
    text = render(with_template(tokenizer, CHANNELS), [*pairs[0].prompt, *pairs[0].chosen])
    assert "<|channel|>analysis<|message|>Times first.<|end|>" in text


def test_reasoning_of_another_turn_than_the_assistants_is_no_thought(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"prompt": [{"role": "user", "content": "a", "reasoning": "b"}], "chosen": "c", "rejected": "d"}\n'
    )
    [pair], _ = read_pairs(str(path))
    assert pair.prompt == ({"role": "user", "content": "a"},)
