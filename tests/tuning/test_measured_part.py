"""Which pairs and prompts of a part are measured."""

import json

import pytest
from taught import write_pairs

from lora_dpo.data import Origin, TokenPair, read_pairs
from lora_dpo.data.questions import Question
from lora_dpo.model.base import load_base
from lora_dpo.tuning.measure import Part, of_each_prompt

ORDER = [(1, 0), (1, 1), (1, 2), (2, 3), (3, 4), (3, 5)]
"""Prompt and number of six pairs: three of the first prompt, one of the second, two of the third."""


@pytest.mark.parametrize(
    ("most", "kept"),
    [(1, [0]), (2, [0, 3]), (3, [0, 3, 4]), (4, [0, 1, 3, 4]), (5, [0, 1, 3, 4, 5]), (6, [0, 1, 2, 3, 4, 5])],
)
def test_a_pair_of_each_prompt_comes_before_a_second_one(most, kept):
    pairs = [TokenPair([prompt], [number], [9], Origin("f", number), truncated=False) for prompt, number in ORDER]
    assert [pair.chosen[0] for pair in of_each_prompt(pairs, most)] == kept
    assert of_each_prompt(pairs, 99) == pairs


@pytest.fixture(scope="module")
def base(tiny_model_folder):
    return load_base(str(tiny_model_folder), quantize="none", dtype="float32")


def part(base, path, **options):
    pairs, _ = read_pairs([str(path)])
    said = []

    def tick(stage, total):
        said.append(stage)
        return lambda done: None

    made = Part("part", base, pairs, max_length=512, max_new_tokens=4, tick=tick, **options)
    return made, said


def test_what_is_known_of_the_base_is_not_measured_again(base, tmp_path):
    """But for another number of pairs or prompts, as an earlier version may have had."""
    path, cache = write_pairs(tmp_path / "pairs.jsonl", range(10, 16)), tmp_path / "base.json"
    first, said = part(base, path, answers=6)
    first.measure_base(cache)
    assert [stage for stage in said if "base" in stage]
    again, said = part(base, path, answers=6)
    again.measure_base(cache)
    assert said == []
    assert again.of_base == first.of_base
    for options in ({"answers": 3}, {"answers": 6, "most_pairs": 5}):
        other, said = part(base, path, **options)
        other.measure_base(cache)
        assert [stage for stage in said if "base" in stage]
        assert len(other.of_base.answers) == options["answers"] == len(other.prompts)
        assert len(other.of_base.chosen) == options.get("most_pairs", len(first.pairs)) == len(other.pairs)
    assert len(json.loads(cache.read_text())["chosen"]) == 5


def test_answers_to_the_questions_that_do_not_end_are_counted(base, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_dpo.tuning.measure.CHAT", 0.0)  # no base is too weak to be asked
    asked = [Question(f"What is {number}?", ("nothing",)) for number in range(5)]
    one, _ = part(base, write_pairs(tmp_path / "pairs.jsonl", range(10, 16)), answers=6, questions=asked)
    one.measure_base(tmp_path / "base.json")
    found, answers = one.base_measured, one.of_base.answers
    assert (len(answers), found.questions) == (11, 5)
    assert found.cut == sum(not answer.finished for answer in answers[6:])
    assert found.finished == tuple(answer.finished for answer in answers[:6])
