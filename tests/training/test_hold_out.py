"""`data.hold_out`: prompts of the training data that are measured and never trained on; and data that has changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_dpo.adapters.passport import read_passport
from lora_dpo.config.reading import check_recipe
from lora_dpo.data import read_pairs
from lora_dpo.data.write import split_by_prompt
from lora_dpo.errors import DataError
from lora_dpo.events import Resolved, StopSignal
from lora_dpo.files import sha256_of
from lora_dpo.training.data_record import changed_data
from lora_dpo.training.prepare import read_run
from lora_dpo.training.run import train


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def recipe(recipe_dict, write_pairs):
    def make(count=12, **changes):
        write_pairs("all.jsonl", count)
        return check_recipe(recipe_dict(data={"train": "all.jsonl", "eval": None, "hold_out": 3}, **changes))

    return make


def prepared(recipe):
    return read_run(recipe, Path("adapters/x"), lambda event: None, StopSignal())


def texts(pairs):
    return {pair.prompt[-1]["content"] for pair in pairs}


def test_the_prompts_that_are_held_out_are_not_trained_on(recipe):
    run = prepared(recipe())
    train_side, held_out = split_by_prompt(read_pairs("all.jsonl")[0], 3)
    assert [pair.origin for pair in run.train] == [pair.origin for pair in train_side]
    assert [pair.origin for pair in run.held_out] == [pair.origin for pair in held_out]
    assert len(run.held_out) == 3
    assert texts(run.apart) == {prompt[-1]["content"] for prompt in [pair.prompt for pair in held_out]}
    assert {prompt[-1]["content"] for prompt in run.prompts} <= texts(held_out)
    assert run.reports["train"].summary() == "9 pairs read, 0 dropped, 3 held out"
    assert run.reports["eval"].summary() == "3 pairs read, 0 dropped"


def test_single_answers_are_held_out_with_their_prompts(recipe_dict):
    rows = [
        {"prompt": f"Say {number}.", "completion": f"{number}{'!' * (not up)}", "label": up}
        for number in range(8)
        for up in (True, False)
    ]
    Path("votes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = prepared(
        check_recipe(recipe_dict(method="kto", data={"train": "votes.jsonl", "eval": None, "hold_out": 0.25}))
    )
    assert (len(run.answers), len(run.held_out_answers), len(run.held_out)) == (12, 4, 2)
    assert not {tuple(one.prompt) for one in run.answers} & {tuple(one.prompt) for one in run.held_out_answers}
    assert {tuple(pair.prompt) for pair in run.held_out} == {tuple(one.prompt) for one in run.held_out_answers}
    assert len(run.apart) == 2


@pytest.mark.parametrize(("count", "wanted"), [(3, 3), (1, 0.5)])
def test_a_run_with_nothing_left_to_train_on_says_so(recipe, write_pairs, recipe_dict, count, wanted):
    write_pairs("few.jsonl", count)
    settings = recipe_dict(data={"train": "few.jsonl", "eval": None, "hold_out": wanted})
    with pytest.raises(DataError) as caught:
        prepared(check_recipe(settings))
    assert str(caught.value) == (
        f"data.hold_out is {wanted}, and the training data has {count} different prompt{'s' * (count > 1)}: none would "
        "be left to train on. Lower it, or leave it out."
    )


def test_a_run_measures_what_it_held_out_keeps_it_as_a_file_and_tells_when_the_data_has_changed(recipe, write_pairs):
    wanted = recipe(trainer={"max_steps": 1}, evaluation={"answers": 1, "show": 1, "max_new_tokens": 4})
    first = train(wanted, name="mine").folder
    assert first == Path("adapters/mine")
    passport = read_passport(first)
    counts = {which: (record["rows"], record["pairs"], record["prompts"]) for which, record in passport.data.items()}
    assert counts == {"train": (12, 9, 9), "eval": (3, 3, 3)}
    assert passport.data["eval"]["sha256"] == {"all.jsonl": sha256_of(Path("all.jsonl"))}
    assert passport.metrics["after"]["pairs"]["pairs"] == 3
    kept = read_pairs(str(first / "held-out.jsonl"))[0]
    assert texts(kept) == texts(split_by_prompt(read_pairs("all.jsonl")[0], 3)[1])

    again = Path("adapters/mine-2")
    assert changed_data(wanted, "mine", again) is None
    Path("all.jsonl").unlink()
    write_pairs("all.jsonl", 14)
    expected = ("changed", f"all.jsonl since adapters/mine was trained ({passport.created[:10]})")
    assert changed_data(wanted, "mine", again) == expected
    assert changed_data(wanted, "other", Path("adapters/other")) is None  # no adapter before it
    assert changed_data(wanted.model_copy(update={"output": "x/y"}), "mine", Path("x/y")) is None
    told = []

    class Enough(Exception):
        """The header has been told: what comes after it takes long."""

    def look(event):
        told.append(event)
        if isinstance(event, Resolved):
            raise Enough

    with pytest.raises(Enough):
        train(wanted, name="mine", on_event=look)
    header = [line for event in told if isinstance(event, Resolved) for line in event.lines]
    assert header[-1] == expected
    assert ("eval data", "3 pairs read, 0 dropped, held out of the training data") in header
    assert ("train data", "11 pairs read, 0 dropped, 3 held out, read as TRL preference pairs") in header


def test_a_folder_of_data_and_a_broken_passport_are_not_said_to_have_changed(recipe, write_pairs):
    wanted = recipe()
    folder = Path("adapters/mine")
    folder.mkdir(parents=True)
    (folder / "passport.json").write_text("{")
    assert changed_data(wanted, "mine", Path("adapters/mine-2")) is None
