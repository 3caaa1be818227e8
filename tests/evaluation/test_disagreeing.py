"""The page of a run names the pairs that stay wrong or cost most, and shows the most suspicious side by side."""

import html
import json
import re
import shutil
from pathlib import Path

import pytest

from lora_dpo import read_pairs
from lora_dpo.adapters.stored_margins import PairMargin, write_margins
from lora_dpo.data.pairs import pair_mark
from lora_dpo.evaluation.report.write import report_of

MEANS = [3.0, -20.0, 1.0, -9.0, 30.0, 40.0, None]


@pytest.fixture
def run(tiny_adapter, tmp_path, monkeypatch):
    """A run that knows seven pairs, two of which stay wrong."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"<b>ask {n}", "chosen": f"<i>good {n}", "rejected": f"bad {n}"} for n in range(1, 8)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(tiny_adapter, "mine")
    pairs, _ = read_pairs("pairs.jsonl")
    margins = [
        PairMargin(pair.origin, pair_mark(pair), None if mean is None else 0.5, mean, mean, 0 if mean is None else 1)
        for pair, mean in zip(pairs, MEANS, strict=True)
    ]
    write_margins(Path("mine"), margins)


def page():
    return report_of([Path("mine")])


def shown(text):
    """The rows whose texts are side by side, in order."""
    return [int(number) for number in re.findall(r"ask (\d)", text)]


def test_rows_that_stay_wrong_are_named_with_what_they_cost(run):
    text = html.unescape(page())
    assert "2 of 6 training pairs were ordered against their label" in text
    # -log σ(0.1 m): 2.127, 1.241; then 0.644 (m = 1), 0.554 (m = 3), 0.049 and 0.018
    assert "the 2 that are wrong or cost most had 73% of the loss" in text
    assert text.index("pairs.jsonl:2<") < text.index("pairs.jsonl:4<")
    assert "45.9%" in text
    assert "26.8%" in text
    assert "1 other had no margin" in text


def test_the_most_suspicious_are_side_by_side_with_their_texts_escaped(run):
    text = page()
    assert shown(text) == [2, 4, 3, 1, 5, 6]
    assert "88% against its label" in text
    assert "&lt;i&gt;good 2" in text
    assert "<b>ask" not in text


def test_texts_that_are_not_there_any_more_are_said(run):
    lines = Path("pairs.jsonl").read_text().splitlines()
    lines[1] = lines[1].replace("good", "better")
    Path("pairs.jsonl").write_text("".join(line + "\n" for line in lines))
    text = page()
    assert shown(text) == [4, 3, 1, 5, 6]
    assert "The texts of 1 pair are not shown" in text
    Path("pairs.jsonl").unlink()
    assert shown(page()) == []
    assert "The texts of 6 pairs are not shown" in page()


def test_a_pair_that_has_moved_is_shown_where_it_is(run):
    Path("pairs.jsonl").write_text("\n" + Path("pairs.jsonl").read_text())
    assert "pairs.jsonl:3 · 88% against its label" in page()


def test_a_run_without_margins_says_nothing(run):
    Path("mine/pair-margins.json").unlink()
    assert "disagree" not in page()
