"""Messages of the page name no folder of this machine."""

from pathlib import Path

import pytest

from lora_dpo.demo.machine_paths import without_paths


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A current folder, a home and a place for uploads whose names have spaces."""
    found = {name: tmp_path / f"{name} of me" for name in ("here", "home", "uploads")}
    for folder in found.values():
        folder.mkdir()
    monkeypatch.chdir(found["here"])
    monkeypatch.setenv("HOME", str(found["home"]))
    monkeypatch.setenv("USERPROFILE", str(found["home"]))
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(found["uploads"]))
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/tmp")
    return found


def test_known_folders_are_left_out(places):
    here, home, uploads = places["here"], places["home"], places["uploads"]
    hashed = "0123456789abcdef" * 4
    for text, shown in {
        f"{here}/collected/votes.jsonl: line 3 is no row.": "collected/votes.jsonl: line 3 is no row.",
        f"Written: {here}/collected/exports/mine.": "Written: collected/exports/mine.",
        f"{uploads}/{hashed}/my pairs.csv holds no usable pair": "my pairs.csv holds no usable pair",
        f"There is no folder {here}.": "There is no folder the current folder.",
        f"{home}/models/my-3b is no model folder": "…/my-3b is no model folder",
    }.items():
        assert without_paths(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("The file /data/secret/adapters/mine/passport.json: base is 3", "The file …/passport.json: base is 3"),
        ("The log is in '/var/log/x/y.log'.", "The log is in '…/y.log'."),
        (r"C:\Users\Ann\models\tiny is no model folder", "…/tiny is no model folder"),
        ("It is in ~/models/tiny (or /opt/models/tiny).", "It is in …/tiny (or …/tiny)."),
        ("Could not read /a/b/c.json, /a/b/d.json.", "Could not read …/c.json, …/d.json."),
    ],
)
def test_of_other_places_the_name_is_left(places, text, shown):
    assert without_paths(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "adapters/mine/passport.json: base is 3",
        "Use a recipe file, and/or lora-dpo train; 3/4 of it, 1.5 tokens/s.",
        "http://127.0.0.1:7860/gradio_api/call/vote",
        "HuggingFaceTB/SmolLM2-135M-Instruct could not be loaded",
        "Commands: /base /adapter /reset",
        "../other/adapters is here",
    ],
)
def test_what_is_no_path_of_this_machine_stays(places, text):
    assert without_paths(text) == text


def test_a_program_that_runs_in_the_root_keeps_its_slashes(monkeypatch):
    monkeypatch.chdir(Path("/"))
    assert without_paths("3/4 and adapters/mine") == "3/4 and adapters/mine"
