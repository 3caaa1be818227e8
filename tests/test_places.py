"""Where things lie: beside the user, once a person, or where one variable says; looked up when it is asked for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lora_dpo import places

PACKAGE = Path(places.__file__).parent
PROJECT = ("adapters", "collected", "evaluations", "reports", "runs")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    for name in (places.HOME, places.CACHE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")


def project_places():
    return [getattr(places, name)() for name in PROJECT]


def test_the_projects_places_are_in_the_current_folder_and_the_persons_in_the_cache(tmp_path):
    assert project_places() == [Path(name) for name in PROJECT]
    assert places.model_folder("m") == tmp_path / "me" / ".cache" / "lora-dpo" / "models" / "m"
    assert places.references() == tmp_path / "me" / ".cache" / "lora-dpo" / "references"


def test_one_variable_moves_it_all(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_DPO_HOME", "~/all")
    home = tmp_path / "me" / "all"
    assert project_places() == [home / name for name in PROJECT]
    assert places.model_folder("m") == home / "models" / "m"
    assert places.references() == home / "references"


def test_the_persons_part_can_be_moved_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_DPO_HOME", str(tmp_path / "all"))
    monkeypatch.setenv("LORA_DPO_CACHE", str(tmp_path / "cache"))
    assert places.adapters() == tmp_path / "all" / "adapters"
    assert places.model_folder("m") == tmp_path / "cache" / "models" / "m"
    monkeypatch.delenv("LORA_DPO_CACHE")
    monkeypatch.delenv("LORA_DPO_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert places.references() == tmp_path / "xdg" / "lora-dpo" / "references"


@pytest.mark.parametrize("place", ["models", "../all/models", "../cache/models"])
def test_a_model_is_found_wherever_it_is_and_here_first(place, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_DPO_HOME", str(tmp_path / "all"))
    monkeypatch.setenv("LORA_DPO_CACHE", str(tmp_path / "cache"))
    for folder in ("models", "../all/models", "../cache/models")[::-1]:
        (Path(folder) / "m").mkdir(parents=True)
        (Path(folder) / "m" / "config.json").write_text("{}")
        assert places.model_folder("m").resolve() == (Path(folder) / "m").resolve()
        if folder == place:
            break


def test_a_folder_without_a_model_in_it_does_not_hide_one(tmp_path):
    (Path("models") / "m").mkdir(parents=True)
    assert places.model_folder("m").is_relative_to(tmp_path / "me")


def test_a_user_without_a_home_folder_keeps_models_here_and_no_references(monkeypatch):
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert places.references() is None
    assert places.model_folder("m") == Path("models/m")


def test_nothing_else_in_the_package_names_these_places():
    named = re.compile(rf'Path\("(?:\./)?({"|".join(PROJECT)}|models)["/]')
    found = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if named.search(path.read_text())}
    assert found == {"places.py"}
