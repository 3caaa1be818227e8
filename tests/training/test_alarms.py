"""For each alarm of the health monitor, a run of a small model that provokes it, and its cause in data or settings."""

import json
import shutil

import pytest
from taught import SUBJECTS, long, prompt, short

from lora_dpo.config.reading import check_recipe
from lora_dpo.training.run import train

pytestmark = [pytest.mark.outcome, pytest.mark.slow]

SEEDS, WANTED = range(5), 2
"""A run's course hangs on the CPU's rounding, as on its seed. A cause that provokes an alarm in four of five runs does
so in fewer than two of five once in 149 times (5·0.2⁴·0.8 + 0.2⁵), one that does in nine of ten once in 2,174 times."""
SHARP = {"loss_type": "sigmoid", "lr_scheduler_type": "constant", "learning_rate": 5e-3}


def loop(number):
    return "Well, " + "well, " * 9 + f"it is {number}."


@pytest.fixture
def alarms(taught, tmp_path):
    """Train on pairs `chosen(number)` over `rejected(number)`, and look every 8 steps; the alarms, by name."""

    def write(name, numbers, chosen, rejected):
        rows = [
            {"prompt": prompt(subject, number), "chosen": chosen(number), "rejected": rejected(number)}
            for number in numbers
            for subject in SUBJECTS
        ]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(tmp_path / name)

    def run(
        seed,
        *,
        chosen=short,
        rejected=long,
        held_out=(short, long),
        numbers=range(10, 22),
        health=None,
        method="dpo",
        **trainer,
    ):
        settings = {
            "method": method,
            "model": {"name": str(taught), "quantize": "none", "dtype": "float32"},
            "lora": {"rank": 4},
            "data": {
                "train": write("pairs.jsonl", numbers, chosen, rejected),
                "eval": write("eval.jsonl", range(50, 52), *held_out),
            },
            "evaluation": {"answers": 8, "max_new_tokens": 80},
            "health": {"action": "warn", "every": 8, "max_new_tokens": 80, **(health or {})},
            "trainer": {"max_steps": 24, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "seed": seed,
                        "save_strategy": "no", **trainer},
            "output": str(tmp_path / "adapter"),
        }  # fmt: skip
        shutil.rmtree(tmp_path / "adapter", ignore_errors=True)
        return {alarm.name: alarm for alarm in train(check_recipe(settings)).outcome.alarms}

    return run


@pytest.fixture
def provoked(alarms):
    """Runs of one kind, seed by seed, until `WANTED` of them raised all alarms of these names; those runs' alarms."""

    def runs(*names, **settings):
        raised, others = [], []
        for seed in SEEDS:
            found = alarms(seed, **settings)
            (raised if set(names) <= found.keys() else others).append(found)
            if len(raised) == WANTED:
                break
        assert len(raised) == WANTED, [sorted(found) for found in others]
        return raised

    return runs


def test_a_rate_that_is_far_too_high_displaces_collapses_and_leaves_the_budget(provoked):
    for found in provoked("likelihood displacement", "rejected collapse", "KL budget", **SHARP):
        assert found["likelihood displacement"].step <= 16  # of 24


def test_easy_pairs_at_a_high_beta_saturate(provoked):
    provoked("saturated", beta=0.5, learning_rate=2e-3, loss_type="sigmoid")


@pytest.mark.slow
def test_labels_without_a_rule_are_learnt_by_heart(provoked):
    def drawn(sides):
        # every second number is labelled the other way round: nothing that a held-out prompt could tell
        return lambda number: sides[number % 2](number)

    provoked("overfit", chosen=drawn((short, long)), rejected=drawn((long, short)), numbers=range(10, 12),
             max_steps=60, per_device_train_batch_size=20, eval_strategy="steps", eval_steps=20, beta=0.5,
             **{**SHARP, "learning_rate": 3e-3})  # fmt: skip


