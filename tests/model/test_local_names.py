"""What looks like a folder of this machine is never asked of the hub, also when it is gone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lora_dpo.adapters.exchange import install
from lora_dpo.adapters.folder import attach_adapter, put_adapter, put_beside
from lora_dpo.adapters.passport import is_public_name
from lora_dpo.data import read_pairs
from lora_dpo.errors import AdapterError, DataError, JudgeError, ModelError
from lora_dpo.judging.specs import open_judge
from lora_dpo.model.base import load_base, load_skeleton, load_tokenizer
from lora_dpo.release.merged_weights import plan_base

LOCAL = (
    "gone",
    "adapters/gone",
    "models/gone",
    "merged/gone",
    "here/gone",
    "./gone",
    "../gone",
    "~/gone",
    "/gone",
    "gone.lora.zip",
    "some/gone.safetensors",
    "a/b/c",
    "m" * 5000 + "/gone",
)


@pytest.mark.parametrize("name", LOCAL)
def test_a_name_that_looks_local_is_never_asked_of_the_hub(name, tmp_path, monkeypatch):
    """Whoever owns the name "adapters" there could answer otherwise."""

    def asked(*where, **how):
        raise AssertionError(f"the hub was asked for {where} {how}")

    for function in ("hf_hub_download", "snapshot_download", "try_to_load_from_cache"):
        monkeypatch.setattr(f"huggingface_hub.{function}", asked)
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", asked)
    monkeypatch.setattr("datasets.load_dataset", asked)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert not is_public_name(name)
    for load in (load_base, load_tokenizer, load_skeleton, plan_base):
        with pytest.raises(ModelError):
            load(name)
    with pytest.raises(JudgeError):
        open_judge([f"reward:{name}"])
    with pytest.raises(AdapterError):
        install(name, fetch=asked)
    with pytest.raises(DataError):
        read_pairs(name)


def test_an_adapter_that_vanishes_is_not_asked_of_the_hub(tiny_model_folder, tiny_adapter, tmp_path, monkeypatch):
    """Its folder is removed between the checks and peft; or a model's, while it is loaded."""
    asked = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("requests.Session.request", lambda *where, **how: asked.append(where))
    monkeypatch.setattr("httpx.Client.send", lambda *where, **how: asked.append(where))
    monkeypatch.chdir(tmp_path)
    base = load_base(str(tiny_model_folder), quantize="none")
    shutil.copytree(tiny_adapter, tmp_path / "adapters" / "gone")
    live = attach_adapter(base, "adapters/gone")
    shutil.rmtree(tmp_path / "adapters" / "gone")
    with pytest.raises(AdapterError):
        put_beside(live, Path("adapters/gone"), name="second", base="it")
    base.model = live.unload()
    shutil.copytree(tiny_adapter, tmp_path / "adapters" / "gone")
    (tmp_path / "adapters" / "gone" / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError):
        put_adapter(base, Path("adapters/gone"))
    assert asked == []
