"""Candidates that Optuna draws: the same ones, however often the search was interrupted."""

import pytest

from lora_dpo.tuning.space import Axis
from lora_dpo.tuning.study import COMPARED, STARTUP, Study

AXES = (
    Axis("trainer.beta", "", 0.03, 0.5),
    Axis("trainer.max_steps", "", 10, 40, whole=True),
    Axis("lora.targets", "", choices=(["q_proj"], ["q_proj", "v_proj"])),
)
OWN = {"trainer.beta": 0.1, "trainer.max_steps": 20, "lora.targets": ["q_proj"]}


def worth(values):
    """Best at β = 0.2 with many steps."""
    return -abs(values["trainer.beta"] - 0.2) + values["trainer.max_steps"] / 100


def drawn(path, count, *, seed=0, interrupted=()):
    """Values of so many candidates; in some a process ends after it was drawn and before anything came of it."""
    study, found = Study(path, AXES, OWN, seed), []
    for number in range(count):
        if number in interrupted:
            Study(path, AXES, OWN, seed).ask(number).prune(1, 0.5)
        asked = study.ask(number)
        asked.tell(worth(asked.values))
        found.append(asked.values)
    return found


def test_the_first_candidate_is_the_recipe_and_all_lie_on_the_axes(tmp_path):
    found = drawn(tmp_path / "study.sqlite", 8)
    assert found[0] == OWN
    assert all(axis.holds(values[axis.key]) for values in found for axis in AXES)
    assert all(isinstance(values["trainer.max_steps"], int) for values in found)
    assert len({values["trainer.beta"] for values in found}) == 8


def test_an_interrupted_search_draws_as_one_that_was_not(tmp_path):
    whole = drawn(tmp_path / "a.sqlite", 9)
    assert drawn(tmp_path / "b.sqlite", 9, interrupted=(0, 3, 6, 8)) == whole
    assert drawn(tmp_path / "c.sqlite", 9, seed=1)[1:] != whole[1:]


def test_what_a_candidate_came_to_is_told_after_a_kill_that_came_before_the_telling(tmp_path):
    whole, found = drawn(tmp_path / "a.sqlite", 9), []
    for number in range(9):  # a process of its own for each, which ends before it tells anything
        last = (found[-1], worth(found[-1])) if found else None
        found.append(Study(tmp_path / "b.sqlite", AXES, OWN, 0).ask(number, last).values)
    assert found == whole


def test_it_learns_from_what_candidates_came_to(tmp_path):
    found = drawn(tmp_path / "study.sqlite", 24)
    early, late = found[1:STARTUP], found[-8:]
    assert sum(map(worth, late)) / len(late) > sum(map(worth, early)) / len(early)


def test_a_recipe_off_its_axes_is_tried_all_the_same(tmp_path):
    own = {**OWN, "trainer.beta": 0.9}
    study = Study(tmp_path / "study.sqlite", AXES, own, 0)
    first = study.ask(0)
    assert first.values == own
    first.tell(0.5)
    assert not first.prune(1, 0.0)
    assert AXES[0].holds(study.ask(1).values["trainer.beta"])


def test_what_lies_behind_the_others_is_ended_and_nothing_before_there_are_others(tmp_path):
    study = Study(tmp_path / "study.sqlite", AXES, OWN, 0)
    for number in range(COMPARED):
        asked = study.ask(number)
        assert not asked.prune(1, 0.1 if number == 2 else 0.8), "too few others"
        asked.tell(0.5)
    behind = study.ask(COMPARED)
    assert behind.prune(1, 0.3)
    behind.tell(None)
    ahead = study.ask(COMPARED + 1)
    assert not ahead.prune(1, 0.9)


def test_a_candidate_that_is_dropped_is_forgotten(tmp_path):
    study = Study(tmp_path / "study.sqlite", AXES, OWN, 0)
    study.ask(0).tell(0.1)
    dropped = study.ask(1)
    dropped.drop()
    again = study.ask(1)
    assert again.values == dropped.values
    again.drop()
    assert study.ask(1, draw=1).values != dropped.values, "another is drawn for its place"


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_telling_of_the_end_is_kept_on_the_disk(tmp_path, value):
    import optuna

    study = Study(tmp_path / "study.sqlite", AXES, OWN, 0)
    study.ask(0).tell(value)
    stored = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path / 'study.sqlite'}")
    assert [trial.value for trial in stored.trials] == [value]
