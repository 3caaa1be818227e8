"""A search for the best settings beside the chat: as it goes, at its end, stopped, and gone on with."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

pytest.importorskip("gradio")
from taught import write_pairs

from lora_dpo.demo import search_view
from lora_dpo.demo.run_state import RunState
from lora_dpo.demo.session import AppState, Training
from lora_dpo.demo.steering import end, trained_last
from lora_dpo.demo.tab_train import drafted
from lora_dpo.errors import Busy, ConfigError
from lora_dpo.events import Answered, Note, Progress, Saved, Tabulated
from lora_dpo.model.decoding import Sampling
from lora_dpo.serving.host import open_host

SETTINGS = """
evaluation: {max_new_tokens: 8, answers: 4}
trainer: {max_steps: 16, warmup_steps: 0, learning_rate: 4.0e-4, loss_type: sigmoid, loss_weights: [1.0]}
"""


@pytest.fixture
def app_state(tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open_host(str(tiny_model_folder), tmp_path / "adapters", quantize="none") as host:
        yield AppState(host, tmp_path / "collected", scratch=tmp_path / "scratch")


@pytest.fixture
def recipe(app_state, tmp_path):
    """The first candidate of a search on pairs that prefer the short answer."""
    app_state.pairs.take_in(write_pairs(tmp_path / "brief.jsonl", range(10, 16)), "brief.jsonl")
    return search_view.first_candidate(drafted(app_state, ["brief"], "quick", "mine", SETTINGS))


def until(condition, seconds=120):
    over = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < over, "it did not come"
        time.sleep(0.02)


def steps_of(training, trial):
    """Steps of a candidate that are done."""
    assert training.job.state != "failed", training.job.error
    return [
        event.done
        for event in training.job.events
        if isinstance(event, Progress) and event.stage == f"trial {trial}: training" and event.done
    ]


def test_beside_the_chat_to_an_adapter_and_its_page(app_state, recipe):
    training = app_state.start_search(recipe, "mine", 0.001)  # of the first candidate alone
    until(lambda: steps_of(training, 0))
    assert app_state.host.answer(
        "base", [{"role": "user", "content": "hi"}], Sampling(max_new_tokens=4), client="a"
    ).prompt_tokens
    assert training.job.running, "an answer comes while it goes on"
    shown = search_view.state_view(training, time.monotonic())
    assert "candidate 0: " in shown
    assert "of at most 0:00" in shown
    assert trained_last(app_state) is None
    with pytest.raises(Busy, match="goes on"):
        app_state.start_training(recipe.model_copy(update={"output": None}), "other")
    assert training.job.wait(120)
    assert training.job.state == "done", training.job.error
    assert training.job.found.verdict == "better"
    shown = search_view.state_view(training, time.monotonic())
    assert "mine can be chosen in every tab" in shown
    assert "of pairs that nothing was chosen by are ranked right (95% interval" in shown
    assert "The recipe as it was given is the best of them" in shown
    told = search_view.outcome_view(training)
    assert "<h4>Candidates</h4>" in told
    assert "<h4>On the reporting part</h4>" in told
    assert told.count('sandbox=""') == 1
    assert "Every candidate" in told
    assert str(app_state.adapters_dir) not in told
    assert str(app_state.host.base.name) not in told
    assert app_state.names() == ["base", "mine"]
    assert trained_last(app_state) == "mine"
    assert app_state.interrupted() == []


def test_stopped_with_what_is_there_stopped_without_and_gone_on_with(app_state, recipe):
    before = app_state.start_search(recipe, "mine", 10)
    until(lambda: steps_of(before, 0))
    assert app_state.interrupted() == [], "it goes on"
    before.job.interrupt()  # as the end of the demo does
    assert before.job.wait(120)
    assert before.job.state == "stopped"
    assert app_state.interrupted() == ["mine"]
    # the files that it reads are kept, whatever runs come after it
    assert recipe.data.train[0].rpartition("/")[2] in (app_state.adapters_dir / "mine.search/search.json").read_text()

    again = app_state.continue_training("mine", minutes=0.001)
    assert again.job.wait(120)
    assert again.job.state == "done", again.job.error
    assert steps_of(again, 0)[0] > 1, "from the checkpoint on"
    assert [trial.number for trial in again.job.found.trials] == [0]
    assert app_state.interrupted() == []

    kept = app_state.start_search(recipe.model_copy(update={"output": None}), "kept", 10)
    until(lambda: steps_of(kept, 0))
    end(app_state, keep=True)
    assert kept.job.wait(120)
    assert kept.job.state == "done", kept.job.error
    (trial,) = kept.job.found.trials
    assert 0 < trial.steps < trial.planned

    gone = app_state.start_search(recipe.model_copy(update={"output": None}), "gone", 10)
    until(lambda: steps_of(gone, 0))
    end(app_state, keep=False)
    assert gone.job.wait(120)
    assert gone.job.state == "stopped"
    assert not list(app_state.adapters_dir.glob("gone*"))
    assert "Nothing was kept" in search_view.state_view(gone, time.monotonic())


def test_a_pause_takes_nothing_from_the_time_that_a_search_has(app_state, recipe, monkeypatch):
    more, monotonic = [0.0], time.monotonic
    monkeypatch.setattr("lora_dpo.serving.training_job.time", SimpleNamespace(monotonic=lambda: monotonic() + more[0]))
    training = app_state.start_search(recipe, "mine", 10)
    until(lambda: steps_of(training, 0))
    training.job.pause()
    until(lambda: training.job.paused_seconds)  # it stands still
    more[0] += 3600  # an hour later
    assert 3600 <= training.job.paused_seconds < 3660
    training.job.resume()
    until(lambda: steps_of(training, 1))  # another candidate has its turn
    assert 3600 <= training.job.paused_seconds < 3660
    end(app_state, keep=True)
    assert training.job.wait(120)
    assert training.job.found.seconds < 600


def test_an_interrupted_search_can_be_discarded(app_state, recipe):
    training = app_state.start_search(recipe, "mine", 10)
    until(lambda: training.watch.seen.stage.startswith("choosing part"))
    training.job.interrupt()
    assert training.job.wait(120)
    assert app_state.interrupted() == ["mine"]
    app_state.discard_training("mine")
    assert app_state.interrupted() == []
    assert not list(app_state.adapters_dir.glob("mine*"))


def test_a_time_that_is_none_is_refused_before_anything_begins(app_state, recipe):
    for minutes in (0, -1, float("nan")):
        with pytest.raises(ConfigError, match="--minutes"):
            app_state.start_search(recipe, "mine", minutes)
    assert app_state.training is None


# --- how it is drawn ------------------------------------------------------------------------------


def drawn(*events, state="running", found=None):
    watch = RunState("mine", 20)
    for event in events:
        watch(event)
    job = SimpleNamespace(
        state=state, name="mine", error="<b>out of memory</b>", ended=None, found=found, paused_seconds=0.0
    )
    return Training(job, watch, 0.1, 0.0)


@pytest.mark.parametrize(
    ("stage", "phase"),
    [
        ("", "measuring the base"),
        ("choosing part: answers, base", "measuring the base"),
        ("choosing part: answers, trial 3", "trying candidates"),
        ("trial 0: training", "trying candidates"),
        ("reporting part: pairs, base", "proving the choice"),
        ("choosing part: answers, chosen", "proving the choice"),
    ],
)
def test_each_stage_is_in_a_phase(stage, phase):
    shown = search_view.state_view(drawn(Progress(stage, 1, 4)), 65.0)
    assert f"aria-current=step>{phase}</li>" in shown
    assert "1:05 of at most 20:00" in shown
    assert "trial" not in shown


def test_the_table_grows_and_another_one_stands_beside_it():
    watch = drawn(
        Tabulated("candidates", (("trial", "score"), ("0", "0.5"))),
        Tabulated("candidates", (("trial", "score"), ("0", "0.5"), ("1", "<b>"))),
        Tabulated("on the reporting part", (("", "base"), ("KL", "0.1"))),
        Answered((("<i>", "a", "b"),)),
    )
    told = search_view.outcome_view(watch)
    assert told.count("<h4>Candidates</h4>") == 1
    assert "&lt;b&gt;" in told
    assert "&lt;i&gt;" in told
    assert "On the reporting part" in told
    assert '<td class="right">0.1</td>' in told, "a number"
    assert "<td>&lt;b&gt;</td>" in told, "words"
    assert [len(table.rows) for table in watch.watch.seen.tables] == [3, 2]


def test_what_found_nothing_says_so_once_and_makes_no_adapter():
    found = SimpleNamespace(adapter=None, reason="Nothing to learn here: 50%.", chosen=None, gain=None)
    training = drawn(Note("The time is used up."), Note(found.reason, warning=True), state="done", found=found)
    shown = search_view.state_view(training, 65.0)
    assert shown.count("Nothing to learn here") == 1
    assert "without an adapter" in shown
    assert "The time is used up." in shown
    assert trained_last(SimpleNamespace(training=training)) is None
    training.watch(Saved("adapters/mine"))
    assert trained_last(SimpleNamespace(training=training)) == "mine"


def test_why_it_failed_is_told_and_escaped():
    shown = search_view.state_view(drawn(state="failed"), 1.0)
    assert "&lt;b&gt;out of memory" in shown
