"""What the tabs' handlers do, without a browser: each is given the values of the page's parts, and returns new ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("gradio")
import gradio

from lora_dpo.data.prompts import Prompt
from lora_dpo.demo import column_pickers, tab_adapters, tab_data, tab_train, tab_vote
from lora_dpo.demo.run_state import RunSnapshot
from lora_dpo.demo.session import AppState
from lora_dpo.demo.starters import STARTERS
from lora_dpo.errors import Busy
from lora_dpo.serving.host import open_host

REQUEST = None


@pytest.fixture(scope="module")
def host(tiny_model_folder, tiny_adapter, tmp_path_factory):
    place = tmp_path_factory.mktemp("tabs")
    shutil.copytree(tiny_adapter, place / "adapters/first")
    with open_host(str(tiny_model_folder), place / "adapters", quantize="none") as host:
        yield host


@pytest.fixture
def app_state(host, tmp_path):
    return AppState(host, tmp_path / "collected", scratch=tmp_path / "scratch")


class Page:
    """A page of one tab: its values, which handlers change."""

    def __init__(self, parts, values):
        self.parts, self.values = parts, values

    def __getitem__(self, name):
        return self.values[getattr(self.parts, name)]

    def set(self, **values):
        self.values |= {getattr(self.parts, name): value for name, value in values.items()}

    def takes(self, update):
        """What a handler returned: whole values, and changes of parts that have one."""
        for part, value in update.items():
            if not isinstance(value, dict) or value.get("__type__") != "update":
                self.values[part] = value
            elif "value" in value:
                self.values[part] = value["value"]
            elif "interactive" in value:
                self.values[part] = value["interactive"]

    def run(self, handler):
        for update in handler(dict(self.values), REQUEST):
            self.takes(update)


# --- Vote -----------------------------------------------------------------------------------------


@pytest.fixture
def vote(app_state):
    with gradio.Blocks(), gradio.Tabs() as tabs, gradio.Tab(id="vote") as item:
        parts = tab_vote.build(app_state, item, tabs, gradio.Button())
    page = Page(parts, dict.fromkeys(parts.outputs, ""))
    page.set(players=["base", "first"], temperature=0.0, longest=8, match="", queue=[])
    page.tab = tab_vote.Tab(app_state, parts)
    page.ready = lambda: page.values[parts.buttons["a"]]
    return page


def test_ours_are_asked_one_after_the_other_and_voted_ones_are_not_offered_again(vote, app_state):
    vote.run(vote.tab.take_ours)
    assert STARTERS[0] in vote["asked"]
    assert "19 more prompts after this one" in vote["asked"]
    assert vote.ready() is True
    vote.run(vote.tab.cast("a"))
    assert "Saved: 1 pair to train on" in vote["status"]
    assert STARTERS[1] in vote["asked"]
    vote.set(match="", queue=[])  # a reload
    vote.run(vote.tab.take_ours)
    assert STARTERS[1] in vote["asked"]
    assert len(vote["queue"]) == 18


def test_ours_that_wait_or_are_shown_are_not_taken_twice(vote):
    vote.run(vote.tab.take_ours)
    before = vote["match"]
    vote.run(vote.tab.take_ours)
    assert (vote["match"], len(vote["queue"])) == (before, 19)
    assert "0 prompts of ours. Vote on these two first" in vote["status"]


def test_a_match_without_its_vote_is_never_replaced(vote, app_state, tmp_path):
    vote.set(box="Say one.")
    vote.run(vote.tab.ask)
    match = vote["match"]
    vote.set(box="Say two.")
    vote.run(vote.tab.ask)
    (tmp_path / "more.txt").write_text("Say three.\n")
    vote.set(load=str(tmp_path / "more.txt"))
    vote.run(vote.tab.bring)
    vote.run(vote.tab.go_on)  # its key does nothing either
    assert vote["match"] == match
    assert "Say one." in vote["asked"]
    assert "2 more prompts" in vote["asked"]
    assert [prompt.text for prompt in vote["queue"]] == ["Say two.", "Say three."]
    vote.run(vote.tab.cast("skip"))
    assert "Say two." in vote["asked"]
    assert app_state.pairs.book.count() == (0, 1)


def test_after_the_last_vote_the_next_prompt_is_one_key_away(vote):
    vote.set(box="Say one.")
    vote.run(vote.tab.ask)
    vote.run(vote.tab.cast("b"))
    assert vote["match"] == ""
    assert vote["go_on"] == f"Ask next: {STARTERS[0]}"
    vote.run(vote.tab.go_on)
    assert STARTERS[0] in vote["asked"]
    assert vote.ready() is True


def test_a_refused_import_is_one_red_line_and_the_match_stays(vote, tmp_path):
    vote.run(vote.tab.take_ours)
    match = vote["match"]
    (tmp_path / "x.exe").write_text("x")
    vote.set(load=str(tmp_path / "x.exe"))
    vote.run(vote.tab.bring)
    assert vote["refused"].startswith('<p class="note bad">x.exe is no file of a known kind')
    assert vote["match"] == match


def test_a_busy_host_leaves_the_prompts_that_wait(vote, app_state, monkeypatch):
    vote.set(queue=[Prompt(({"role": "user", "content": "Say it."},), "p.txt", 1)])

    def busy(*args, **kwargs):
        raise Busy("32 requests are waiting already.")

    with monkeypatch.context() as full:
        full.setattr(app_state.host, "submit", busy)
        with pytest.raises(gradio.Error, match="32 requests"):
            vote.run(vote.tab.go_on)
    assert (vote["match"], vote["go_on"], len(vote["queue"])) == ("", "Go on with 1 prompt", 1)
    vote.run(vote.tab.go_on)
    assert "Say it." in vote["asked"]
    assert vote.ready() is True


def test_a_typed_prompt_that_is_refused_comes_back_into_its_box(vote):
    vote.set(box="x" * 9000)
    with pytest.raises(gradio.Error, match="The prompt has"):
        vote.run(vote.tab.ask)
    assert vote["box"] == "x" * 9000
    assert vote["match"] == ""


def test_an_answer_that_was_cut_is_marked_and_its_vote_says_so(vote, app_state):
    vote.set(box="Say it.", longest=3)
    vote.run(vote.tab.ask)
    assert vote["cards"].count("cut: not at its end") == 2
    vote.run(vote.tab.cast("a"))
    (row,) = app_state.pairs.book.rows()
    assert row["origin"]["chosen"]["cut"] is row["origin"]["rejected"]["cut"] is True


# --- Train ----------------------------------------------------------------------------------------


@pytest.fixture
def train(app_state, tmp_path, monkeypatch):
    rows = [{"prompt": f"Say {n}.", "chosen": f"{n}.", "rejected": "No, never."} for n in range(30)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))
    for name in ("mine", "few"):
        app_state.pairs.take_in(tmp_path / f"{name}.jsonl", f"{name}.jsonl")
    with gradio.Blocks(), gradio.Tabs(), gradio.Tab() as item:
        parts = tab_train.build(app_state, item)
    page = Page(parts, dict.fromkeys(parts.followed, ""))
    page.set(sources=["mine"], preset="quick", name="new", recipe="", filled="", prompts="", refused="", seen=None)
    page.values |= dict.fromkeys(parts.coming, "")
    page.tab = tab_train.Tab(app_state, parts)
    page.began = []
    job = SimpleNamespace(running=True, state="running", name="new", error="", ended=None)

    def start(recipe, name, prompts, *, planned):
        page.began.append((recipe, name, prompts, planned))
        watch = SimpleNamespace(seen=RunSnapshot(name))
        app_state.training = SimpleNamespace(began=0.0, job=job, beta=0.1, watch=watch, planned=planned)

    monkeypatch.setattr(app_state, "start_training", start)
    return page


def come(page, update):
    """What a choice brings is put in, as the browser does it (`FILL_IN`)."""
    page.takes(update)
    since, coming, put = page.parts.coming
    if page["recipe"] in (page.values[since], page.values[put]):
        page.values[page.parts.recipe] = page.values[put] = page.values[coming]


def begin(page):
    for update in page.tab.begin(dict(page.values)):
        page.takes(update)


def test_what_to_expect_is_said_before_the_click(train):
    come(train, train.tab.look(dict(train.values)))
    assert "23 pairs to learn from." in train["expected"]
    assert "accuracy and margin on 7 held-out pairs, and 7 answers" in train["expected"]
    assert "max_steps: 12" in train["recipe"]
    assert train.tab.expect(dict(train.values)).count("for 12 steps, and the measuring on top. It fits") == 1
    train.set(sources=["few"])
    come(train, train.tab.choose(dict(train.values)))
    assert "5 pairs to learn from. Below 20 the difference is small." in train["expected"]
    assert "5 of 12 different prompts before anything can be measured" in train["expected"]
    assert "max_steps: 3" in train["recipe"]
    assert "on top" not in train.tab.expect(dict(train.values))  # nothing is measured
    train.set(sources=[])
    assert "vote on a few answers first" in train.tab.expect(dict(train.values))


def test_start_works_at_once_and_shows_the_plan(train):
    begin(train)
    ((recipe, name, _, planned),) = train.began
    assert (recipe.trainer["max_steps"], name) == (12, "new")
    assert planned > 0
    assert "The plan" in train["planned"]
    assert train["start"] is False


def test_settings_that_were_changed_by_hand_are_what_is_trained_also_after_a_look_at_the_plan(train):
    come(train, train.tab.look(dict(train.values)))
    train.set(recipe=train["recipe"].replace("max_steps: 12", "max_steps: 7"))
    train.takes(train.tab.show_plan(dict(train.values)))
    assert "7 of 4 pairs" in train["planned"]
    come(train, train.tab.look(dict(train.values)))  # another tab, and back
    begin(train)
    assert train.began[0][0].trainer["max_steps"] == 7


def test_settings_that_are_typed_while_others_come_stay(train):
    come(train, train.tab.look(dict(train.values)))
    train.set(preset="balanced")
    asked = dict(train.values)
    train.set(recipe=train["recipe"].replace("max_steps: 12", "max_steps: 7"))
    come(train, train.tab.choose(asked))
    assert "max_steps: 7" in train["recipe"]
    begin(train)
    assert train.began[0][0].trainer["max_steps"] == 7


def test_of_two_choices_the_second_is_put_in(train):
    train.set(sources=["few"])
    first = dict(train.values)
    train.set(sources=["mine"])
    second = dict(train.values)
    come(train, train.tab.choose(first))
    come(train, train.tab.choose(second))
    assert "max_steps: 12" in train["recipe"]


def test_settings_that_were_not_changed_follow_the_pairs(train, app_state):
    train.set(sources=["few"])
    come(train, train.tab.look(dict(train.values)))
    assert "max_steps: 3" in train["recipe"]
    app_state.pairs.delete("few", app_state.pairs.entries("few")[:3])
    begin(train)
    assert train.began[0][0].trainer["max_steps"] == 1


def test_a_run_that_does_not_fit_is_begun_when_it_is_asked_for_once_more(train, monkeypatch):
    from dataclasses import replace

    real = tab_train.plan

    def tight(recipe):
        planned = real(recipe)
        return replace(planned, memory=replace(planned.memory, fits=False))

    monkeypatch.setattr(tab_train, "plan", tight)
    begin(train)
    assert train.began == []
    assert "It does not fit into" in train["planned"]
    assert train["start"] is True
    begin(train)
    assert len(train.began) == 1


def test_a_refused_run_leaves_the_button(train):
    train.set(name="../mine")
    with pytest.raises(gradio.Error, match="is no name for an adapter"):
        begin(train)
    assert train["start"] is True
    assert train.began == []


def test_whatever_goes_wrong_the_button_is_there_again(train, monkeypatch):
    def broken(recipe):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(tab_train, "plan", broken)
    with pytest.raises(ZeroDivisionError):
        begin(train)
    assert train["start"] is True


def test_a_plan_that_is_on_its_way_writes_over_nothing(train):
    come(train, train.tab.look(dict(train.values)))
    for update in (train.tab.show_plan(dict(train.values)), *train.tab.begin(dict(train.values))):
        assert not {train.parts.recipe, train.parts.filled, *train.parts.coming} & set(update)


def find(page):
    for update in page.tab.find(dict(page.values)):
        page.takes(update)


@pytest.fixture
def searched(train, app_state, monkeypatch):
    """Searches that were begun, in the place of any."""
    began = []

    def start(recipe, name, minutes):
        began.append((recipe, name, minutes))
        app_state.start_training(recipe, name, [], planned=None)

    monkeypatch.setattr(app_state, "start_search", start)
    train.set(minutes=7)
    return began


def test_the_settings_of_the_page_are_the_first_candidate_of_a_search(train, searched):
    come(train, train.tab.look(dict(train.values)))
    train.set(recipe=train["recipe"].replace("max_steps: 12", "max_steps: 9"))
    find(train)
    ((recipe, name, minutes),) = searched
    assert (recipe.trainer["max_steps"], name, minutes) == (9, "new", 7)
    assert recipe.data.eval is None
    rows = [line for path in recipe.data.train for line in Path(path).read_text().splitlines()]
    assert len(rows) == 30, "also those that a run would hold out: a search divides them itself"
    assert "The plan of the first candidate" in train["planned"]
    assert (train["start"], train["find"]) == (False, False)


def test_an_emptied_field_of_minutes_is_the_offered_time(train, searched):
    train.set(minutes=None)
    find(train)
    assert searched[0][2] == 20


def test_too_few_prompts_to_choose_by_are_said_and_the_buttons_are_there_again(train, searched):
    train.set(sources=["few"])
    with pytest.raises(gradio.Error, match="takes 24 different prompts, and these pairs have 5"):
        find(train)
    assert searched == []
    assert (train["start"], train["find"]) == (True, True)


# --- Data -----------------------------------------------------------------------------------------


def test_a_refused_upload_changes_its_red_line_alone_and_names_no_folder(app_state, tmp_path):
    with gradio.Blocks():
        refused, columns = gradio.HTML(), column_pickers.build()
    tab = tab_data.Tab(app_state, refused, columns)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"')
    update = tab.bring(str(tmp_path / "bad.jsonl"))
    assert list(update) == [refused]
    assert update[refused].startswith('<p class="note bad">bad.jsonl holds no usable pair')
    assert str(tmp_path) not in update[refused]


# --- Adapters -------------------------------------------------------------------------------------


def test_reports_and_cards_name_no_folder_of_the_machine_and_leave_what_a_model_said(app_state, tmp_path):
    from lora_dpo.adapters.passport import read_passport

    folder = app_state.adapters_dir / "first"
    base = read_passport(folder).base
    assert base.startswith("/")
    said = f"Look into /etc/hosts/here, not into {base}."
    (folder / "README.md").write_text(f"# first\n\n{said}\n")
    with gradio.Blocks() as page:
        parts = tab_adapters.build(app_state, page)
    tab = tab_adapters.Tab(app_state, parts)
    report = tab.report("first")
    assert base not in report
    assert f"…/{base.rpartition('/')[2]}" in report
    assert 'sandbox=""' in report
    shown = tab.show("first")
    assert shown[parts.card] == f"# first\n\nLook into /etc/hosts/here, not into …/{base.rpartition('/')[2]}.\n"
    assert str(app_state.adapters_dir) not in shown[parts.passport]


def test_a_refused_package_and_an_adapter_of_another_base_are_red_lines(app_state, tmp_path):
    with gradio.Blocks() as page:
        parts = tab_adapters.build(app_state, page)
    tab = tab_adapters.Tab(app_state, parts)
    (tmp_path / "x.zip").write_bytes(b"no zip")
    update = tab.bring(str(tmp_path / "x.zip"))
    assert list(update) == [parts.refused]
    assert update[parts.refused].startswith('<p class="note bad">…/x.zip is no whole zip file')
    assert tab.verify("none")[parts.status].startswith('<p class="note bad">There is no adapter none here.')


def test_a_passport_that_says_anything_stops_no_page(app_state):
    from lora_dpo.demo.about import who_line

    folder = app_state.adapters_dir / "first"
    kept = (folder / "passport.json").read_text()
    for pairs, accuracy in ((10**400, 10**400), ("many", float("nan")), (None, [])):
        passport = json.loads(kept)
        passport["data"] = {"train": {"pairs": pairs}}
        passport["metrics"] = {"after": {"pairs": {"accuracy": accuracy, "pairs": pairs}}}
        (folder / "passport.json").write_text(json.dumps(passport))
        assert "<b>first</b> an adapter" in who_line(app_state, "first", public=False)
    (folder / "passport.json").write_text(kept)
    assert "learnt from 4 pairs" in who_line(app_state, "first", public=False)
    assert "75% of 4 held-out pairs" in who_line(app_state, "first", public=False)
    assert "4 pairs" not in who_line(app_state, "first", public=True)  # a stranger is told no more than what it is


def test_a_second_press_of_pause_lets_no_run_go_on():
    done = []
    job = SimpleNamespace(running=True, pause=lambda: done.append("paused"), resume=lambda: done.append("goes on"))
    app_state = SimpleNamespace(training=SimpleNamespace(job=job))
    said = [tab_train.press_pause(app_state, said) for said in ("Pause", "Pause", "Continue")]
    assert said == ["Continue", "Continue", "Pause"]
    assert done == ["paused", "paused", "goes on"]
