"""Which candidates are expected to end in time: worked examples."""

import pytest

from lora_dpo.tuning.score import Measured
from lora_dpo.tuning.time_limit import TimeLimit
from lora_dpo.tuning.trials import Trial

MEASURED = Measured((1.0,), 1.0, (True,), (9,), (0.0,), 9.0)


def trial(steps, seconds, measuring, measured=MEASURED, scoring=0.0):
    return Trial(
        0, {}, 0, measured=measured, steps=steps, planned=steps, seconds=seconds, measuring=measuring, scoring=scoring
    )


DONE = [trial(10, 80.0, 30.0), trial(20, 130.0, 30.0), trial(30, 1000.0, 40.0)]
"""By the median a step takes 5 seconds and being measured 30."""


@pytest.mark.parametrize(("steps", "used", "fits"), [(12, 210, True), (12, 211, False), (6, 240, True)])
def test_one_more_costs_its_steps_and_being_measured(steps, used, fits):
    assert TimeLimit(5).allows({"trainer.max_steps": steps}, used=used, done=DONE) is fits


def test_what_comes_after_is_kept_free():
    values = {"trainer.max_steps": 12}
    assert TimeLimit(5, measurings=1.5).allows(values, used=165, done=DONE)
    assert not TimeLimit(5, measurings=1.5).allows(values, used=166, done=DONE)
    assert TimeLimit(5, more=1).allows(values, used=120, done=DONE)
    assert not TimeLimit(5, more=1).allows(values, used=121, done=DONE)


def test_where_steps_are_no_axis_all_have_those_of_the_first():
    assert TimeLimit(5).allows({}, used=220, done=DONE)
    assert not TimeLimit(5).allows({}, used=221, done=DONE)


def test_the_first_is_always_tried_and_without_a_time_all_are():
    assert TimeLimit(1).allows({}, used=1e6, done=[])
    assert TimeLimit(None).allows({}, used=1e6, done=DONE)


def test_of_those_that_were_ended_early_nothing_is_expected():
    ended = [trial(3, 50.0, 0.0, measured=None)]
    assert TimeLimit(1).allows({}, used=60, done=ended)
    assert not TimeLimit(1).allows({}, used=61, done=ended)


def test_the_reference_is_scored_for_the_first_one_alone():
    first = trial(10, 180.0, 30.0, scoring=100.0)
    values = {"trainer.max_steps": 12}
    assert TimeLimit(5).allows(values, used=210, done=[first])
    assert not TimeLimit(5).allows(values, used=211, done=[first])
    found = [first, trial(10, 80.0, 30.0)]
    assert TimeLimit(5).allows(values, used=210, done=found)
    assert not TimeLimit(5).allows(values, used=211, done=found)


def test_without_a_cache_it_is_scored_for_each():
    each = [trial(10, 180.0, 30.0, scoring=100.0), trial(10, 175.0, 30.0, scoring=95.0)]
    assert TimeLimit(5).allows({"trainer.max_steps": 12}, used=115, done=each)
    assert not TimeLimit(5).allows({"trainer.max_steps": 12}, used=116, done=each)
