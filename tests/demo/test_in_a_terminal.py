"""What the page shows to copy does the same in a terminal."""

from __future__ import annotations

import shlex
import shutil

import pytest
import typer

from lora_dpo.cli.commands import app
from lora_dpo.config.reading import read_recipe
from lora_dpo.config.recipe import ModelSection
from lora_dpo.demo.about import way
from lora_dpo.demo.in_a_terminal import chat_command, train_recipe, typed, vote_commands
from lora_dpo.demo.session import AppState
from lora_dpo.demo.starters import EXAMPLES, STARTERS, starters
from lora_dpo.demo.votes import ShownAnswer
from lora_dpo.model.decoding import Sampling
from lora_dpo.serving.host import open_host
from lora_dpo.training.drafting.presets import draft

LIVELY = Sampling(max_new_tokens=64, temperature=0.7, top_p=0.95, seed=3)


@pytest.fixture
def app_state(tiny_model_folder, tiny_adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_adapter, "adapters/first")
    found = AppState(open_host(str(tiny_model_folder), "adapters", quantize="none"), tmp_path / "collected")
    yield found
    found.close()


def parsed(line):
    """The command and what its options are, as the command line reads them. Raises for one that does not exist."""
    program, name, *words = shlex.split(line)
    assert program == "lora-dpo"
    command = typer.main.get_command(app)
    while getattr(command, "commands", None):
        command = command.commands[name]
        if getattr(command, "commands", None):
            name, *words = words
    return command.name, command.make_context(name, words).params


def test_a_chat_is_one_command_with_the_pages_settings(app_state):
    line = chat_command(app_state, ["base", "first"], LIVELY, "Be 'brief'.")
    name, options = parsed(line)
    assert name == "chat"
    assert (str(options["adapter"]), options["compare"], options["system"]) == ("adapters/first", True, "Be 'brief'.")
    assert (options["temperature"], options["max_new_tokens"], options["seed"]) == (0.7, 64, 3)
    assert options["model"] is None  # the passport names it
    assert parsed(chat_command(app_state, ["first"], LIVELY, ""))[1]["compare"] is False


def test_what_a_terminal_does_otherwise_is_said(app_state):
    line, note = chat_command(app_state, ["base"], LIVELY, "").splitlines()
    assert str(parsed(line)[1]["adapter"]) == "adapters/first"
    assert "/base" in note
    other = Sampling(max_new_tokens=64, temperature=0.7, top_p=0.5, seed=3)
    assert chat_command(app_state, ["first"], other, "").splitlines()[1] == "# top-p is 0.95 there"
    shutil.rmtree("adapters/first")
    assert chat_command(app_state, ["base"], LIVELY, "").startswith("# lora-dpo chat talks with an adapter")


def test_the_votes_are_checked_and_trained_on_where_they_lie(app_state):
    place, check, train = vote_commands(app_state).splitlines()
    assert place == "# the votes are in collected/votes.jsonl"
    assert parsed(check)[0] == "check"
    assert "collected/votes.jsonl" in train


def test_a_recipe_that_is_copied_trains_the_same_under_a_name_of_its_own(
    write_pairs, tmp_path, tiny_model_folder, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    model = ModelSection(name=str(tiny_model_folder), quantize="none", dtype="float32")
    output, folder = tmp_path / "adapters/mine", tmp_path / "runs"
    made = draft(model, [write_pairs(count=20)], "quick", output=output, folder=folder).recipe
    text = train_recipe(made, "my adapter")
    assert text.splitlines()[0] == "# save this as 'my adapter.yaml', then:  lora-dpo train 'my adapter.yaml'"
    (tmp_path / "my adapter.yaml").write_text(text)
    assert read_recipe("my adapter.yaml") == made.model_copy(update={"output": None})


def test_paths_are_as_one_types_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert typed(tmp_path / "a b/votes.jsonl") == "'a b/votes.jsonl'"
    assert typed(tmp_path.parent / "x.jsonl") == str(tmp_path.parent / "x.jsonl")


def test_ours_are_twenty_that_are_in_no_file_of_the_quickstart():
    from pathlib import Path

    data = Path(__file__).resolve().parents[2] / "data"
    known = "".join(path.read_text("utf-8") for path in data.glob("quickstart*"))
    assert len(set(STARTERS)) == 20
    assert [text for text in STARTERS if text in known] == []
    trained = (data / "quickstart.jsonl").read_text("utf-8")
    assert [text for text in EXAMPLES if f'"{text}"' in trained] == []


def test_what_has_a_vote_is_not_asked_again(app_state):
    book = app_state.pairs.book
    sides = ShownAnswer("A.", "base", {}), ShownAnswer("B.", "first", {})
    for number, verdict in ((0, "a"), (3, "skip")):
        book.add([{"role": "user", "content": STARTERS[number]}], *sides, verdict, vote_id=str(number))
    assert [prompt.row for prompt in starters(book)] == [2, 3, *range(5, 21)]


def test_the_way_leads_to_tabs_that_are_there():
    assert way(public=False).count("data-tab=") == 4
    assert {"Train"} & {part.partition('"')[0] for part in way(public=False).split('data-tab="')}
    assert "Train" not in way(public=True)
