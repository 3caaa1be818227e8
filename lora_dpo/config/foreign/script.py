"""A training script in Python as the arguments that it gives, read and never run.

Known are the calls that Unsloth's and TRL's scripts consist of. What a script computes is not known.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from lora_dpo.errors import ConfigError

CALLS = {
    "from_pretrained": {"pretrained_model_name_or_path": "model_name"},
    "get_peft_model": {},
    "LoraConfig": {"r": "lora_r", "target_modules": "lora_target_modules"},
    "BitsAndBytesConfig": {},
    "load_dataset": {"path": "dataset"},
}
"""Calls whose arguments are settings, with other names for some of them."""
TRAINERS = {"DPO": "dpo", "KTO": "kto", "SFT": "sft"}
OTHERS = ("ORPO", "CPO", "GRPO", "RLOO", "PPO", "Reward")
FIRST = {"from_pretrained": "model_name", "load_dataset": "dataset"}
"""What the first argument of a call is, where it has no name."""
OBJECTS = {
    "model", "ref_model", "tokenizer", "processing_class", "args", "train_dataset", "eval_dataset", "data_collator",
    "peft_config", "quantization_config", "callbacks", "compute_metrics", "token", "device_map", "config",
}  # fmt: skip
"""Arguments that hand on what another call made."""


class Script:
    """What was read of a script."""

    def __init__(self, text: str, *, where: str) -> None:
        """Read it. Raises `ConfigError` if it is no Python, or trains by something that is not here."""
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ConfigError(f"{where} is not read as Python ({error}). Give a script that runs.") from None
        self.given: dict[str, Any] = {}
        self.computed: dict[str, str] = {}
        """Arguments whose values are no literals, as they are written."""
        self.method: str | None = None
        self.unsloth = any(_imports(node, "unsloth") for node in ast.walk(tree))
        self.peft = False
        """Whether an adapter is made."""
        self._constants = dict(_constants(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                self._look_at(node, where)

    def _look_at(self, call: ast.Call, where: str) -> None:
        name = _name_of(call.func)
        kind = name.removesuffix("Config").removesuffix("Trainer")
        if kind in OTHERS and kind != name:
            raise ConfigError(f"{where} trains by {name}, and there is no counterpart here. There is dpo, kto and sft.")
        if kind in TRAINERS and kind != name:
            self.method = TRAINERS[kind]
            self._take(call, {})
        elif name == "TrainingArguments":
            self._take(call, {})
        elif name in CALLS:
            owner = _name_of(call.func.value) if isinstance(call.func, ast.Attribute) else ""
            if "Tokenizer" in owner or "Processor" in owner:
                return
            self.peft = self.peft or name in ("get_peft_model", "LoraConfig")
            if name in FIRST and call.args and FIRST[name] not in self.given:
                self._keep(FIRST[name], call.args[0])
            self._take(call, CALLS[name])

    def _take(self, call: ast.Call, names: dict[str, str]) -> None:
        for keyword in call.keywords:
            if keyword.arg is not None and keyword.arg not in OBJECTS:
                self._keep(names.get(keyword.arg, keyword.arg), keyword.value)

    def _keep(self, name: str, node: ast.expr) -> None:
        if isinstance(node, ast.Name) and node.id in self._constants:
            node = self._constants[node.id]
        try:
            self.given[name] = ast.literal_eval(node)
        except (ValueError, TypeError, MemoryError, RecursionError):
            self.computed[name] = ast.unparse(node)


def _constants(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """Names that the script gives a value once, at its top."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node.value


def _imports(node: ast.AST, package: str) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name.partition(".")[0] == package for alias in node.names)
    return isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == package


def _name_of(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
