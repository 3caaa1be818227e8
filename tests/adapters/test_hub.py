"""Push and pull, against a fake of huggingface_hub's own functions: no hub is reached in tests."""

from __future__ import annotations

import errno
import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from lora_dpo.adapters.hub import paths_told, pull, push
from lora_dpo.adapters.package import KNOWN
from lora_dpo.adapters.passport import licence_of
from lora_dpo.cli.commands import main
from lora_dpo.errors import AdapterError, OutputError, PackageError
from lora_dpo.evaluation.report.model_card import front_matter


class FakeHub:
    """Keeps repositories as folders, and filters by the patterns that it is given, as the library does."""

    def __init__(self, root):
        self.root = root
        self.made = []
        self.sizes = {}
        self.downloads = 0

    def create_repo(self, repo, *, private, exist_ok):
        self.made.append((repo, private, exist_ok))
        (self.root / repo).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        if "base_model: /" in (Path(folder_path) / "README.md").read_text():  # as the hub's own check of metadata
            raise ValueError("Invalid metadata in README.md.\n- base_model is not valid")
        for path in Path(folder_path).iterdir():
            if path.name in allow_patterns:
                shutil.copyfile(path, self.root / repo_id / path.name)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1 {commit_message}")

    def model_info(self, repo, *, revision, files_metadata):
        if not (self.root / repo).is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("no such repository, or no network")
        files = [(path.name, self.sizes.get(path.name, path.stat().st_size)) for path in (self.root / repo).iterdir()]
        return SimpleNamespace(sha="1", siblings=[SimpleNamespace(rfilename=name, size=size) for name, size in files])

    def snapshot_download(self, repo, *, revision, allow_patterns, library_name):
        assert revision == "1"  # the commit whose sizes were looked at
        self.downloads += 1
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


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        ("adapter_model.safetensors", 1 << 40, "at most 17,179,869,184 are read"),
        ("passport.json", 1 << 30, "at most 4,194,304 are read"),
    ],
)
def test_what_is_too_large_is_never_downloaded(hub, tiny_adapter, tmp_path, name, size, reason):
    shutil.copytree(tiny_adapter, hub.root / "me/large")
    hub.sizes[name] = size
    with pytest.raises(PackageError, match=reason):
        pull("me/large", root=tmp_path / "adapters")
    assert not hub.downloads


def test_a_repository_of_pickles_or_of_something_else_is_said(hub, tiny_adapter, tmp_path):
    shutil.copytree(tiny_adapter, hub.root / "me/old")
    (hub.root / "me/old/adapter_model.safetensors").rename(hub.root / "me/old/adapter_model.bin")
    with pytest.raises(PackageError, match=r"me/old holds adapter_model\.bin, a pickle"):
        pull("me/old", root=tmp_path / "adapters")
    (hub.root / "me/old/adapter_model.bin").unlink()
    with pytest.raises(PackageError, match=r"no adapter_model\.safetensors in it"):
        pull("me/old", root=tmp_path / "adapters")
    assert not hub.downloads


def test_a_full_disk_is_not_the_hubs_fault(hub, tiny_adapter, tmp_path, monkeypatch):
    shutil.copytree(tiny_adapter, hub.root / "me/mine")

    def full(repo, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(OutputError, match="No space left on device"):
        pull("me/mine", root=tmp_path / "adapters")


def test_a_card_that_the_hub_refuses_is_said_in_one_sentence(hub, tiny_adapter, tmp_path):
    shutil.copytree(tiny_adapter, tmp_path / "mine")
    (tmp_path / "mine" / "README.md").write_text("---\nbase_model: /home/me/base\n---\n")
    with pytest.raises(AdapterError, match="Invalid metadata in README") as error:
        push(tmp_path / "mine", "me/mine")
    assert "\n" not in str(error.value)


def test_a_card_names_its_base_to_the_hub_only_if_the_hub_knows_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert "base_model: someone/base" in "\n".join(front_matter("someone/base", ["lora"]))
    for base in ("/home/me/base", "smollm2-135m", "models/mine"):
        assert "base_model" not in "\n".join(front_matter(base, ["lora"]))


def test_push_says_which_files_name_a_place_of_this_machine(hub, tiny_adapter, tmp_path, capsys):
    shutil.copytree(tiny_adapter, tmp_path / "mine")  # its base is a folder here
    (tmp_path / "mine" / "README.md").write_text("# mine")
    assert main(["adapters", "push", "./mine", "me/mine"]) == 0
    assert "adapter_config.json, passport.json name a place on this machine" in capsys.readouterr().err


def test_a_windows_home_folder_is_seen_in_json(tiny_adapter, tmp_path, monkeypatch):
    shutil.copytree(tiny_adapter, tmp_path / "mine")
    monkeypatch.setenv("HOME", "C:\\Users\\me")
    (tmp_path / "mine" / "recipe.yaml").write_text("output: C:\\Users\\me\\mine\n")
    (tmp_path / "mine" / "metrics.jsonl").write_text(json.dumps({"step": 1, "place": "C:\\Users\\me\\mine"}))
    assert {"recipe.yaml", "metrics.jsonl"} <= set(paths_told(tmp_path / "mine"))


def test_the_licence_of_a_hub_base_is_read_from_its_card(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")

    def hf_hub_download(repo, file, *, revision):
        if repo != "me/base" or file != "README.md" or revision != "abc":
            raise huggingface_hub.errors.LocalEntryNotFoundError("not here")
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    assert licence_of("me/base", "abc") == "apache-2.0"
    assert licence_of("me/other", "abc") is None


def test_pushing_without_a_network_is_said_in_one_sentence(tiny_adapter, monkeypatch):
    """The library itself, not the fake: a name that no resolver knows."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", functools.partial(huggingface_hub.HfApi, "http://hub.invalid"))
    with pytest.raises(AdapterError, match="did not serve me/mine") as error:
        push(tiny_adapter, "me/mine")
    assert "\n" not in str(error.value)
