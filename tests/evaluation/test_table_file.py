"""Tables of runs for programs, and means over seeds."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from lora_dpo.cli.commands import main
from lora_dpo.errors import ConfigError, OutputError
from lora_dpo.evaluation.intervals import mean, t_quantile
from lora_dpo.evaluation.report.table_file import mean_row, seed_groups, table_text
from lora_dpo.evaluation.report.write import report_of, table_of, write_report


@pytest.fixture
def run(tiny_adapter, tmp_path):
    """An adapter folder with settings and results of one's choice."""

    def make(name, accuracy=0.75, margin=1.5, **trainer):
        folder = shutil.copytree(tiny_adapter, tmp_path / name)
        (folder / "recipe.yaml").write_text(json.dumps({"trainer": trainer, "output": name}))
        passport = json.loads((folder / "passport.json").read_text())
        results = {"accuracy": accuracy, "margin": margin, "chosen_logratio": 0.5, "rejected_logratio": -0.5}
        passport["metrics"]["after"] = {"pairs": results, "answers": {"mean_tokens": 9.0, "finished": 1.0}}
        (folder / "passport.json").write_text(json.dumps(passport))
        return folder

    return make


@pytest.fixture
def seeds(run):
    """Two runs that differ in their seed alone (one of them has the default's), and one with another β."""
    return [run("one", 0.7, beta=0.1), run("two", 0.9, beta=0.1, seed=43), run("far", 0.5, beta=0.5)]


def test_runs_of_several_seeds_are_a_group_with_their_mean(seeds):
    rows = table_of(seeds)
    assert [(row["kind"], row["name"], row["runs"]) for row in rows] == [
        ("run", "one", 1),
        ("run", "two", 1),
        ("run", "far", 1),
        ("mean", "mean of one, two", 2),
    ]
    assert [(row["trainer.beta"], row.get("trainer.seed")) for row in rows] == [
        (0.1, 42),
        (0.1, 43),
        (0.5, 42),
        (0.1, None),
    ]
    assert [row["accuracy"] for row in rows] == pytest.approx([0.7, 0.9, 0.5, 0.8])
    # two values: half of the interval is t(1) · s / √2 = 12.706 · 0.1414 / 1.4142
    assert rows[-1]["accuracy_half"] == pytest.approx(12.7062 * 0.1, rel=1e-4)
    assert rows[-1]["length_half"] == 0
    assert "known" not in rows[-1], "no run was asked questions"


def test_the_page_has_the_group_beside_the_runs(seeds):
    page = report_of(seeds)
    assert "Over seeds" in page
    assert "0.800 ± 1.271" in page
    assert "Over seeds" not in report_of(seeds[1:])


def test_the_same_seed_twice_is_no_second_run(run):
    assert [row["kind"] for row in table_of([run("a"), run("b")])] == ["run", "run"]
    rows = table_of([run("c", 0.7), run("d", 0.9), run("e", 0.8, seed=1)])
    assert (rows[-1]["kind"], rows[-1]["runs"], rows[-1]["accuracy"]) == ("mean", 2, pytest.approx(0.75))


def test_what_nobody_knows_the_settings_of_and_what_has_no_result_is_in_no_group(run):
    bare = run("bare")
    (bare / "recipe.yaml").unlink()
    assert [row["kind"] for row in table_of([bare, run("other", seed=1)])] == ["run", "run"]
    begun = run("begun", seed=2)
    passport = json.loads((begun / "passport.json").read_text())
    (begun / "passport.json").write_text(json.dumps({**passport, "metrics": {}}))
    assert [row["kind"] for row in table_of([run("whole"), begun])] == ["run", "run"]


