"""Accuracy at first sight: a prompt counts once, before it is learnt from, whatever interrupts the run."""

import json
from pathlib import Path

import pytest

from lora_dpo.config.reading import check_recipe
from lora_dpo.engine.prequential_count import PrequentialCount
from lora_dpo.evaluation.prequential import at_first_sight
from lora_dpo.events import Progress, Stopped, StopSignal
from lora_dpo.training.run import train

# --- counting in training -------------------------------------------------------------------------


def test_a_prompt_counts_once_and_ties_count_half():
    sight = PrequentialCount()
    sight.note([1, 2, 3, 4], [0.5, -0.5, 0.0, 0.3])
    assert sight.take() == {"first_sight/right": 2.5, "first_sight/prompts": 4.0}
    sight.note([1, 5], [0.5, 0.5])
    assert sight.take() == {"first_sight/right": 1.0, "first_sight/prompts": 1.0}


def test_pairs_of_one_prompt_in_a_batch_are_averaged():
    sight = PrequentialCount()
    sight.note([7, 7, 7, 7, 8], [1.0, 1.0, 1.0, -1.0, -1.0])
    assert sight.take() == {"first_sight/right": 0.75, "first_sight/prompts": 2.0}


def test_nothing_new_logs_nothing():
    sight = PrequentialCount()
    sight.note([1], [0.5])
    sight.take()
    sight.note([1], [0.5])
    assert sight.take() == {}


def test_what_the_untrained_policy_says_is_seen_but_no_prediction():
    sight = PrequentialCount()
    sight.note([1, 2], [2e-5, -3e-2], moved=False)  # rounding, in 16 bits a large one
    assert sight.take() == {}
    sight.note([1, 2, 3], [1.0, 1.0, -1.0])
    assert sight.take() == {"first_sight/right": 0.0, "first_sight/prompts": 1.0}


def test_counts_are_summed_until_they_are_logged_and_survive_a_checkpoint(tmp_path):
    sight = PrequentialCount()
    sight.note([1], [1.0])
    sight.note([2], [-1.0])
    sight.save(tmp_path)
    other = PrequentialCount()
    other.load(tmp_path)
    for one in (sight, other):
        one.note([2, 3], [1.0, 1.0])
        assert one.take() == {"first_sight/right": 2.0, "first_sight/prompts": 3.0}


def test_a_checkpoint_without_a_count_ends_the_count(tmp_path):
    sight = PrequentialCount()
    sight.load(tmp_path)
    sight.note([1], [1.0])
    assert sight.take() == {}


# --- reading the log ------------------------------------------------------------------------------


@pytest.fixture
def log(tiny_adapter, tmp_path):
    """A run's folder with these rows in its log, and this in its passport about the training data."""

    def write(rows, data=None, batch=4):
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps({"loss": 0.5, **row}) + "\n" for row in rows))
        (folder / "recipe.yaml").write_text(json.dumps({"trainer": {"per_device_train_batch_size": batch}}))
        if data is not None:
            passport = json.loads((tiny_adapter / "passport.json").read_text())
            passport["data"] = {"train": data}
            (folder / "passport.json").write_text(json.dumps(passport))
        return folder

    return write


def old_rows(steps, accuracy=1.0, passes=1.0):
    return [
        {"step": step, "epoch": passes * step / steps, "rewards/accuracies": accuracy, "rewards/margins": 0.3}
        for step in range(1, steps + 1)
    ]


def test_the_counts_of_the_log_are_summed(log):
    rows = [{"step": 1}, {"step": 2, "first_sight/right": 3.5, "first_sight/prompts": 6.0},
            {"step": 3, "first_sight/right": 2.0, "first_sight/prompts": 4.0, "epoch": 3.0}]  # fmt: skip
    found = at_first_sight(log(rows))
    assert (found.value, found.n) == (0.55, 10)


def test_of_fewer_than_eight_prompts_nothing_is_said(log):
    assert at_first_sight(log([{"step": 1, "first_sight/right": 7.0, "first_sight/prompts": 7.0}])) is None


@pytest.mark.parametrize("data", [None, {"pairs": 40}, {"pairs": 40, "prompts": 39}, {"answers": 40, "prompts": 40}])
def test_an_older_log_says_nothing_unless_each_pair_has_a_prompt_of_its_own(data, log):
    assert at_first_sight(log(old_rows(10), data)) is None


def test_an_older_log_of_one_pair_a_prompt_is_read_up_to_the_number_of_pairs(log):
    found = at_first_sight(log(old_rows(10), {"pairs": 38, "prompts": 38}))
    assert (found.value, found.n) == (1.0, 38)


def test_a_smaller_last_batch_counts_for_what_it_is(log):
    rows = old_rows(3)
    rows[0]["rewards/margins"] = 0.0  # the untrained policy: 4 pairs that do not count
    assert at_first_sight(log(rows, {"pairs": 10, "prompts": 10})) is None  # 6 are left


# --- a run ----------------------------------------------------------------------------------------


@pytest.fixture
def recipe(recipe_dict, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(prompts, each, **settings):
        """`each` pairs after each of so many prompts, twice over."""
        rows = [
            {"prompt": f"question {one}", "chosen": f"yes {one}{two}", "rejected": f"no {two}"}
            for one in range(prompts)
            for two in range(each)
        ]
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {"max_steps": -1, "num_train_epochs": 2, "learning_rate": 1e-3, "warmup_steps": 0, **settings}
        found = recipe_dict(trainer=settings, data={"train": "rows.jsonl"}, health={"action": "none"})
        return check_recipe(found)

    return make


def counted(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["first_sight/right"], row["first_sight/prompts"])
            for row in rows if "first_sight/prompts" in row]  # fmt: skip


@pytest.mark.parametrize(("prompts", "each", "told"), [(10, 3, None), (16, 1, 12)])  # fewer than 8 tell nothing
def test_a_run_counts_each_prompt_once_but_for_those_of_the_first_step(prompts, each, told, recipe):
    folder = train(recipe(prompts, each, per_device_train_batch_size=4)).folder
    assert sum(seen for _, _, seen in counted(folder)) == prompts - 4
    assert all(0 <= right <= seen for _, right, seen in counted(folder))
    found = at_first_sight(folder)
    assert (found and found.n) == told
    passport = json.loads((folder / "passport.json").read_text())
    assert passport["data"]["train"]["prompts"] == prompts


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"logging_steps": 3}])
def test_a_resumed_run_counts_as_an_uninterrupted_one(settings, recipe):
    settings = {"per_device_train_batch_size": 2, **settings}
    whole = counted(train(recipe(12, 2, **settings), name="whole").folder)
    stop = StopSignal()

    def stop_after_two(event):
        if isinstance(event, Progress) and event.stage == "training" and event.done == 2:
            stop.requested = True

    with pytest.raises(Stopped):
        train(recipe(12, 2, **settings), name="cut", on_event=stop_after_two, stop=stop)
    assert counted(train(recipe(12, 2, **settings), name="cut", resume=True).folder) == whole
    assert whole
