"""What a package index, an IDE and a reader of papers are told: extras, types, citation."""

from __future__ import annotations

import inspect
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import pytest
import yaml

import lora_dpo
from lora_dpo.cli.commands import main

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {"serve": ["starlette", "uvicorn"], "demo": ["gradio"]}


@pytest.mark.parametrize("command", EXTRAS)
@pytest.mark.parametrize("blocked", ["gradio", "starlette", "uvicorn"])
def test_a_command_without_its_extra_is_one_sentence_with_the_pip_command(command, blocked, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, blocked, None)  # as if it were not installed
    if command == "serve" and blocked == "gradio":
        return
    assert main([command, "--model", "models/none", "--port", "0"]) == 1
    said = f"error: lora-dpo {command} needs what is not installed ({blocked}). "
    assert capsys.readouterr().err == f"{said}Get it: pip install 'lora-dpo[{command}]'\n"


def test_what_trains_needs_no_extra():
    """Every room but the demo and the server of HTTP is imported with the libraries of all extras blocked."""
    script = f"""
import sys
for name in {[name for names in EXTRAS.values() for name in names]}:
    sys.modules[name] = None
import lora_dpo, lora_dpo.training.run, lora_dpo.serving.host, lora_dpo.release, lora_dpo.evaluation
from lora_dpo.cli.commands import main
[getattr(lora_dpo, name) for name in lora_dpo.__all__ if name != "DPOTrainer"]
assert main(["--help"]) == 0 and main(["adapters", "list"]) == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_an_extra_holds_what_its_command_asks_for_and_all_holds_every_one():
    def named(extra):
        for requirement in PROJECT["optional-dependencies"][extra]:
            if requirement.startswith("lora-dpo["):
                for other in requirement.removeprefix("lora-dpo[").rstrip("]").split(","):
                    yield from named(other)
            else:
                yield requirement.partition(">")[0]

    for extra, names in EXTRAS.items():
        assert set(names) <= set(named(extra))
    others = set(PROJECT["optional-dependencies"]) - {"all", "dev"}
    assert set(named("all")) == {name for extra in others for name in named(extra)}
    assert set(named("all")) <= set(named("dev"))
    needed = {requirement.partition(">")[0] for requirement in PROJECT["dependencies"]}
    assert needed.isdisjoint(named("all"))


def test_the_trainers_constructor_is_trls_word_for_word():
    """So that an IDE completes it. Ours has two keywords more, which are given by name alone."""
    import datasets
    import peft
    import torch
    import transformers
    import trl

    from lora_dpo.training import dpo_trainer

    names = {
        **vars(datasets),
        **{name: getattr(transformers, name) for name in ("BitsAndBytesConfig", "EvalPrediction", "PreTrainedModel")},
        **{name: getattr(transformers, name) for name in ("PreTrainedTokenizerBase", "ProcessorMixin")},
        "TrainerCallback": transformers.TrainerCallback,
        "DPOConfig": trl.DPOConfig,
        "PeftConfig": peft.PeftConfig,
        "PeftModel": peft.PeftModel,
        "Optimizer": torch.optim.Optimizer,
        "LambdaLR": torch.optim.lr_scheduler.LambdaLR,
    }
    ours, theirs = dpo_trainer.DPOTrainer.__init__, trl.DPOTrainer.__init__
    parameters, wanted = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    assert list(parameters) == [*wanted, "engine", "pair_weights"]
    for name, parameter in wanted.items():
        assert (parameters[name].kind, parameters[name].default) == (parameter.kind, parameter.default), name
    assert {parameters[name].kind for name in ("engine", "pair_weights")} == {inspect.Parameter.KEYWORD_ONLY}
    found = typing.get_type_hints(ours, vars(dpo_trainer) | names)
    theirs_found = typing.get_type_hints(theirs, vars(sys.modules[trl.DPOTrainer.__module__]) | names)
    loosely = {"compute_metrics"}  # a dict of theirs has no types of its own
    assert {name: found[name] for name in wanted if name not in {"self", *loosely}} == {
        name: theirs_found[name] for name in wanted if name not in {"self", *loosely}
    }


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == PROJECT["version"] == lora_dpo.__version__
    assert cited["license"] == PROJECT["license"]
    assert cited["repository-code"] == PROJECT["urls"]["Homepage"]
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert all(entry["authors"] and entry["url"].startswith("https://") for entry in cited["references"])
