"""Intervals against textbook values, and the length-controlled win rate on data whose answer is known."""

import math
import random

import pytest

from lora_dpo.evaluation.intervals import PRIOR, Interval, call, length_controlled, mean, rate, t_quantile


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_a_share_has_wilsons_interval(successes, n, low, high):
    found = rate(successes, n)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)
    assert found.value == successes / n


def test_the_interval_is_where_the_score_test_rejects():
    # Wilson's ends are the p with |p̂ - p| = z·√(p(1 - p)/n)
    found = rate(13, 40)
    for end in (found.low, found.high):
        assert abs(13 / 40 - end) / math.sqrt(end * (1 - end) / 40) == pytest.approx(1.959964, abs=1e-5)


def test_a_tie_is_half_a_success():
    assert rate(5 + 0.5 * 10, 20) == rate(10, 20)


@pytest.mark.parametrize(
    ("df", "t"), [(1, 12.7062), (2, 4.3027), (5, 2.5706), (10, 2.2281), (30, 2.0423), (120, 1.9799), (2000, 1.9612)]
)
def test_students_t(df, t):
    assert t_quantile(df) == pytest.approx(t, abs=2e-4)


@pytest.mark.parametrize("df", [199, 200, 201, 202, 1_000, 30_000, 50_000, 100_000, 300_000, 1_000_000, 10**12])
def test_students_t_of_many_values_is_where_its_tail_is_one_fortieth(df):
    # The tail by another way: the density of T, log-gamma for its constant, summed over 40,000 points from t to 60
    constant = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
    if df > 10**7:  # log-gamma's digits run out; T is normal to eight digits there
        assert t_quantile(df) == pytest.approx(1.959963985, abs=1e-8)
        return
    low, step = t_quantile(df), (60 - t_quantile(df)) / 40_000
    density = [math.exp(constant - (df + 1) / 2 * math.log1p((low + i * step) ** 2 / df)) for i in range(40_001)]
    assert step * (math.fsum(density) - (density[0] + density[-1]) / 2) == pytest.approx(0.025, abs=2e-6)


def test_students_t_falls_towards_the_normal_quantile():
    found = [t_quantile(df) for df in (1, 2, 3, 10, 100, 200, 201, 500, 10_000, 10**6)]
    assert found == sorted(found, reverse=True)
    assert found[-1] > 1.959963


def test_a_mean_has_students_interval():
    found = mean([1.0, 2.0, 3.0])
    assert found.value == 2
    assert found.high - 2 == pytest.approx(4.3027 / math.sqrt(3), abs=1e-3)
    assert found.low == pytest.approx(2 - (found.high - 2))


def test_a_single_value_has_no_interval():
    found = mean([4.0])
    assert not found.known
    assert found.to_json() == {"value": 4.0, "low": None, "high": None, "n": 1}


def test_ends_stay_inside_what_is_possible():
    assert mean([0.0, 0.1, 0.0]).low < 0
    assert mean([0.0, 0.1, 0.0]).within(0.0, 1.0).low == 0
    assert mean([0.0, 0.1, 0.0]).within(0.0, 1.0).value == mean([0.0, 0.1, 0.0]).value
    assert not mean([0.5]).within(0.0, 1.0).known


@pytest.mark.parametrize("estimate", [lambda: rate(0, 0), lambda: mean([]), lambda: length_controlled([], [])])
def test_nothing_has_no_estimate(estimate):
    with pytest.raises(ValueError, match="of nothing"):
        estimate()


def test_about_95_of_100_intervals_hold_the_truth():
    draws = random.Random(0)
    held = sum(rate(sum(draws.random() < 0.7 for _ in range(53)), 53).low <= 0.7 for _ in range(400))
    assert held >= 380  # the lower end alone misses 2.5%
    means = [mean([draws.gauss(1.0, 2.0) for _ in range(8)]) for _ in range(400)]
    assert 368 <= sum(found.low <= 1.0 <= found.high for found in means) <= 396


# --- length taken out -----------------------------------------------------------------------------


def outcomes(n, *, quality, by_length, lean=0.0, seed=0):
    """Wins drawn from logit p = quality + by_length·tanh(Δ/sd), with Δ normal around `lean`."""
    draws = random.Random(seed)
    longer = [draws.gauss(lean, 1.0) for _ in range(n)]
    middle = sum(longer) / n
    spread = math.sqrt(sum((value - middle) ** 2 for value in longer) / n)
    wins = []
    for value in longer:
        p = 1 / (1 + math.exp(-(quality + by_length * math.tanh(value / spread))))
        wins.append(float(draws.random() < p))
    return wins, longer


def test_without_any_effect_of_length_it_is_the_raw_rate():
    wins, longer = outcomes(4000, quality=1.0, by_length=0.0)
    found = length_controlled(wins, longer)
    assert found.value == pytest.approx(1 / (1 + math.exp(-1.0)), abs=0.02)
    assert found.value == pytest.approx(rate(sum(wins), len(wins)).value, abs=0.01)


def test_a_win_that_length_bought_is_none():
    wins, longer = outcomes(4000, quality=0.0, by_length=4.0, lean=1.0)
    assert rate(sum(wins), len(wins)).low > 0.75
    found = length_controlled(wins, longer)
    assert found.value == pytest.approx(0.5, abs=0.05)
    assert call(found) == "no better than chance"


def test_quality_that_length_hides_is_found():
    wins, longer = outcomes(4000, quality=1.0, by_length=4.0, lean=-1.0)
    assert rate(sum(wins), len(wins)).value < 0.5
    assert call(length_controlled(wins, longer)) == "better"
    assert length_controlled(wins, longer).value == pytest.approx(1 / (1 + math.exp(-1)), abs=0.06)


def test_swapping_the_models_mirrors_it():
    wins, longer = outcomes(80, quality=0.7, by_length=1.5, lean=0.4)
    one = length_controlled(wins, longer)
    other = length_controlled([1 - win for win in wins], [-value for value in longer])
    assert (other.value, other.low, other.high) == pytest.approx((1 - one.value, 1 - one.high, 1 - one.low))


def test_equal_lengths_leave_the_raw_rate_but_for_the_prior():
    found = length_controlled([1.0] * 30 + [0.0] * 10, [0.0] * 40)
    # the mode of 40 outcomes with 30 wins and a prior N(0, 2.5²) on the logit a: 30 - 40·p = a / 6.25
    logit = math.log(found.value / (1 - found.value))
    assert 30 - 40 * found.value == pytest.approx(logit / PRIOR**2)
    assert found.value == pytest.approx(0.75, abs=0.01)


def test_an_undefeated_model_has_a_finite_estimate_below_one():
    found = length_controlled([1.0] * 20, [float(value) for value in range(20)])
    assert 0.5 < found.value < 1
    assert found.known


def test_all_ties_are_one_half():
    assert length_controlled([0.5] * 12, [1.0, -1.0] * 6).value == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("low", "high", "says"), [(0.51, 0.9, "better"), (0.1, 0.49, "worse"), (0.5, 0.9, "no better than chance")]
)
def test_what_an_interval_is_called(low, high, says):
    assert call(Interval(0.5, low, high, 9)) == says
