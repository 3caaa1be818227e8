"""The workflow file, as far as it can be held where it is not run: it names what there is."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

from lora_dpo.cli.commands import app
from lora_dpo.config.reading import read_recipe

ROOT = Path(__file__).parent.parent
FILE = ROOT / ".github" / "workflows" / "tests.yml"


@pytest.fixture(scope="module")
def workflow():
    found = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    found["on"] = found.pop(True)  # YAML 1.1 reads `on` as true
    return found


def lines(job):
    """The lines that a job gives to its shell."""
    return [line.strip() for step in job["steps"] for line in str(step.get("run", "")).splitlines() if line.strip()]


def test_it_runs_on_three_systems_and_on_every_python_that_is_promised(workflow):
    matrix = workflow["jobs"]["fast"]["strategy"]["matrix"]
    assert matrix["os"] == ["ubuntu-latest", "macos-latest", "windows-latest"]
    least = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    assert matrix["python"][0] == least.removeprefix(">=")
    assert workflow["jobs"]["fast"]["runs-on"] == "${{ matrix.os }}"
    assert set(workflow["on"]) == {"push", "pull_request"}
    assert workflow["permissions"] == {"contents": "read"}


def test_it_runs_what_make_runs(workflow):
    fast, make = lines(workflow["jobs"]["fast"]), (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in ("ruff check .", "ruff format --check .", "mypy"):
        assert command in fast
        assert f"$(BIN)/{command}" in make
    [tests] = [line for line in fast if line.startswith("pytest")]
    assert f"$(BIN)/{tests}" in make


def test_every_job_ends_and_every_shell_line_can_be_read(workflow):
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 90, name
        assert job["steps"][0]["uses"].startswith("actions/checkout@"), name
        for line in lines(job):
            shlex.split(line)


def test_commands_files_and_settings_are_there(workflow):
    said = [line for job in workflow["jobs"].values() for line in lines(job)]
    ours = [re.sub(r"^docker run --rm ", "", line) for line in said]
    ours = [shlex.split(line)[1:] for line in ours if line.startswith("lora-dpo ")]
    assert len(ours) >= 6
    for words in ours:
        command = typer.main.get_command(app)
        while hasattr(command, "commands") and not words[0].startswith("--"):
            command = command.commands[words.pop(0)]
        flags = [flag for option in command.params for flag in option.opts]
        assert [word for word in words if word.startswith("--") and word not in flags] == []
    [train] = [words for words in ours if any(word.startswith("trainer.") for word in words)]
    recipe = read_recipe(ROOT / train[0], train[1:])
    assert recipe.trainer["max_steps"] == 1
    for file in re.findall(r"tests/\w+\.py|data/[\w-]+\.jsonl|configs/[\w-]+\.yaml", "\n".join(said)):
        assert (ROOT / file).is_file(), file


def test_the_docs_say_that_it_is_unrun():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert re.search(r"`\.github/workflows/tests\.yml`.*has not been run yet", text, re.DOTALL)
