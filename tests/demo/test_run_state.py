"""What a run tells, kept for whoever looks; what the page draws; prompts that are answered while it goes on."""

from __future__ import annotations

import hashlib
import os
import time
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lora_dpo.config.reading import check_recipe
from lora_dpo.demo import html
from lora_dpo.demo.run_state import RunSnapshot, RunState, Sample, logratios
from lora_dpo.demo.session import AppState, looks_of
from lora_dpo.demo.train_view import STAGES, state_view, time_left
from lora_dpo.errors import ConfigError
from lora_dpo.evaluation.report import svg
from lora_dpo.events import Answered, Compared, Note, Progress, Resolved, Saved, StepLogged
from lora_dpo.model.base import load_base
from lora_dpo.serving.host import Host
from lora_dpo.training.run import train


def step(number, **metrics):
    return StepLogged(number, 10, {"loss": 0.5, **metrics})


def test_a_watch_keeps_what_was_told_and_counts_versions():
    watch = RunState("mine")
    before = watch.seen
    for event in (
        Resolved((("model", "tiny"),)), Progress("tokenising", 1, 4), step(1), Note("odd", warning=True),
        StepLogged(1, 10, {"eval_loss": 1.0}), Answered((("p", "a", "b"),)), Saved(Path("adapters/mine")),
    ):  # fmt: skip
        watch(event)
    watch.sampled(Sample(0, "p", "text"))
    seen = watch.seen
    assert before.version == 0
    assert before.steps == ()
    assert seen.version == 7  # an evaluation on the way is no training step
    assert (seen.stage, seen.done, seen.total, seen.step, seen.all_steps) == ("tokenising", 1, 4, 1, 10)
    assert seen.steps == ((1, {"loss": 0.5}),)
    assert (seen.resolved, seen.notes[0].text, seen.saved) == ((("model", "tiny"),), "odd", "adapters/mine")
    assert (seen.answered[0][2], seen.samples[0].text) == ("b", "text")
    watch(Compared((("accuracy", "0.5", "1.0"),)))
    assert (watch.seen.compared[0][2], watch.seen.stage) == ("1.0", "saving")  # what a run does next


def at(watch, monkeypatch, moments):
    """Let a run log its steps at these moments; returns what was seen of it."""
    for number, moment in moments.items():
        monkeypatch.setattr(time, "monotonic", lambda moment=moment: moment)
        watch(step(number))
    return watch.seen


def test_time_left_is_at_the_pace_of_the_last_steps(monkeypatch):
    watch = RunState("mine")
    assert at(watch, monkeypatch, {1: 100.0}).seconds_left(105.0) is None
    # Steps of 5, 5, 45 (a pause) and 5 seconds: the pace is 5, and 2 of the next step's are over.
    seen = at(watch, monkeypatch, {2: 105.0, 3: 110.0, 4: 155.0, 5: 160.0})
    assert seen.pace == 5
    assert seen.seconds_left(162.0) == 5 * 5 - 2
    # Slower from then on: of the last eight gaps more than half are 20 seconds.
    assert at(watch, monkeypatch, {number: 160.0 + 20 * (number - 5) for number in range(6, 11)}).pace == 20
    assert watch.seen.seconds_left(261.0) is None  # it was the last step


def test_an_estimate_is_taken_back_when_a_step_takes_far_longer(monkeypatch):
    seen = at(RunState("mine"), monkeypatch, {1: 100.0, 2: 105.0})
    assert seen.seconds_left(106.0) == 5 * 8 - 1
    assert seen.seconds_left(120.0) == 5 * 8 - 5  # it must end some time: not more than a step is taken off
    assert seen.seconds_left(126.0) is None
    assert time_left(seen, 126.0, None) == ["this step takes long: no estimate"]


def test_a_plan_that_was_wrong_is_taken_back(monkeypatch):
    seen = at(RunState("mine"), monkeypatch, {1: 100.0, 2: 110.0})
    assert time_left(seen, 110.0, 90.0) == ["about 80 s left"]  # 100 seconds for all steps: not far from 90
    assert time_left(seen, 110.0, 50.0)[1] == "slower than planned: 2 min for all steps, not 50 s"


def test_a_run_that_goes_on_has_its_past_and_its_own_pace(monkeypatch):
    watch = RunState("mine")
    watch.restore([{"step": 1, "loss": 0.7}, {"step": 2, "eval_loss": 1.0}, {"step": 2, "loss": 0.6}])
    assert [number for number, _ in watch.seen.steps] == [1, 2]
    assert at(watch, monkeypatch, {3: 100.0}).seconds_left(101.0) is None
    assert at(watch, monkeypatch, {4: 110.0}).seconds_left(110.0) == pytest.approx(10 * 6)


def shown(stage="", state="running", now=142.0, notes=(), ended=None, **seen):
    """The line of a run that began at 100."""
    from types import SimpleNamespace

    job = SimpleNamespace(state=state, name="mine", error="The disk of /home/ann/x is full.", ended=ended)
    watch = SimpleNamespace(seen=RunSnapshot("mine", stage=stage, notes=notes, **seen))
    return state_view(SimpleNamespace(job=job, watch=watch, began=100.0, planned=None), now)


