"""Pairs that disagree with an adapter, looked through one at a time: what the handlers do, without a browser."""

from __future__ import annotations

import json
import shutil

import pytest

pytest.importorskip("gradio")
import gradio

from lora_dpo import read_pairs
from lora_dpo.adapters.stored_margins import PairMargin, write_margins
from lora_dpo.data.pairs import pair_mark
from lora_dpo.demo import look_through
from lora_dpo.demo.session import AppState
from lora_dpo.serving.host import open_host

MEANS = [3.0, -2.0, 1.0, -9.0, 0.5, 2.0]


@pytest.fixture(scope="module")
def host(tiny_model_folder, tiny_adapter, tmp_path_factory):
    place = tmp_path_factory.mktemp("look")
    shutil.copytree(tiny_adapter, place / "adapters/mine")
    with open_host(str(tiny_model_folder), place / "adapters", quantize="none") as host:
        yield host


@pytest.fixture
def app_state(host, tmp_path, write_pairs):
    """Six pairs in a file `six`, which the adapter's run knows: it orders lines 4 and 2 the other way round."""
    app_state = AppState(host, tmp_path / "collected", scratch=tmp_path / "scratch")
    app_state.pairs.take_in(write_pairs("six.jsonl", count=6), "six.jsonl")
    pairs, _ = read_pairs(str(app_state.pairs.path_of("six")))
    rows = [PairMargin(one.origin, pair_mark(one), 0.5, mean, mean, 1) for one, mean in zip(pairs, MEANS, strict=True)]
    write_margins(app_state.adapters_dir / "mine", rows)
    return app_state


class Page:
    """The fold's values, which its handlers change."""

    def __init__(self, app_state):
        with gradio.Blocks(), gradio.Tabs(), gradio.Tab(id="data") as item:
            self.name = gradio.Dropdown(app_state.pairs.names(), value="six")
            self.parts = look_through.build(app_state, item, self.name)
        self.fold = look_through.LookThrough(app_state, self.parts, self.name)
        self.values = {}

    def takes(self, update):
        for part, value in update.items():
            hidden = isinstance(value, dict) and value.get("__type__") == "update"
            self.values[part] = value if not hidden else value.get("value", value.get("visible"))

    def __getitem__(self, name):
        return self.values[getattr(self.parts, name)]

    def press(self, *verdicts):
        for verdict in verdicts:
            handler = self.fold.undo if verdict == "undo" else self.fold.deciding(verdict)
            self.takes(handler(self["review"]))


@pytest.fixture
def page(app_state):
    page = Page(app_state)
    page.takes(page.fold.find("six", "mine"))
    return page


def test_the_most_suspicious_pair_is_shown_first_with_its_margins(page):
    assert "mine orders 2 of 6 pairs the other way round, by the margins that its run kept." in page["said"]
    assert "Pair 1 of 2" in page["said"]
    assert "line 4 · 71% against its label · margin +0.5 nats before it was learnt from, -9.0 after" in page["card"]
    assert "Say 4 words about" in page["card"]
    assert (page["decide"], page["undo"], page["write"]) == (True, False, False)


def test_decisions_go_from_pair_to_pair_and_can_be_taken_back(page):
    page.press("swap")
    assert "Pair 2 of 2; 0 kept, 1 swapped, 0 dropped." in page["said"]
    assert "line 2 ·" in page["card"]
    assert (page["undo"], page["write"]) == (True, True)
    page.press("undo")
    assert "line 4 ·" in page["card"]
    assert page["undo"] is False
    page.press("keep", "drop")
    assert "All 2 are looked through: 1 kept, 0 swapped, 1 dropped." in page["said"]
    assert page["decide"] is False
    assert page["card"] == ""


def test_what_was_decided_is_a_new_file_and_the_old_one_is_as_it_was(page, app_state):
    path = app_state.pairs.path_of("six")
    before, text = read_pairs(str(path))[0], path.read_text()
    page.press("swap", "drop")
    page.takes(page.fold.write(page["review"]))
    assert page.values[page.name] == "six-looked-through"
    assert path.read_text() == text
    rows = [json.loads(line) for line in app_state.pairs.path_of("six-looked-through").read_text().splitlines()]
    after, _ = read_pairs(str(app_state.pairs.path_of("six-looked-through")))
    assert [pair.prompt for pair in after] == [before[n - 1].prompt for n in (1, 3, 4, 5, 6)]
    assert (after[2].chosen, after[2].rejected) == (before[3].rejected, before[3].chosen)
    assert after[1].chosen == before[2].chosen
    assert [bool(row["origin"].get("swapped")) for row in rows] == [False, False, True, False, False]


def test_scores_of_a_swapped_pair_go_since_they_say_the_old_label(page, app_state, tmp_path):
    rows = [
        {"prompt": f"{n}", "chosen": "yes", "rejected": "no", "chosen_score": 2, "rejected_score": 1} for n in range(3)
    ]
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = app_state.pairs.take_in(tmp_path / "scored.jsonl", "scored.jsonl").name
    entries = app_state.pairs.entries(name)
    new = app_state.pairs.looked_through(name, [(entries[1].pair, "swap")])
    found = [entry.pair for entry in app_state.pairs.entries(new)]
    assert [pair.gap for pair in found] == [1.0, None, 1.0]
    assert found[1].chosen[0]["content"] == "no"


def test_a_pair_that_was_changed_meanwhile_is_said_and_nothing_is_written(page, app_state):
    page.press("drop")
    entry = app_state.pairs.entries("six")[3]
    app_state.pairs.change("six", entry, prompt="Another?", chosen="a", rejected="b")
    with pytest.raises(gradio.Error, match="changed or removed meanwhile"):
        page.fold.write(page["review"])
    assert app_state.pairs.names() == ["six"]


def test_pairs_that_the_run_does_not_know_are_scored_on_the_base_in_memory(page, app_state, write_pairs, loads):
    app_state.pairs.take_in(write_pairs("other.jsonl", count=3, first=40), "other.jsonl")
    page.takes(page.fold.find("other", "mine"))
    assert "of 3 pairs the other way round, each scored now." in page["said"]
    assert loads == []


def test_too_many_of_them_are_for_the_command_line(page, app_state, write_pairs, monkeypatch):
    monkeypatch.setattr(look_through, "MOST_SCORED", 2)
    app_state.pairs.take_in(write_pairs("other.jsonl", count=3, first=40), "other.jsonl")
    page.takes(page.fold.find("other", "mine"))
    assert "at most 2 are scored here" in page["said"]
    assert page["decide"] is False


@pytest.mark.parametrize(("which", "adapter", "said"), [(None, "mine", "no pairs yet"), ("six", "x", "no adapter x"),
                                                       ("nobody", "mine", "no pairs called nobody")])  # fmt: skip
def test_what_is_not_there_is_a_red_line(page, which, adapter, said):
    page.takes(page.fold.find(which, adapter))
    assert said in page["said"]
    assert 'class="note bad"' in page["said"]
    assert page["review"] is None
