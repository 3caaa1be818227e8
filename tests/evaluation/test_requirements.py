import math

import pytest

from lora_dpo.errors import ConfigError
from lora_dpo.evaluation.intervals import Interval
from lora_dpo.evaluation.requirements import check_measurable, parse_requirements
from lora_dpo.text import refuses, repetition

NUMBERS = {"accuracy": Interval(0.8, 0.65, 0.9, 40), "win-rate": Interval(0.6, 0.5, 0.7, 60)}


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ("accuracy>0.7", True),
        ("accuracy > 0.8", False),
        ("accuracy>=0.8", True),
        ("accuracy.low>0.7", False),
        ("win-rate.low>=0.5", True),
        ("win-rate.high<=7e-1", True),
        ("accuracy<0.8", False),
    ],
)
def test_a_requirement(text, met):
    [one] = parse_requirements([text])
    assert one.met(NUMBERS) is met
    assert one.seen(NUMBERS).startswith(text.strip())


def test_nan_meets_nothing():
    for text in ("kl<1", "kl>1"):
        assert not parse_requirements([text])[0].met({"kl": Interval(math.nan, 0, 0, 1)})


@pytest.mark.parametrize("text", ["accuracy", "accuracy=0.7", "accuracy>high", ">0.7", "accuracy>0.7 or so", "kl>--1"])
def test_what_is_no_requirement_is_refused(text):
    with pytest.raises(ConfigError, match="--require"):
        parse_requirements([text])


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("winrate>0.5", "win-rate"),
        ("win_rate>0.5", "win-rate"),
        ("Accuracy>0.5", "accuracy"),
        ("Win_Rate.low>0.5", "win-rate"),
        ("kl.hgh<1", "high"),
        ("kl.High<1", "high"),
        ("accuracy.lo>0.5", "low"),
    ],
)
def test_a_mistyped_number_or_part_is_named(text, meant):
    with pytest.raises(ConfigError, match=f"Did you mean {meant}\\?"):
        parse_requirements([text])


def test_what_is_not_measured_cannot_be_required():
    with pytest.raises(ConfigError, match="--judge or --votes"):
        check_measurable(parse_requirements(["win-rate>0.5"]), ["accuracy"])


# --- texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "share"),
    [("", 0.0), ("one two", 0.0), ("a b c d", 0.0), ("a b c a b c", 1 / 4), ("la la la la la la", 3 / 4)],
)
def test_repetition_is_the_share_of_threes_that_stood_there_before(text, share):
    assert repetition(text) == pytest.approx(share)


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I\u2019m sorry, I cannot do this",
        "Sorry, no.",
        "I cannot answer that question.",
        "Unfortunately I do not know.",
        "As an AI language model, I",
        "While I'm not equipped to provide that",
        '  "I apologize, but',
    ],
)
def test_a_refusal(text):
    assert refuses(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I am 5 years old.",
        "Yes, you can freeze milk.",
        "He said: I cannot.",
        "Sorrow is a feeling.",
        "I can do it.",
    ],
)
def test_no_refusal(text):
    assert not refuses(text)
