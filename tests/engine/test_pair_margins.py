"""The margins of a run's pairs: the first before it learnt from them, the last, the mean, whatever interrupts it."""

import math

import pytest

from lora_dpo.engine.pair_margins import PairMargins, SeenMargin

A, B = bytes(range(20)), bytes(20)


def test_first_last_and_mean_are_of_the_times_that_a_pair_was_seen():
    margins = PairMargins()
    margins.note([A, B], [1.0, -2.0])
    margins.note([A], [4.0])
    margins.note([A], [-2.0])
    assert margins.of(A) == SeenMargin(first=1.0, last=-2.0, mean=1.0, times=3)
    assert margins.of(B) == SeenMargin(-2.0, -2.0, -2.0, 1)
    assert margins.of(bytes(19) + b"x") is None


def test_what_the_untrained_policy_says_is_no_margin_and_what_comes_after_is_not_the_first():
    margins = PairMargins()
    margins.note([A, B], [2e-5, -3e-2], moved=False)
    assert margins.of(A) == SeenMargin(None, None, None, 0)
    margins.note([A], [5.0])
    margins.note([A], [7.0])
    assert margins.of(A) == SeenMargin(None, 7.0, 6.0, 2)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_left_out(odd):
    margins = PairMargins()
    margins.note([A, B], [1.0, odd])
    margins.note([A], [odd])
    assert margins.of(A) == SeenMargin(1.0, 1.0, 1.0, 1)
    assert margins.of(B) == SeenMargin(None, None, None, 0)


def test_a_checkpoint_keeps_all_of_it(tmp_path):
    margins = PairMargins()
    margins.note([B], [0.5], moved=False)
    margins.note([A], [0.1 + 0.2])
    margins.save(tmp_path)
    other = PairMargins()
    other.load(tmp_path)
    for one in (margins, other):
        one.note([A, B], [1.0, -1.0])
        assert one.of(A) == SeenMargin(0.1 + 0.2, 1.0, pytest.approx(0.65), 2)
        assert one.of(B) == SeenMargin(None, -1.0, -1.0, 1)


def test_a_checkpoint_without_a_state_ends_the_noting(tmp_path):
    margins = PairMargins()
    PairMargins().save(tmp_path)  # nothing was seen
    margins.load(tmp_path)
    margins.note([A], [1.0])
    assert not margins.known
    assert margins.of(A) is None
