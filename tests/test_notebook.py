"""The notebook: its file, and what its cells do when they are run from top to bottom on a CPU, with a small budget."""

import ast
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import typer

import lora_dpo
from lora_dpo.cli.commands import app

nbformat = pytest.importorskip("nbformat")  # of the dev extras

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
ORDER = ["install", "budget", "fetch", "pairs", "doctor", "plan", "train", "curves", "chat", "eval", "report", "own"]


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def cells(notebook, kind):
    return {cell.id: cell.source for cell in notebook.cells if cell.cell_type == kind}


def test_the_file_is_valid_and_holds_no_outputs(notebook):
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
    assert list(cells(notebook, "code")) == ORDER
    assert (
        NOTEBOOK.read_bytes()
        == (json.dumps(json.loads(NOTEBOOK.read_text("utf-8")), indent=1, ensure_ascii=False) + "\n").encode()
    )


def test_it_names_no_place_of_one_machine(notebook):
    for cell in notebook.cells:
        assert not re.search(r"""(?:^|[\s"'(=])(?:/[a-z]+/|~/|[A-Za-z]:\\)""", cell.source, re.MULTILINE), cell.id


def test_it_teaches_the_words(notebook):
    [text] = [source for source in cells(notebook, "markdown").values() if "Direct Preference Optimization" in source]
    for word in ("policy", "reference", "margin", "β"):
        assert f"**{word}**: " in text
    assert r"\ln 2 = 0.693" in text
    everything = "\n".join(cells(notebook, "markdown").values())
    for target in re.findall(r"\]\(([^)#]+)\)", everything):
        assert (NOTEBOOK.parent / target).resolve().is_file(), target


def plain(source):
    """A cell as plain Python: `!` and `%` lines as IPython makes them."""
    from IPython.core.inputtransformer2 import TransformerManager

    return TransformerManager().transform_cell(source)


def test_cells_are_python_that_calls_what_there_is(notebook):
    for name, source in cells(notebook, "code").items():
        for node in ast.walk(ast.parse(plain(source), name)):
            if isinstance(node, ast.ImportFrom) and node.module == "lora_dpo":
                assert {alias.name for alias in node.names} <= set(lora_dpo.__all__)


def test_commands_and_options_are_those_of_the_command_line(notebook):
    found = re.findall(r"^ *!lora-dpo (.+)$", "\n".join(cells(notebook, "code").values()), re.MULTILINE)
    assert len(found) >= 4
    for line in found:
        command, words = typer.main.get_command(app), line.split()
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        flags = [flag for option in command.params for flag in option.opts]
        assert [word for word in words if word.startswith("--") and word not in flags] == []


def test_nothing_is_installed_where_it_is_here(notebook):
    source = plain(cells(notebook, "code")["install"])
    asked = []

    class Shell:
        def run_line_magic(self, *given):
            asked.append(given)

    exec(source, {"get_ipython": Shell})  # noqa: S102 - our own cell
    assert asked == []
    exec(source.replace('importlib.util.find_spec("lora_dpo") is None', "True"), {"get_ipython": Shell})  # noqa: S102
    assert asked == [("pip", 'install --quiet "$SOURCE"')]


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(notebook, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    model = ROOT / "models" / "smollm2-135m"
    if not (model / "config.json").is_file():
        pytest.skip("get the model with: lora-dpo models fetch smollm2-135m")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / model.name).symlink_to(model.resolve())
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "data").mkdir()
    for name, rows in (("quickstart", 24), ("quickstart-eval", 4), ("quickstart-questions", 2)):
        lines = (ROOT / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(lines[:rows]), encoding="utf-8")
    [at] = [place for place, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell("STEPS, ANSWERS, LONGEST = 1, 2, 12", id="small"))
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    client = nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    said = {cell.id: shown(cell) for cell in notebook.cells if cell.cell_type == "code"}
    assert said["install"] == ""
    assert "24 pairs read" in said["pairs"]
    assert "REJECTED" in said["pairs"]
    assert "pairs read" in said["doctor"]
    assert "memory" in said["plan"]
    assert re.search(r"step  1/1  loss \d+\.\d\d  margin 0\.00", said["train"])
    assert "reward accuracy" in said["train"]
    assert "The adapter is in adapters" in said["train"]
    assert "image/png" in said["curves"]
    assert said["chat"].count("before (") == said["chat"].count("after  (") == 3
    assert "95%:" in said["eval"]
    assert "<iframe srcdoc=" in said["report"]
    assert "Set MINE" in said["own"]
    assert (tmp_path / "adapters" / "notebook" / "passport.json").is_file()


def shown(cell):
    """Everything that a cell printed or displayed, as text; of pictures their kind."""
    parts = []
    for output in cell.outputs:
        assert output.output_type != "error", output
        data = output.get("data", {})
        parts += [output.get("text", ""), data.get("text/html", ""), *data]
    return "\n".join(part for part in parts if part)
