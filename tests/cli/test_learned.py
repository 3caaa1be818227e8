"""`lora-dpo data check --learned` as a user types it."""

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from lora_dpo import read_pairs
from lora_dpo.adapters.stored_margins import PairMargin, write_margins
from lora_dpo.cli.commands import main
from lora_dpo.data.pairs import pair_mark


@pytest.fixture(autouse=True)
def its_own_place(tiny_adapter, write_pairs, tmp_path, monkeypatch):
    """Six pairs in a file, and an adapter whose run knows them: it orders rows 4 and 2 the other way round."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lora_dpo.cli.data.out", Console(width=200))
    write_pairs("pairs.jsonl", count=6)
    shutil.copytree(tiny_adapter, "adapters/mine")
    pairs, _ = read_pairs("pairs.jsonl")
    means = [3.0, -2.0, 1.0, -9.0, 0.5, 2.0]
    rows = [
        PairMargin(pair.origin, pair_mark(pair), 0.5, mean, mean, 1) for pair, mean in zip(pairs, means, strict=True)
    ]
    write_margins(Path("adapters/mine"), rows)


@pytest.fixture
def run(capsys):
    def call(*arguments):
        status = main(["data", "check", *arguments])
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err
        return status, said.out, said.err

    return call


def test_the_most_suspicious_are_shown_first_with_their_rows_and_margins(run, loads):
    status, out, _ = run("pairs.jsonl", "--learned", "mine", "--top", "2")
    assert (status, loads) == (0, [])
    assert "mine orders 2 of 6 pairs the other way round, by the margins that its run kept." in out
    first, second = out.index("pairs.jsonl:4  71% against its label"), out.index("pairs.jsonl:2  55%")
    assert first < second
    assert "(margin +0.5 before it was learnt from, -9.0 after)" in out
    assert "pairs.jsonl:5" not in out
    assert "4 more" in out
    assert "Say 4 words about" in out


def test_a_file_that_the_run_does_not_know_is_scored(run, write_pairs):
    write_pairs("other.jsonl", count=3, first=50)
    status, out, err = run("other.jsonl", "--learned", "adapters/mine")
    assert status == 0
    assert "of 3 pairs the other way round, each pair scored with it now." in out
    assert "pairs, reference" in err


def test_all_can_be_written_in_that_order_and_read_again(run):
    status, out, _ = run("pairs.jsonl", "--learned", "mine", "--ordered", "look.jsonl")
    assert status == 0
    assert "6 pairs written to look.jsonl" in out
    rows = [json.loads(line) for line in Path("look.jsonl").read_text().splitlines()]
    assert [row["learned"]["row"] for row in rows] == [4, 2, 5, 3, 6, 1]
    assert len(read_pairs("look.jsonl")[0]) == 6


def test_as_json_it_is_one_object_with_every_pair(run):
    _, out, _ = run("pairs.jsonl", "--learned", "mine", "--json")
    found = json.loads(out)
    assert found["pairs"] == 6
    assert found["learned"]["against"] == 2
    assert [one["row"] for one in found["learned"]["pairs"]][:2] == ["pairs.jsonl:4", "pairs.jsonl:2"]
    assert "learned" not in json.loads(run("pairs.jsonl", "--json")[1])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--ordered", "look.jsonl"), "--learned"),
        (("--learned", "nobody"), "no adapter nobody"),
        (("--learned", "mine", "--ordered", "look.csv"), ".jsonl"),
        (("--learned", "mine", "--ordered", "pairs.jsonl"), "exists"),
        (("--learned", "mine", "--ordered", "x.jsonl", "--fix", "x.jsonl"), "named twice"),
    ],
)
def test_what_could_not_be_done_is_refused_before_anything_is_read(arguments, said, run, monkeypatch):
    monkeypatch.setattr("lora_dpo.data.doctor.examination.examine", None)
    status, _, err = run("pairs.jsonl", *arguments)
    assert status == 1
    assert said in err
    assert not Path("look.jsonl").exists()
