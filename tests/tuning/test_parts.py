"""Three parts of the data, by prompt."""

import pytest

from lora_dpo.data import PreferencePair
from lora_dpo.data.pairs import Origin
from lora_dpo.training.drafting.presets import prompts_of
from lora_dpo.tuning.parts import FOR_THREE, FOR_TWO, LEAST, MOST, divide


def pairs(prompts, each=2):
    return [
        PreferencePair(
            ({"role": "user", "content": f"Prompt {number}"},),
            ({"role": "assistant", "content": f"good {other}"},),
            ({"role": "assistant", "content": f"bad {other}"},),
            Origin("x.jsonl", number * each + other + 1),
        )
        for number in range(prompts)
        for other in range(each)
    ]


def texts(part):
    return {pair.prompt[-1]["content"] for pair in part}


def test_no_prompt_is_in_two_parts_and_no_pair_is_lost():
    found = divide(pairs(100))
    parts = [found.train, found.choose, found.report]
    assert sum(map(len, parts)) == 200
    assert len(texts(found.train) | texts(found.choose) | texts(found.report)) == 100
    assert [prompts_of(part) for part in parts] == [70, 15, 15]
    assert not found.flatters


@pytest.mark.parametrize(
    ("prompts", "sizes"),
    [
        (FOR_TWO - 1, (FOR_TWO - 1, 0, 0)),
        (FOR_TWO, (12, LEAST, 0)),
        (FOR_THREE - 1, (FOR_THREE - 1 - LEAST, LEAST, 0)),
        (FOR_THREE, (24, LEAST, LEAST)),
        (1000, (1000 - 2 * MOST, MOST, MOST)),
    ],
)
def test_how_many_parts_there_are(prompts, sizes):
    found = divide(pairs(prompts))
    assert tuple(prompts_of(part) for part in (found.train, found.choose, found.report)) == sizes
    assert found.flatters == (sizes[1] > 0 == sizes[2])


def test_held_out_data_is_what_is_reported_from():
    held_out = pairs(10)
    found = divide(pairs(60), held_out)
    assert list(found.report) == held_out
    assert not texts(held_out) & (texts(found.train) | texts(found.choose)), "a prompt of theirs is not trained on"
    assert (prompts_of(found.train), prompts_of(found.choose)) == (35, 15)  # both shares are there to choose by


def test_the_same_seed_gives_the_same_parts():
    assert divide(pairs(100), seed=3) == divide(pairs(100), seed=3)
    assert divide(pairs(100), seed=3) != divide(pairs(100), seed=4)