@pytest.mark.parametrize(
    ("stage", "phase", "line"),
    [
        ("", "reading the pairs", "getting ready · 0:42 so far"),
        ("tokenising train pairs", "reading the pairs", "reading the pairs: 3 of 7 · 0:42"),
        ("held-out pairs, reference", "measuring before", "measuring the held-out pairs: 3 of 7 · 0:42"),
        ("answers before training", "measuring before", "answering the held-out prompts: 3 of 7"),
        ("answering your prompts", "training", "answering your prompts: 3 of 7"),
        ("training", "training", "step 2 of 7 · 0:42 so far"),
        ("held-out pairs, adapter", "measuring after", "measuring the held-out pairs: 3 of 7"),
        ("answers after training", "measuring after", "answering the held-out prompts: 3 of 7"),
        ("saving", "saving", "saving: 3 of 7"),
        ("something new", "training", "something new: 3 of 7"),
    ],
)
def test_each_stage_of_a_run_is_in_a_phase_with_a_name(stage, phase, line):
    drawn = shown(stage, done=3 if stage else 0, total=7 if stage else 0, step=2, all_steps=7)
    assert f'<li class="now" aria-current=step>{phase}</li>' in drawn
    assert line in drawn


def test_every_stage_that_a_training_tells_of_has_its_name(host, recipe, tmp_path):
    seen = []
    recipe = recipe.model_copy(update={"output": str(tmp_path / "mine")})
    train(recipe, base=host.base, on_event=lambda event: seen.append(getattr(event, "stage", "")))
    assert {"training", "answers after training", "held-out pairs, adapter"} <= set(seen) <= set(STAGES)


def test_an_end_says_how_long_it_took_and_names_no_folder():
    assert "Done after 1:01:05: mine can be chosen" in shown(state="done", ended=100.0 + 3665, now=9999.0)
    assert "The disk of …/x is full." in shown(state="failed")
    assert "paused at step 2 of 7" in shown("training", "paused", step=2, all_steps=7)


def test_rewards_become_log_ratios():
    steps = ((1, {"loss": 0.7, "rewards/chosen": 0.2, "rewards/rejected": -0.3}), (2, {"loss": 0.6}))
    series = logratios(steps, beta=0.1)
    assert series["loss"] == [(1, 0.7), (2, 0.6)]
    assert series["chosen"] == [(1, pytest.approx(2.0))]
    assert series["rejected"] == [(1, pytest.approx(-3.0))]
    assert series["margin"] == []


# --- drawing --------------------------------------------------------------------------------------


def test_a_run_that_has_not_begun_has_its_plots_places():
    root = ElementTree.fromstring(html.curves(RunSnapshot("x", all_steps=10), beta=0.1))
    assert len(root.findall(".//figure")) == len(root.findall(".//div[@class='empty']")) == 4


def test_a_runs_plots_keep_a_place_for_the_steps_to_come():
    steps = tuple((step, {"loss": 0.7 - step / 100, "rewards/accuracies": step / 5}) for step in range(1, 6))
    figures = ElementTree.fromstring(html.curves(RunSnapshot("x", steps=steps, all_steps=10), beta=0.1)).findall(
        "figure"
    )
    for figure in (figures[0], figures[2]):
        last = figure.find(".//polyline").get("points").split()[-1]
        assert float(last.split(",")[0]) == pytest.approx((svg.LEFT + svg.WIDTH - svg.RIGHT) / 2)  # step 5 of 10
    assert float(last.split(",")[1]) == pytest.approx(svg.TOP)  # an accuracy of 1 is the top