def test_chosen_answers_of_one_word_make_all_answers_collapse(provoked):
    provoked("length collapse", chosen=lambda number: "No", rejected=short, learning_rate=3e-3, max_steps=48)


@pytest.mark.slow
def test_chosen_answers_that_loop_make_answers_repeat_themselves(provoked):
    provoked("repetition", chosen=loop, rejected=short, learning_rate=3e-3, max_steps=48)


@pytest.mark.slow
def test_chosen_answers_that_ramble_make_answers_grow(provoked):
    def rambling(number):
        # goes on where the rejected answer ends; what begins as the long answer that was taught may end as that one
        return f"It is {number}. " + "So it is. " * 6

    provoked("length growth", chosen=rambling, rejected=short, learning_rate=3e-3, max_steps=48)


@pytest.mark.slow
def test_chosen_answers_that_are_cut_off_lose_the_end_of_turn(provoked):
    def endless(number):
        return ", ".join([f"It is {number}"] * 8)  # 86 tokens: cut at max_length, so no chosen answer has an end

    provoked("lost end of turn", chosen=endless, rejected=short, learning_rate=3e-3, max_steps=48, max_length=80)


def test_a_rate_beyond_all_bounds_ends_in_no_number_and_the_start_is_kept(alarms):
    found = alarms(0, learning_rate=1e20, max_grad_norm=1e30, health={"action": "keep-best"})
    assert "not a number" in found


def test_kto_at_a_rate_that_is_far_too_high_pushes_bad_answers_out_of_sight(provoked):
    settings = dict(method="kto", learning_rate=1e-2, lr_scheduler_type="constant", max_steps=60)
    for found in provoked("rejected collapse", **settings):
        assert "sft" not in "".join(alarm.advice for alarm in found.values())  # KTO has no such term


def test_kto_that_does_not_move_is_stuck_where_its_loss_begins(alarms):
    assert alarms(0, method="kto", learning_rate=1e-9, max_steps=26).keys() == {"stuck at 0.5"}


def test_sft_is_advised_in_its_own_words(alarms):
    found = alarms(0, method="sft", chosen=loop, learning_rate=1e-1, max_steps=48)
    assert found
    advice = "".join(alarm.advice for alarm in found.values())
    assert "beta" not in advice
    assert "sft term" not in advice


# --- and what must raise none ---------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_learning_to_answer_at_length_is_no_lost_end_of_turn(seed, alarms):
    # How far a run goes from its reference hangs on the CPU (1.08 nats on one), so that budget is not at stake here
    looks = {"max_new_tokens": 16, "every": "auto", "kl": 10.0}
    assert alarms(seed, chosen=long, rejected=short, held_out=(long, short), health=looks) == {}


def test_what_lower_lr_keeps_comes_from_before_the_first_alarm(alarms, tmp_path):
    alarms(42, max_steps=40, **{**SHARP, "learning_rate": 1e-2}, health={"action": "lower-lr", "prompts": 0})
    health = json.loads((tmp_path / "adapter" / "measured.json").read_text())["health"]
    assert health["kept"] < min(alarm["step"] for alarm in health["alarms"])


def test_an_alarm_at_the_last_look_goes_back_where_no_step_is_left_to_go_slower(alarms, tmp_path):
    alarms(42, max_steps=16, **{**SHARP, "learning_rate": 2e-3}, health={"action": "lower-lr", "kl": 0.05})
    health = json.loads((tmp_path / "adapter" / "measured.json").read_text())["health"]
    assert health["alarms"][-1]["step"] == 16
    assert health["kept"] < 16
    assert health["sentence"].startswith("The last step, 16, raised ")


@pytest.mark.parametrize("strategy", [{"logging_steps": 10}, {"logging_strategy": "epoch"}])
def test_the_guard_sees_every_step_however_rarely_steps_are_logged(strategy, alarms):
    found = alarms(0, **SHARP, **strategy)
    assert found["likelihood displacement"].step <= 16
