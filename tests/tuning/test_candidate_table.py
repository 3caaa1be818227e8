"""The candidates of a search as rows, from its folder alone."""

import csv
import json
from pathlib import Path

import pytest

from lora_dpo.cli.commands import main
from lora_dpo.errors import AdapterError, ConfigError, OutputError
from lora_dpo.evaluation.intervals import Interval, rate
from lora_dpo.tuning.score import Measured, score
from lora_dpo.tuning.table import candidate_rows, read_trials, write_search_report
from lora_dpo.tuning.trials import Trial

BASE = Measured((0.5,) * 4, 0.0, (True,) * 4, (9,) * 4, (0.0,) * 4, 10.0, known=6, questions=8)


def trial(number, right=(1.0, 1.0, 1.0, 0.0), *, ended="", seed=42, beta=0.1, **measured):
    values = {"margin": 1.0, "finished": (True, True, True, False), "tokens": (10, 10, 10, 14), "repeated": (0.0,) * 4}
    found = Measured(right=right, chosen_tokens=10.0, known=5, questions=8, kl=0.25, **{**values, **measured})
    return Trial(
        number=number,
        values={"trainer.beta": beta, "trainer.loss_type": "sigmoid"},
        seed=seed,
        measured=None if ended else found,
        score=None if ended else score(found, BASE),
        ended=ended,
        steps=4 if ended else 12,
        planned=12,
        learned=Interval(0.6, 0.4, 0.8, 24),
        seconds=3.5,
    )


@pytest.fixture
def search(tmp_path, monkeypatch):
    """A folder of a search with some candidates; with its page if it is over."""
    monkeypatch.chdir(tmp_path)

    def make(*trials, over=True):
        folder = Path("adapters/brief.search")
        (folder / "trials").mkdir(parents=True)
        (folder / "search.json").write_text("{}")
        for one in trials:
            (folder / "trials" / f"{one.number:03d}.json").write_text(json.dumps(one.to_json()))
            (folder / "trials" / f"{one.number:03d}.looks.json").write_text("[0.5]")
        if over:
            (folder / "search.html").write_text("<!doctype html>the page")
        return folder

    return make


def test_a_candidate_is_read_back_with_its_score():
    one = trial(3)
    again = Trial.from_json(json.loads(json.dumps(one.to_json())))
    assert again.score == one.score
    assert again == one
    older = one.to_json()
    del older["score"]
    assert Trial.from_json(older).score is None


def test_a_row_has_everything_that_a_candidate_came_to():
    row = candidate_rows([trial(7)])[0]
    quality = rate(3, 4)
    # unfinished 1 of 4 and 8, forgotten 1/8; the answers are 11 tokens long, within 15% of 10
    assert row == {
        "kind": "candidate",
        "runs": 1,
        "candidate": 7,
        "trainer.beta": 0.1,
        "trainer.loss_type": "sigmoid",
        "seed": 42,
        "score": pytest.approx(0.75 - 1 / 12 - 1 / 8),
        "score_low": pytest.approx(quality.low - 1 / 12 - 1 / 8),
        "quality": 0.75,
        "quality_low": quality.low,
        "quality_high": quality.high,
        "cost_unfinished": pytest.approx(1 / 12),
        "cost_repeated": 0.0,
        "cost_forgotten": 0.125,
        "cost_length": 0.0,
        "kl": 0.25,
        "accuracy": 0.75,
        "accuracy_low": quality.low,
        "accuracy_high": quality.high,
        "length": 11.0,
        "finished": 0.75,
        "known": 5,
        "questions": 8,
        "first_sight": 0.6,
        "first_sight_low": 0.4,
        "first_sight_high": 0.8,
        "steps": 12,
        "steps_planned": 12,
        "seconds": 3.5,
        "ended_early": None,
    }


def test_of_one_that_was_ended_early_it_says_why_and_no_number():
    row = candidate_rows([trial(0), trial(1, ended="behind the others at step 4")])[1]
    assert row["ended_early"] == "behind the others at step 4"
    assert (row["score"], row["accuracy"], row["cost_length"], row["steps"]) == (None, None, None, 4)


def test_seeds_of_one_combination_have_their_mean(search):
    three = [trial(0), trial(1, (1.0,) * 4, seed=43), trial(2, beta=0.3)]
    rows = candidate_rows([*three, trial(3, ended="KL at step 4", beta=0.3, seed=43)])
    assert [row["kind"] for row in rows] == ["candidate"] * 4 + ["mean"], "one that was ended early has no score"
    assert (rows[-1]["runs"], rows[-1]["trainer.beta"], rows[-1]["accuracy"]) == (2, 0.1, 0.875)
    assert rows[-1]["accuracy_half"] == pytest.approx(12.7062 * 0.125, rel=1e-4)
    assert "seed" not in rows[-1]


def test_the_command_says_where_the_page_is_and_writes_the_table(search, capsys):
    folder = search(trial(0), trial(1, ended="behind the others at step 4"))
    for name in (str(folder), "brief.search", "brief"):
        assert main(["report", name]) == 0
        assert capsys.readouterr().out == "page  adapters/brief.search/search.html\n"
    assert main(["report", "brief", "--table", "c.csv", "--output", "page.html"]) == 0
    assert "page.html" in capsys.readouterr().out
    assert Path("page.html").read_text() == "<!doctype html>the page"
    with Path("c.csv").open() as file:
        first, second = csv.DictReader(file)
    assert (first["candidate"], first["known"], first["ended_early"]) == ("0", "5", "")
    assert (second["score"], second["ended_early"]) == ("", "behind the others at step 4")
    assert main(["report", "brief", "--table", "c.json"]) == 0
    assert [row["candidate"] for row in json.loads(Path("c.json").read_text())] == [0, 1]


def test_a_search_that_goes_on_has_the_candidates_so_far(search):
    folder = search(trial(0), over=False)
    with pytest.raises(AdapterError, match="has no page"):
        write_search_report(folder)
    with pytest.raises(AdapterError, match="has no page"):
        write_search_report(folder, Path("page.html"), Path("c.json"))
    assert write_search_report(folder, table=Path("c.json")) == [Path("c.json")]


def test_what_is_refused(search, capsys):
    folder = search(trial(0))
    with pytest.raises(ConfigError, match=r"\.csv or \.json"):
        write_search_report(folder, table=Path("c.txt"))
    with pytest.raises(ConfigError, match="cannot be both"):
        write_search_report(folder, Path("c.csv"), Path("c.csv"))
    Path("c.csv").write_text("mine")
    with pytest.raises(OutputError, match="already exists"):
        write_search_report(folder, Path("page.html"), Path("c.csv"))
    assert Path("c.csv").read_text() == "mine"
    assert not Path("page.html").exists()
    assert main(["report", "brief", "brief"]) == 1
    assert "Name it alone" in capsys.readouterr().err
    (folder / "trials/000.json").write_text("{")
    with pytest.raises(AdapterError, match=r"000\.json cannot be read"):
        read_trials(folder)
    (folder / "trials/000.json").unlink()
    with pytest.raises(AdapterError, match="No candidate"):
        read_trials(folder)
