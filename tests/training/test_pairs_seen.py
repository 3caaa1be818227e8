"""A run keeps each pair's margin before it learnt from it and at last, by the rows of its data."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lora_dpo.adapters.stored_margins import PairMargin, read_margins, write_margins
from lora_dpo.config.reading import check_recipe
from lora_dpo.data import Origin, read_pairs
from lora_dpo.data.pairs import pair_mark
from lora_dpo.errors import AdapterError
from lora_dpo.events import Progress, Stopped, StopSignal
from lora_dpo.training.run import train


@pytest.fixture
def recipe(recipe_dict, tmp_path, monkeypatch):
    """Ten pairs in two files, two a step, twice over."""
    monkeypatch.chdir(tmp_path)
    for name, numbers in (("a.jsonl", range(6)), ("b.jsonl", range(6, 10))):
        rows = [{"prompt": f"question {one}", "chosen": f"yes {one}", "rejected": f"no {one}{one}"} for one in numbers]
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**settings):
        settings = {"max_steps": -1, "num_train_epochs": 2, "learning_rate": 1e-3, "warmup_steps": 0, **settings}
        settings = {"per_device_train_batch_size": 2, **settings}
        found = recipe_dict(trainer=settings, data={"train": ["a.jsonl", "b.jsonl"]}, health={"action": "none"})
        return check_recipe(found)

    return make


def test_a_run_stores_what_it_made_of_each_pair(recipe):
    folder = train(recipe()).folder
    margins = read_margins(folder)
    pairs, _ = read_pairs(["a.jsonl", "b.jsonl"])
    assert [(one.origin, one.mark) for one in margins] == [(pair.origin, pair_mark(pair)) for pair in pairs]
    first_step = [one for one in margins if one.before is None]
    assert [one.times for one in first_step] == [1, 1]  # seen first by the reference itself
    others = [one for one in margins if one.before is not None]
    assert [one.times for one in others] == [2] * 8
    assert all(one.mean == pytest.approx((one.before + one.after) / 2, abs=1e-4) for one in others)
    assert sum(one.after for one in others) > sum(one.before for one in others)  # it learnt something
    assert not any(text in (folder / "pair-margins.json").read_text() for text in ("question", "yes"))


def test_margins_are_those_that_the_log_averages(recipe):
    """With one pair a step, the log's reward margin is β times that pair's."""
    folder = train(recipe(per_device_train_batch_size=1, num_train_epochs=1, logging_steps=1, beta=0.2)).folder
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    expected = sorted(row["rewards/margins"] / 0.2 for row in logged if "rewards/margins" in row)
    found = sorted(one.after or 0.0 for one in read_margins(folder))
    assert found == pytest.approx(expected, abs=2e-3)
    assert max(map(abs, found)) > 0.05


@pytest.mark.parametrize("at", [3, 10])  # after the last step only the measuring is left
def test_a_resumed_run_stores_what_an_uninterrupted_one_does(at, recipe):
    whole = read_margins(train(recipe(), name="whole").folder)
    stop = StopSignal()

    def stop_there(event):
        if isinstance(event, Progress) and event.stage == "training" and event.done == at:
            stop.requested = True

    with pytest.raises(Stopped):
        train(recipe(), name="cut", on_event=stop_there, stop=stop)
    assert read_margins(train(recipe(), name="cut", resume=True).folder) == whole


def test_pairs_that_were_not_seen_are_said_to_be(recipe):
    margins = read_margins(train(recipe(max_steps=3)).folder)
    assert sorted((one.times, one.before is None) for one in margins) == [(0, True)] * 6 + [(1, False)] * 4


# --- the file -------------------------------------------------------------------------------------

ONE = PairMargin(Origin("b.jsonl", 7), "0123456789abcdef", 1.25, -0.5, 0.375, 2)
UNSEEN = PairMargin(Origin("ä.jsonl", 3), "fedcba9876543210", None, None, None, 0)


def test_what_is_written_is_read_again(tmp_path):
    write_margins(tmp_path, [ONE, UNSEEN])
    assert read_margins(tmp_path) == [ONE, UNSEEN]


def test_a_file_whose_name_is_no_text_is_no_error(tmp_path):
    write_margins(tmp_path, [replace(ONE, origin=Origin("a\udc80.jsonl", 7))])
    assert read_margins(tmp_path) == [replace(ONE, origin=Origin("a?.jsonl", 7))]


def test_of_no_pairs_nothing_is_written(tmp_path):
    write_margins(tmp_path, [])
    assert list(tmp_path.iterdir()) == []
    assert read_margins(tmp_path) == []


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"files": [], "pairs": [[0, 1, "x", 1.0, 1.0, 1.0, 1]]}',
     '{"files": ["a"], "pairs": [[0, 1, "x", NaN, 1.0, 1.0, 1]]}',
     '{"files": ["a"], "pairs": [[0, -1, "x", 1, 1, 1, 1]]}'],
)  # fmt: skip
def test_a_broken_file_is_an_error_with_its_name(text, tmp_path):
    (tmp_path / "pair-margins.json").write_text(text)
    with pytest.raises(AdapterError, match=r"pair-margins\.json"):
        read_margins(tmp_path)
