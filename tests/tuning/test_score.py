"""What 'best' means: worked examples, and the choice among candidates."""

import pytest

from lora_dpo.evaluation.intervals import length_controlled, rate
from lora_dpo.tuning.score import EQUAL, Measured, Score, best_of, frontier, score


def measured(**changes):
    values = {
        "right": (1.0, 1.0, 1.0, 0.0),
        "margin": 2.0,
        "finished": (True, True, True, True),
        "tokens": (10, 10, 10, 10),
        "repeated": (0.0, 0.0, 0.0, 0.0),
        "chosen_tokens": 10.0,
        "known": 6,
        "questions": 8,
        "kl": 0.1,
    }
    return Measured(**{**values, **changes})


BASE = measured(right=(0.5,) * 4, kl=0.0, tokens=(30,) * 4)


def test_without_a_cost_it_is_the_accuracy():
    found = score(measured(), BASE)
    assert found.cost == 0
    assert found.quality == rate(3, 4)
    assert (found.value, found.low) == (0.75, rate(3, 4).low)


@pytest.mark.parametrize(
    ("changes", "cost"),
    [
        ({"finished": (True, True, True, False)}, 1 / 12),  # of four prompts and eight questions
        ({"cut": 2}, 2 / 12),
        ({"finished": (False, True, True, True), "cut": 2}, 3 / 12),
        ({"repeated": (0.4, 0.0, 0.0, 0.0)}, 0.1),
        ({"known": 5}, 1 / 8),
        ({"known": 8}, 0.0),  # more than the base is no gain: chance gives as often as it takes
        ({"tokens": (11, 11, 11, 11)}, 0.0),
        ({"tokens": (13, 13, 13, 13)}, 0.15),
        ({"tokens": (7, 7, 7, 7)}, 0.15),
        ({"tokens": (50, 50, 50, 50)}, 1.0),
        ({"finished": (False,) * 4, "known": 4, "tokens": (20,) * 4}, 4 / 12 + 0.25 + 0.85),
        ({"finished": (False,) * 4, "known": 4, "cut": 8}, 1 + 0.25),
    ],
)
def test_each_cost_is_a_share(changes, cost):
    found = score(measured(**changes), BASE)
    assert found.cost == pytest.approx(cost)
    assert found.low == pytest.approx(rate(3, 4).low - cost)


def test_the_base_pays_for_what_it_does_itself_but_for_its_habits():
    repeating = measured(repeated=(0.3,) * 4)
    assert score(measured(repeated=(0.3,) * 4), repeating).costs["repeated"] == 0
    assert score(measured(repeated=(0.5,) * 4), repeating).costs["repeated"] == pytest.approx(0.2)


def test_with_a_judge_the_win_rate_counts_and_length_is_the_judges_matter():
    judged = measured(outcomes=(1.0, 1.0, 0.5, 0.0), longer_by=(4.0, 2.0, 0.0, -3.0), tokens=(50,) * 4)
    found = score(judged, BASE, control_length=False)
    assert found.quality == rate(2.5, 4)
    assert "length" not in found.costs
    controlled = score(judged, BASE).quality
    assert controlled == length_controlled((1.0, 1.0, 0.5, 0.0), (4.0, 2.0, 0.0, -3.0))
    assert controlled.value < found.quality.value, "the longer answers won"


def test_without_questions_the_answers_to_prompts_are_all_that_end():
    found = score(measured(known=0, questions=0, finished=(True, True, True, False)), measured(known=0, questions=0))
    assert found.costs["unfinished"] == 0.25


def test_what_was_answered_on_another_part_counts_on_this_one():
    before = measured(known=5, questions=8, cut=2, kl=0.9)
    found = measured(known=0, questions=0).asked_before(before)
    assert found == measured(known=5, questions=8, cut=2)
    assert measured().asked_before(before) == measured()
    assert measured(known=0, questions=0).asked_before(None) == measured(known=0, questions=0)


def test_without_questions_nothing_is_forgotten():
    assert score(measured(known=0, questions=0), measured(known=0, questions=0)).costs["forgotten"] == 0


def a_score(low, wide=0.1):
    return Score(rate(1, 1).__class__(low + wide, low, low + 2 * wide, 10), {})


def test_the_lower_end_decides():
    lucky, steady = a_score(0.5, wide=0.3), a_score(0.6, wide=0.05)
    assert lucky.value > steady.value
    assert best_of({0: (lucky, 0.1), 1: (steady, 0.1)}, budget=1.0) == 1


def test_among_equals_the_one_nearer_to_the_base():
    near = {0: (a_score(0.60), 0.30), 1: (a_score(0.60 - EQUAL / 2), 0.05), 2: (a_score(0.60 - 2 * EQUAL), 0.01)}
    assert best_of(near, budget=1.0) == 1


def test_a_budget_of_kl_rules_out():
    assert best_of({0: (a_score(0.9), 1.5), 1: (a_score(0.4), 0.2)}, budget=1.0) == 1
    assert best_of({0: (a_score(0.9), 1.5)}, budget=1.0) is None
    assert best_of({}, budget=1.0) is None


def test_what_was_measured_is_read_back_as_it_was():
    import json

    one = measured(outcomes=(1.0, 0.5), longer_by=(2.0, 0.0))
    assert Measured.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_the_frontier_has_what_no_other_beats_in_both():
    points = {0: (0.1, 0.5), 1: (0.2, 0.4), 2: (0.3, 0.9), 3: (0.05, 0.3), 4: (0.3, 0.7)}
    assert frontier(points) == [3, 0, 2]
