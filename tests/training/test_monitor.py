"""Each alarm on a trajectory that must raise it, and on its nearest healthy neighbour."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from lora_dpo.config.recipe import HealthSection
from lora_dpo.training.guard.monitor import (
    STUCK_AFTER,
    WINDOW,
    Baseline,
    HealthSample,
    Lengths,
    Monitor,
    Reading,
    of_accuracies,
    of_answers,
    of_numbers,
    reading,
)

ROOT = Path(__file__).resolve().parents[2]
LIMITS = HealthSection()
HEALTHY = Reading(step=30, margin=1.2, accuracy=1.0, chosen=0.05, rejected=-0.08)


def names(alarms):
    return [alarm.name for alarm in alarms]


def steady(one, steps=WINDOW):
    return [replace(one, step=one.step - steps + 1 + number) for number in range(steps)]


def of(one, total=36, limits=LIMITS):
    return names(of_numbers(steady(one), total=total, limits=limits))


# --- numbers --------------------------------------------------------------------------------------


def test_a_reading_is_in_nats_a_token():
    logs = {"loss": 0.4, "rewards/chosen": -0.6, "rewards/rejected": -2.0, "rewards/margins": 1.4, "grad_norm": 3.0}
    found = reading(7, logs, beta=0.1, lengths=Lengths(chosen=30, rejected=100))
    assert found.chosen == pytest.approx(-0.6 / 0.1 / 30)
    assert found.rejected == pytest.approx(-2.0 / 0.1 / 100)
    assert (found.margin, found.accuracy, found.broken) == (1.4, None, None)


def test_what_is_no_step_is_no_reading():
    assert reading(7, {"eval_loss": 0.4}, beta=0.1, lengths=Lengths()) is None
    assert reading(36, {"train_runtime": 4.0, "train_loss": 0.5}, beta=0.1, lengths=Lengths()) is None


def test_a_healthy_reading_raises_none():
    assert of(HEALTHY) == []


def test_displacement_is_chosen_falling_while_the_margin_rises():
    fallen = replace(HEALTHY, chosen=-LIMITS.displacement - 0.01)
    assert of(fallen) == ["likelihood displacement"]
    assert of(replace(fallen, chosen=-LIMITS.displacement + 0.01)) == []
    assert of(replace(fallen, margin=-0.2)) == []  # that is another trouble
    assert of(fallen, limits=HealthSection(displacement=0.9)) == []


def test_one_bad_batch_is_no_displacement():
    readings = [*steady(HEALTHY, WINDOW - 1), replace(HEALTHY, step=31, chosen=-0.5)]
    assert names(of_numbers(readings, total=36, limits=LIMITS)) == []


def test_rejected_collapse():
    assert of(replace(HEALTHY, rejected=-1.6)) == ["rejected collapse"]
    assert of(replace(HEALTHY, rejected=-1.4)) == []


@pytest.mark.parametrize("key", ["loss", "grad_norm", "rewards/margins"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_a_number_at_once(key, value):
    logs = {"loss": 0.5, "grad_norm": 1.0, "rewards/margins": 0.1, "rewards/accuracies": 1.0, key: value}
    monitor = Monitor(LIMITS, total=36, beta=0.1, lengths=Lengths(30, 100))
    [alarm] = monitor.numbers(1, logs)
    assert (alarm.name, alarm.severe) == ("not a number", True)
    assert key in alarm.seen


def test_stuck_at_ln_2():
    stuck = Reading(step=STUCK_AFTER, margin=0.004, accuracy=0.5, chosen=0.0, rejected=0.0)
    assert of(stuck) == ["stuck at ln 2"]
    assert of(replace(stuck, step=STUCK_AFTER - 1)) == []  # warm-up
    assert of(stuck, total=1000) == []  # a quarter of the run is not over
    assert of(replace(stuck, margin=0.03)) == []
    assert of(replace(stuck, accuracy=1.0)) == ["stuck at ln 2"]  # at a tie TRL's accuracy is a matter of rounding


def test_saturated():
    full = replace(HEALTHY, margin=5.2)
    assert of(full) == ["saturated"]
    assert of(replace(full, accuracy=0.9)) == []


def test_overfit_needs_held_out_pairs():
    train = steady(HEALTHY)
    assert names(of_accuracies(train, 0.6, 30)) == ["overfit"]
    assert names(of_accuracies(train, 0.9, 30)) == []
    monitor = Monitor(LIMITS, total=36, beta=0.1, lengths=Lengths(30, 100))
    for one in train:
        monitor.numbers(one.step, {"loss": 0.2, "rewards/margins": one.margin, "rewards/accuracies": one.accuracy})
    assert names(monitor.numbers(30, {"eval_rewards/accuracies": 0.55})) == ["overfit"]


# --- answers --------------------------------------------------------------------------------------

TEXT = "The opposite of wet is dry, as every child knows."
BEFORE = HealthSample(0, tokens=(48, 40, 44), finished=(False, True, True), texts=(TEXT,) * 3)
YARD = Baseline(limit=48, before=BEFORE, chosen=(30, 30, 30))
GOOD = HealthSample(
    12, tokens=(30, 32, 28), finished=(True, True, True), texts=(TEXT,) * 3, kl=0.2, reference_shift=1e-6
)


def seen(**changes):
    return names(of_answers(replace(GOOD, **changes), YARD, LIMITS))


def test_good_answers_raise_none():
    assert seen() == []


def test_length_collapse_is_against_the_chosen_answers_of_the_same_prompts():
    assert seen(tokens=(8, 8, 8)) == ["length collapse"]
    assert seen(tokens=(14, 14, 13)) == []  # 0.45 of 30 is 13.5
    assert seen(tokens=(13, 13, 14)) == ["length collapse"]


def test_answers_that_were_always_short_are_no_collapse():
    short = replace(BEFORE, tokens=(6, 6, 6))
    assert names(of_answers(replace(GOOD, tokens=(5, 6, 5)), Baseline(48, short, (30, 30, 30)), LIMITS)) == []
    assert names(of_answers(replace(GOOD, tokens=(2, 3, 3)), Baseline(48, short, (30, 30, 30)), LIMITS)) == [
        "length collapse"
    ]


def test_length_growth():
    short = Baseline(48, replace(BEFORE, tokens=(10, 10, 10)), (12, 12, 12))
    assert names(of_answers(replace(GOOD, tokens=(25, 25, 25)), short, LIMITS)) == ["length growth"]
    assert names(of_answers(replace(GOOD, tokens=(24, 24, 24)), short, LIMITS)) == []


def test_repetition_against_what_it_was_before():
    loop = "a la la la la la la la la la"
    assert seen(texts=(loop,) * 3) == ["repetition"]
    assert seen(texts=(loop, TEXT, TEXT)) == []
    looping = Baseline(48, replace(BEFORE, texts=(loop,) * 3), (30, 30, 30))
    assert names(of_answers(replace(GOOD, texts=(loop,) * 3), looping, LIMITS)) == []


def test_lost_end_of_turn():
    assert seen(finished=(False, False, False)) == ["lost end of turn"]
    assert seen(finished=(True, False, True)) == []
    rambling = Baseline(48, replace(BEFORE, finished=(False, False, True)), (30, 30, 30))
    assert names(of_answers(replace(GOOD, finished=(False,) * 3), rambling, LIMITS)) == []  # it never ended much


def test_kl_budget():
    assert seen(kl=LIMITS.kl + 0.01) == ["KL budget"]
    assert seen(kl=LIMITS.kl - 0.01) == []
    assert seen(kl=None) == []


def test_reference_drift():
    assert seen(reference_shift=0.03) == ["reference drift"]
    assert seen(reference_shift=0.01) == []


# --- the monitor ----------------------------------------------------------------------------------


def logs(one):
    return {
        "loss": 0.3,
        "rewards/margins": one.margin,
        "rewards/accuracies": one.accuracy,
        "rewards/chosen": one.chosen * 0.1 * 30,
        "rewards/rejected": one.rejected * 0.1 * 100,
    }


def test_each_kind_is_raised_once_and_says_what_to_change():
    monitor = Monitor(LIMITS, total=100, beta=0.1, lengths=Lengths(30, 100), baseline=YARD)
    found = []
    for step in range(1, 12):
        found += monitor.numbers(step, logs(replace(HEALTHY, chosen=-0.4, step=step)))
    assert names(found) == ["likelihood displacement"]
    assert found[0].step == WINDOW
    assert not monitor.healthy
    assert "trainer." in found[0].advice
    assert found[0].text.startswith(
        f"step {WINDOW}, likelihood displacement: the chosen answers lost 0.40 nats a token"
    )
    assert names(monitor.answers(replace(GOOD, kl=9.0))) == ["KL budget"]


def test_alarms_that_are_not_severe_leave_it_healthy():
    monitor = Monitor(LIMITS, total=100, beta=0.1, lengths=Lengths(30, 100))
    for step in range(1, 8):
        monitor.numbers(step, logs(replace(HEALTHY, margin=6.0)))
    assert names(monitor.alarms) == ["saturated"]
    assert monitor.healthy


def test_a_restored_monitor_goes_on_as_the_first_would():
    one = Monitor(LIMITS, total=100, beta=0.1, lengths=Lengths(30, 100), baseline=YARD)
    falling = [replace(HEALTHY, chosen=-0.02 * step) for step in range(1, 40)]
    for step, now in enumerate(falling[:10], start=1):
        one.numbers(step, logs(now))
    other = Monitor(LIMITS, total=100, beta=0.1, lengths=Lengths(30, 100), baseline=YARD)
    other.restore(json.loads(json.dumps(one.state())))
    heard = []
    for monitor in (one, other):
        found = []
        for step, now in enumerate(falling[10:], start=11):
            found += monitor.numbers(step, logs(now))
        heard.append(found)
    assert heard[0] == heard[1]
    assert names(heard[0]) == ["likelihood displacement"]


def test_the_quickstarts_own_run_raises_none():
    lines = (ROOT / "adapters" / "quickstart" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    monitor = Monitor(LIMITS, total=36, beta=0.1, lengths=Lengths(31, 91))
    steps = 0
    for row in rows:
        if "loss" in row:
            monitor.numbers(row["step"], row)
            steps += 1
    assert steps == 36
    assert monitor.alarms == []