def test_a_mean_is_of_what_all_of_them_have():
    rows = [{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": None}, {"a": 5.0}]
    found = mean_row(rows, ["a", "b"])
    assert found == {"kind": "mean", "runs": 3, "a": 3.0, "a_half": pytest.approx(t_quantile(2) * 2 / 3**0.5)}
    assert found["a_half"] == mean([1.0, 3.0, 5.0]).high - 3.0
    assert seed_groups(["x", "y", "x", None, None, "x"], [1, 1, 2, 1, 2, 1]) == [[0, 2]]


def test_both_forms_say_the_same():
    rows = [{"name": 'a, "b"', "x": 0.1 + 0.2, "y": None}, {"name": "c", "x": float("nan"), "z": [1, 2]}]
    found = json.loads(table_text(Path("t.json"), rows))
    assert found == [
        {"name": 'a, "b"', "x": 0.1 + 0.2, "y": None, "z": None},
        {"name": "c", "x": None, "y": None, "z": [1, 2]},
    ]
    text = table_text(Path("t.CSV"), rows)
    assert list(csv.DictReader(text.splitlines())) == [
        {"name": 'a, "b"', "x": "0.30000000000000004", "y": "", "z": ""},
        {"name": "c", "x": "", "y": "", "z": "[1, 2]"},
    ]


def test_the_command_writes_page_and_table(seeds, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *map(str, seeds), "--table", "results.csv"]) == 0
    said = capsys.readouterr().out
    assert "reports/comparison.html" in said
    assert "results.csv" in said
    with Path("results.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == ["one", "two", "far", "mean of one, two"]


def test_an_evaluation_has_its_intervals(run, tmp_path):
    folder = tmp_path / "evaluations" / "mine"
    folder.mkdir(parents=True)
    known, unknown = {"value": 0.8, "low": 0.7, "high": 0.9, "n": 50}, {"value": 2.0, "low": None, "high": None, "n": 1}
    answers = dict.fromkeys(("tokens", "finished", "repetition", "refusals"), known)
    stored = {
        "format": 1,
        "adapter": "mine",
        "base": "b",
        "against": "base",
        "data": ["d"],
        "beta": 0.1,
        "called": "better",
        "verdict": "v",
        "numbers": {"win-rate": known, "margin": unknown},
        "pairs": {"pairs": 5, "log_ratios": {"chosen": [], "rejected": []}},
        "rows": [],
        "seconds": 1.0,
        "contest": None,
        "text": None,
        "cost": "",
        "answers": {"adapter": answers, "base": answers},
    }
    (folder / "eval.json").write_text(json.dumps(stored))
    first, second = table_of([run("mine"), folder])
    assert first["name"] == "mine"
    assert second["name"] == "mine (evaluation)"
    assert (second["win_rate"], second["win_rate_low"], second["win_rate_high"]) == (0.8, 0.7, 0.9)
    assert (second["margin"], second["margin_low"]) == (2.0, None)
    assert [row["kind"] for row in table_of([folder])] == ["evaluation"]


def test_another_ending_is_refused_before_anything_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments in (["nowhere"], [str(tmp_path)]):
        assert main(["report", *arguments, "--table", "results.xlsx"]) == 1
        said = capsys.readouterr().err
        assert ".csv or .json" in said
        assert said.count("\n") == 1
    with pytest.raises(ConfigError, match=r"\.csv or \.json"):
        write_report([tmp_path / "nowhere"], table=tmp_path / "results")
    (tmp_path / "results.csv").write_text("mine")
    with pytest.raises(OutputError, match="already exists"):
        write_report([tmp_path / "nowhere"], table=tmp_path / "results.csv")


def test_nothing_is_written_over_and_page_and_table_appear_together(run, tmp_path):
    folder, table = run("mine"), tmp_path / "results.json"
    table.write_text("mine")
    page = tmp_path / "page.html"
    with pytest.raises(OutputError, match="already exists"):
        write_report([folder], page, table)
    assert table.read_text() == "mine"
    assert not page.exists()
    page.write_text("page")
    with pytest.raises(OutputError, match="already exists"):
        write_report([folder], page, tmp_path / "other.json")
    assert not (tmp_path / "other.json").exists()
