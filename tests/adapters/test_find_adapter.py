"""One way to name an adapter, for every command and for the recipe: by its name, or by its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_dpo.adapters.store import adapter_names, find_adapter, list_adapters, removable
from lora_dpo.config.recipe import Recipe
from lora_dpo.errors import AdapterError
from lora_dpo.training.prepare import with_reference


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def adapter(folder):
    folder = Path(folder)
    folder.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text("{}")
    return folder


def test_a_name_and_a_path_mean_the_same_folder():
    folder = adapter("adapters/brief")
    assert find_adapter("brief") == folder
    assert find_adapter("adapters/brief") == folder
    assert find_adapter(folder.absolute()) == folder.absolute()
    assert find_adapter(str(folder) + "/") == folder


def test_a_folder_here_of_that_name_is_meant_if_it_is_an_adapter():
    adapter("adapters/brief")
    Path("brief").mkdir()  # such as its data
    assert find_adapter("brief") == Path("adapters/brief")
    adapter("mine")
    assert find_adapter("mine") == Path("mine")


def test_what_is_no_adapter_is_said_to_be_none():
    Path("brief").mkdir()
    with pytest.raises(AdapterError, match=r"brief is no adapter: there is no adapter_config\.json in it"):
        find_adapter("brief")


def test_a_mistyped_name_is_answered_with_the_nearest():
    adapter("adapters/brief")
    with pytest.raises(AdapterError, match=r"There is no adapter breif\. Did you mean brief\?"):
        find_adapter("breif")


def test_where_there_are_no_adapters_it_is_said_how_to_make_one():
    with pytest.raises(
        AdapterError, match=r"There is no adapter folder at adapters/x\. Train one with: lora-dpo train"
    ):
        find_adapter("x")


def test_the_variable_moves_names_and_the_projects_paths(tmp_path, monkeypatch):
    folder = adapter(tmp_path / "home" / "adapters" / "brief")
    monkeypatch.setenv("LORA_DPO_HOME", str(tmp_path / "home"))
    assert find_adapter("brief") == folder
    assert find_adapter("adapters/brief") == folder
    assert removable("brief") == folder
    assert adapter_names() == ["brief"]
    assert [row.name for row in list_adapters()] == ["brief"]


def test_a_recipe_names_its_reference_as_the_command_line_does():
    adapter("adapters/brief")
    recipe = Recipe.model_validate({"model": {"name": "m"}, "data": {"train": "t"}, "reference": "adapter:brief"})
    found = with_reference(recipe)
    assert found.reference_adapter == Path("adapters/brief")
    assert found.lora.model_fields_set == recipe.lora.model_fields_set == set()  # still as it was not given
    assert with_reference(found) == found
    wrong = recipe.model_copy(update={"reference": "adapter:breif"})
    with pytest.raises(AdapterError, match=r"Did you mean brief\?"):
        with_reference(wrong)
