"""An adapter whose base was a folder finds it again where it is now, by its weights; its name is asked of no hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lora_dpo.adapters.adapter import open_adapter
from lora_dpo.adapters.base_search import base_of
from lora_dpo.adapters.loading import load_base_of
from lora_dpo.errors import AdapterError


@pytest.fixture
def adapter(tiny_adapter, tmp_path, monkeypatch):
    """An adapter in a project, by its passport trained on a folder that is not there: bases/mine."""

    def asked(*where, **how):
        raise AssertionError(f"the hub was asked for {where} {how}")

    for function in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(f"huggingface_hub.{function}", asked)
    folder = tmp_path / "project" / "adapters" / "brief"
    shutil.copytree(tiny_adapter, folder)
    monkeypatch.chdir(tmp_path / "project")
    name_base(folder, "bases/mine")
    return folder


def name_base(folder, name, revision=None):
    passport = json.loads((folder / "passport.json").read_text())
    (folder / "passport.json").write_text(json.dumps({**passport, "base": name, "base_revision": revision}))


def other_weights(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({name: value * 2 for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "place",
    [
        "bases/mine",  # as it was, seen from here
        "adapters/brief/bases/mine",
        "adapters/brief/mine",
        "adapters/mine",
        "../bases/mine",
        "../models/mine",
        "models/mine",
        "models/renamed",
        "../cache/models/mine",
        "../cache/models/renamed",
        "../home/models/renamed",
    ],
)
def test_the_base_is_found_where_it_is_now(place, adapter, tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_DPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LORA_DPO_HOME", str(tmp_path / "home"))
    shutil.copytree(tiny_model_folder, place)
    name, revision = base_of(open_adapter(adapter))
    assert Path(name).resolve() == Path(place).resolve()
    assert revision is None


def test_it_is_found_from_another_folder_too(adapter, tiny_model_folder, tmp_path, monkeypatch):
    shutil.copytree(tiny_model_folder, "bases/mine")
    monkeypatch.chdir(tmp_path)
    base = load_base_of(adapter)
    assert Path(base.name) == tmp_path / "project" / "bases" / "mine"
    assert base.fingerprint == open_adapter(adapter).passport.base_fingerprint


def test_other_weights_of_that_name_are_passed_over(adapter, tiny_model_folder):
    shutil.copytree(tiny_model_folder, "adapters/mine")
    other_weights(Path("adapters/mine"))
    Path("models/mine").mkdir(parents=True)
    Path("models/mine/config.json").write_text("no model at all")
    with pytest.raises(AdapterError, match="was trained on a model folder, bases/mine, which is neither there"):
        base_of(open_adapter(adapter))
    shutil.copytree(tiny_model_folder, "models/right")
    assert Path(base_of(open_adapter(adapter))[0]) == Path("models/right").resolve()


def test_a_folder_that_is_nowhere_is_asked_of_no_hub_and_says_where_it_was_looked_for(adapter, own_cache):
    with pytest.raises(AdapterError) as caught:
        load_base_of(adapter)
    assert f"nor in models or {own_cache / 'models'}. Say with --model where it is." in str(caught.value)
    assert str(adapter) in str(caught.value)


def test_a_model_of_the_hub_is_left_to_the_hub(adapter):
    """It was loaded from the hub's cache, so its passport has the commit."""
    name_base(adapter, "owner/name", "0123abc")
    assert base_of(open_adapter(adapter)) == ("owner/name", "0123abc")
    name_base(adapter, "smollm2-135m")
    assert base_of(open_adapter(adapter)) == ("smollm2-135m", None)


def test_an_adapter_without_a_passport_means_what_its_config_says(adapter):
    (adapter / "passport.json").unlink()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "owner/name"}))
    assert base_of(open_adapter(adapter)) == ("owner/name", None)
