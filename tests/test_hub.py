"""Push and pull, against a fake of huggingface_hub's own functions: no hub is reached in tests."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from lora_dpo.errors import AdapterError
from lora_dpo.hub import pull, push
from lora_dpo.package import KNOWN


class FakeHub:
    """Keeps repositories as folders, and filters by the patterns that it is given, as the library does."""

    def __init__(self, root):
        self.root = root
        self.made = []

    def create_repo(self, repo, *, private, exist_ok):
        self.made.append((repo, private, exist_ok))
        (self.root / repo).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        for path in Path(folder_path).iterdir():
            if path.name in allow_patterns:
                shutil.copyfile(path, self.root / repo_id / path.name)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1 {commit_message}")

    def snapshot_download(self, repo, *, revision, allow_patterns, library_name):
        if not (self.root / repo).is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("no such repository, or no network")
        cache = self.root / "cache"
        for path in (self.root / repo).iterdir():
            if path.name in allow_patterns:
                (cache / "blobs").mkdir(parents=True, exist_ok=True)
                (cache / "snap").mkdir(exist_ok=True)
                shutil.copyfile(path, cache / "blobs" / path.name)
                (cache / "snap" / path.name).symlink_to(cache / "blobs" / path.name)  # as the real cache does
        return str(cache / "snap")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda library_name: fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return fake


def test_what_is_pushed_is_pulled(hub, tiny_adapter, tmp_path):
    adapter = tmp_path / "mine"
    shutil.copytree(tiny_adapter, adapter)
    (adapter / "README.md").write_text("# mine")
    (adapter / "notes.txt").write_text("private")
    assert push(adapter, "me/mine").startswith("https://hub/me/mine")
    assert hub.made == [("me/mine", True, True)]
    assert not (hub.root / "me/mine" / "notes.txt").exists()
    (hub.root / "me/mine" / "training_args.bin").write_bytes(b"a pickle that is never asked for")
    done = pull("me/mine", name="back", root=tmp_path / "adapters")
    there = {path.name: path.read_bytes() for path in done.folder.iterdir()}
    assert there == {path.name: path.read_bytes() for path in adapter.iterdir() if path.name in KNOWN}
    assert not any(path.is_symlink() for path in done.folder.iterdir())


def test_a_hub_that_cannot_be_reached_is_said_in_one_sentence(hub, tmp_path):
    with pytest.raises(AdapterError, match="did not serve me/nothing") as error:
        pull("me/nothing", root=tmp_path / "adapters")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "adapters").exists()


def test_a_broken_adapter_is_not_pushed(hub, tiny_adapter, tmp_path):
    shutil.copytree(tiny_adapter, tmp_path / "mine")
    (tmp_path / "mine" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(AdapterError, match="no whole safetensors"):
        push(tmp_path / "mine", "me/mine")
    assert not hub.root.exists()


def test_a_hostile_repository_is_refused(hub, tiny_adapter, tmp_path):
    shutil.copytree(tiny_adapter, hub.root / "me/evil")
    (hub.root / "me/evil" / "adapter_config.json").write_text("[]")
    with pytest.raises(AdapterError, match="no JSON object"):
        pull("me/evil", root=tmp_path / "adapters")
    assert not (tmp_path / "adapters").exists()


def test_pushing_without_a_network_is_said_in_one_sentence(tiny_adapter, monkeypatch):
    """The library itself, not the fake: a name that no resolver knows."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", functools.partial(huggingface_hub.HfApi, "http://hub.invalid"))
    with pytest.raises(AdapterError, match="did not serve me/mine") as error:
        push(tiny_adapter, "me/mine")
    assert "\n" not in str(error.value)
