"""From what a user writes to a judge.

    rules:RULE            lora_dpo.judging.rules
    reward:MODEL          a reward model, a folder or a hub id
    llm:MODEL@URL         a model behind an OpenAI-compatible endpoint
    implicit              the policy's own implicit reward against its reference
    module:function       a Python function of yours
    WEIGHT*JUDGE          any of these, times a number

Several judges add up.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lora_dpo.config.reading import nearest
from lora_dpo.config.template_kwargs import TemplateKwargs
from lora_dpo.errors import ConfigError, JudgeError
from lora_dpo.judging.endpoint import API_KEY, EndpointSettings
from lora_dpo.judging.judge import Judge, add_up
from lora_dpo.judging.rules import KNOWN, rule_judge
from lora_dpo.text import shown

if TYPE_CHECKING:
    from lora_dpo.model.base import Base

KINDS = ("rules", "reward", "llm", "implicit")


@dataclass(frozen=True, kw_only=True)
class Means:
    """What judges may use beside the answers: the policy that is in memory, and settings of the endpoint."""

    base: Base | None = None
    policy: Any = None
    """The model with its adapter on it, or None without an adapter."""
    chat_template_kwargs: TemplateKwargs = field(default_factory=dict)
    """Keywords for the chat template that the policy is asked with."""
    beta: float = 0.1
    """DPO's β of the policy's training, for the implicit reward."""
    endpoint: EndpointSettings = field(default_factory=EndpointSettings)
    cache: Path | None = None
    """Where an LLM judge keeps verdicts; None keeps none."""


def open_judge(specs: Sequence[str], means: Means | None = None) -> Judge:
    """Make one judge of what the user wrote; models are loaded here.

    Raises:
        ConfigError: a spec that means nothing.
        JudgeError: a judge that cannot be loaded.
    """
    if not specs:
        raise ConfigError("Name a judge, such as --judge 'rules:length<=40'. See: lora-dpo docs judges")
    return add_up([_weighted(spec.strip(), means or Means()) for spec in specs])


def check_specs(specs: Sequence[str]) -> None:
    """Refuse what `open_judge` would refuse, as far as that needs no model.

    Raises:
        ConfigError: a spec that means nothing.
        JudgeError: a function that cannot be imported.
    """
    for spec in specs:
        _, text = _split_weight(spec.strip())
        kind, _, argument = text.partition(":")
        if kind not in KINDS:
            _function_judge(text)
        elif kind == "rules":
            rule_judge(text, argument)
        elif kind == "llm":
            _split_endpoint(text, argument)
        elif kind == "implicit" and text != "implicit":
            raise ConfigError(f"The judge is {shown(text)}: write implicit alone. It is about the model that answers.")
        elif kind == "reward" and not argument:
            raise ConfigError("The judge is 'reward:' without a model. Write reward:FOLDER or reward:HUB/ID.")


def is_implicit(spec: str) -> bool:
    """True for the implicit judge, weighted or not; a function of that name in a user's module is another judge."""
    return _split_weight(spec.strip())[1] == "implicit"


def is_rule(spec: str) -> bool:
    """True for a rule, weighted or not."""
    return _split_weight(spec.strip())[1].startswith("rules:")


def _weighted(spec: str, means: Means) -> tuple[float, Judge]:
    weight, text = _split_weight(spec)
    return weight, _open(text, means)


def _split_weight(spec: str) -> tuple[float, str]:
    match = re.match(r"(-?\d{1,9}(?:\.\d+)?|-?\.\d+)\*(.+)$", spec, re.DOTALL)
    return (float(match[1]), match[2].strip()) if match else (1.0, spec)


def _open(text: str, means: Means) -> Judge:
    check_specs([text])
    kind, _, argument = text.partition(":")
    if kind == "rules":
        return rule_judge(text, argument)
    if kind == "reward":
        from lora_dpo.judging.reward_model import reward_judge

        return reward_judge(text, argument)
    if kind == "llm":
        from lora_dpo.judging.llm import llm_judge

        model, url = _split_endpoint(text, argument)
        return llm_judge(text, model, url, means.endpoint, cache=means.cache)
    if kind == "implicit":
        from lora_dpo.judging.implicit_reward import implicit_judge

        if means.base is None or means.policy is None:
            raise ConfigError("The implicit judge compares an adapter with its reference. Give one with --adapter.")
        return implicit_judge(
            text,
            means.policy,
            means.base.tokenizer,
            beta=means.beta,
            chat_template_kwargs=means.chat_template_kwargs,
        )
    return _function_judge(text)


def _split_endpoint(text: str, argument: str) -> tuple[str, str]:
    model, _, url = argument.rpartition("@")
    if not model or not re.match(r"https?://[^/]+", url):
        raise ConfigError(
            f"The judge is {shown(text)}: write llm:MODEL@URL, such as llm:qwen2.5:14b@http://localhost:11434/v1."
        )
    if "?" in url:
        raise ConfigError(
            f"The judge's URL {url} has a '?', and the judge is written into every pair. Leave it out; a key belongs "
            f"into the environment variable {API_KEY}."
        )
    return model, url


def _function_judge(text: str) -> Judge:
    """A user's function, found as Python finds it when started in the current folder."""
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", text):
        kind = re.split(r"[:<>=]", text)[0]
        hint = f" Did you mean rules:{shown(text)[1:-1]}?" if kind in KNOWN else nearest(kind, KINDS)
        raise ConfigError(
            f"{shown(text)} is no judge: write rules:…, reward:…, llm:…, implicit, or module:function.{hint}"
        )
    module_name, _, name = text.partition(":")
    module = _import(module_name, text)
    function = getattr(module, name, None)
    if not callable(function):
        raise JudgeError(f"The judge {text}: {module.__file__ or module_name} has no function {name}.")
    return Judge(text, function, {"source_sha256": _source_hash(module)})


def _import(module_name: str, text: str) -> ModuleType:
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)  # a console script's own folder is there, not the current one
    try:
        return importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything
        known = nearest(module_name, KINDS) if isinstance(error, ModuleNotFoundError) else ""
        raise JudgeError(f"The judge {text} cannot be imported: {type(error).__name__}: {error}.{known}") from error
    finally:
        if added:
            sys.path.remove(here)


def _source_hash(module: ModuleType) -> str | None:
    try:
        return hashlib.sha256(inspect.getsource(module).encode()).hexdigest()
    except (OSError, TypeError):  # built in, or without a source file
        return None