class Tags(HTMLParser):
    """The tags and attributes that a browser would see."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes = set(), []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += [name for name, _ in attributes]


def test_no_text_from_outside_becomes_a_tag():
    from lora_dpo.data.doctor.catalogue import CHECKS
    from lora_dpo.data.doctor.examination import Diagnosis, Finding
    from lora_dpo.data.pairs import Origin
    from lora_dpo.demo.votes import HeadToHead

    evil = "<img src=x onerror=alert(1)>\"'</div><script>"
    diagnosis = Diagnosis(findings={"equal": Finding(CHECKS["equal"], [Origin(evil, 1)], [(Origin(evil, 1), evil)])})
    diagnosis.report.formats[evil] = 1
    drawn = [
        html.text_block(evil), html.note(evil), html.table((evil,), ((evil,),)), html.facts(((evil, evil),)),
        html.answer_card("A", evil, name=evil), html.win_table([HeadToHead(evil, evil, 1, 0, 0, 0, 0)]),
        html.findings(diagnosis), html.progress_bar(1, 2, evil),
        html.samples_table(RunSnapshot("x", samples=(Sample(0, evil, evil),))),
        svg.lines([svg.Series(evil, (0, 1), (1, 2)), svg.Series(evil, (), ())], title=evil),
    ]  # fmt: skip
    for fragment in drawn:
        assert "onerror" in fragment  # the text is there
        seen = Tags()
        seen.feed(fragment)
        seen.close()
        assert not seen.tags & {"img", "script"}, fragment
        assert not [name for name in seen.attributes if name.startswith("on")], fragment
        assert fragment.count("</div>") == fragment.count("<div")


def test_markdown_keeps_code_and_loses_tags_and_pictures():
    pytest.importorskip("gradio")
    from lora_dpo.demo.handlers import markdown, plain_text

    assert markdown("**b** <b>x</b>") == "**b** &lt;b>x&lt;/b>"
    assert markdown("`<b>` and\n```html\n<b>\n```\n<i>") == "`<b>` and\n```html\n<b>\n```\n&lt;i>"
    assert markdown("is a < b & c > d?") == "is a < b & c > d?"  # as it is: the page copies and edits what it is given
    for text in ("a &lt; b <b>", "AT&T &amp; <!-- x", "`&lt;` ![x](y) &amp;lt;"):
        assert plain_text(markdown(text)) == text
    assert markdown("![x](http://there/p.png)") == "!\\[x](http://there/p.png)"
    assert markdown("```\n<script>") == "```\n<script>"  # still being written


# --- a run that is watched ------------------------------------------------------------------------


@pytest.fixture
def host(tiny_model_folder, tmp_path):
    with Host(load_base(str(tiny_model_folder), quantize="none", dtype="float32"), tmp_path / "adapters") as host:
        yield host


@pytest.fixture
def recipe(recipe_dict):
    return check_recipe(recipe_dict(trainer={"max_steps": 4, "gradient_checkpointing": True}))


def weights(folder):
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_watched_prompts_are_answered_before_during_and_after_and_change_nothing(host, recipe, tmp_path):
    app_state = AppState(host, tmp_path / "collected", scratch=tmp_path / "scratch")
    training = app_state.start_training(recipe, "mine", ["Say it.", " ", "Why?"])
    assert training.job.wait(120)
    assert training.job.error is None
    seen = training.watch.seen
    assert [(sample.step, sample.prompt) for sample in seen.samples] == [
        (number, prompt) for number in (0, 1, 3, 4) for prompt in ("Say it.", "Why?")
    ]
    texts = {sample.step: sample.text for sample in seen.samples if sample.prompt == "Say it."}
    answers = {
        who: host.answer(who, [{"role": "user", "content": "Say it."}], client="x").text.strip() for who in host.names()
    }
    most = recipe.evaluation.max_new_tokens
    assert answers["base"].startswith(texts[0][:most])
    assert answers["mine"].startswith(texts[4][: most - 1])
    assert texts[0] != texts[4]
    # The same run without anyone looking makes the same adapter, to the bit.
    alone = train(recipe.model_copy(update={"output": str(tmp_path / "alone")}))
    assert weights(host.adapters_dir / "mine") == weights(alone.folder)


def test_a_look_sees_the_model_in_eval_mode_and_leaves_each_part_as_it_was():
    from types import SimpleNamespace

    import torch

    from lora_dpo.training.run import _make_look

    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout(0.5)).train()
    model[1].eval()
    seen = []
    look = _make_look(
        lambda step, total, shown: seen.append((step, total, [part.training for part in shown.modules()]))
    )
    state = SimpleNamespace(global_step=2, max_steps=5)
    look.on_step_end(None, state, None, model=model)
    assert seen == [(2, 5, [False, False, False])]
    assert [part.training for part in model.modules()] == [True, True, False]


def test_looks_are_spread_over_the_run():
    assert looks_of(36) == {0, 12, 24, 36}
    assert looks_of(1) == {0, 1}


def test_too_many_prompts_are_refused_before_anything_starts(host, recipe, tmp_path):
    app_state = AppState(host, tmp_path / "collected", scratch=tmp_path / "scratch")
    with pytest.raises(ConfigError, match="4 prompts are to be watched; at most 3"):
        app_state.start_training(recipe, "mine", list("abcd"))
    assert host.job is None


def test_a_training_clears_away_what_no_run_uses_any_more(host, recipe, tmp_path, monkeypatch):
    app_state = AppState(host, tmp_path / "collected", scratch=tmp_path / "scratch")
    runs = app_state.pairs.runs
    runs.mkdir(parents=True)
    (host.adapters_dir / "earlier").mkdir(parents=True)
    (host.adapters_dir / "earlier/recipe.yaml").write_text("data: {train: collected/runs/earlier.train.jsonl}")
    for name in ("this.train.jsonl", "earlier.train.jsonl", "unused.train.jsonl"):
        (runs / name).write_text("{}")
        os.utime(runs / name, (1e9, 1e9))
    monkeypatch.setattr(host, "start_training", lambda *args, **options: None)
    data = recipe.data.model_copy(update={"train": "collected/runs/this.train.jsonl"})
    app_state.start_training(recipe.model_copy(update={"data": data}), "mine")
    assert {path.name for path in runs.iterdir()} == {"this.train.jsonl", "earlier.train.jsonl"}


def test_the_next_free_name(host, tmp_path):
    app_state = AppState(host, tmp_path / "collected", scratch=tmp_path / "scratch")
    assert app_state.free_name() == "mine"
    (host.adapters_dir / "mine.partial").mkdir(parents=True)
    assert app_state.free_name() == "mine-2"
