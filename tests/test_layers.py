"""Imports point downward, torch is imported late, and what works without training never imports training."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lora_dpo"

LAYERS = (
    "errors advice config files events quiet journal improve_recipe intervals texts thresholds wording "
    "yaml_text telemetry crash leftovers tensor_file",
    "data shared_prefix fetch lora_files package turns address module_names",
    "model adapters probe library hub merging generate runs settings card memory reference_cache footprint "
    "request shelf openai_api health report fields methods peft_config checkpoints cleaning",
    "trainer engine steps evaluate prepare measure train verify merge fidelity export mix chat fitting plan trial "
    "prompts samples judges policy pairs improve job host votes talk arena collection presets watch desk outgoing "
    "token_laws learned contest assessment assess evaluations keeping looking guard guard_callback record "
    "answer_trainers engine_checks reference_guard pair_weights score_ahead",
    "cli cli_adapters cli_data cli_demo cli_export cli_pairs cli_plan cli_serve connections serve console console_data "
    "demo terminal signals __init__ __main__ cli_eval cli_clean",
)
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms.split()}
HEAVY = {"accelerate", "bitsandbytes", "datasets", "gradio", "peft", "torch", "transformers", "trl"}
# a class on top of TRL's and what it is made of, and pure tensors: imported only when training starts; the page
EAGER = {
    *("answer_trainers", "demo", "engine", "engine_checks", "pair_weights", "reference_guard", "score_ahead"),
    *("shared_prefix", "steps", "trainer"),
}
WITHOUT_TRAINING = (
    *("merge", "generate", "evaluate", "chat", "verify", "library", "hub", "fidelity", "export", "mix", "assess"),
    "report",
)


def module_name(path: Path) -> str:
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def import_nodes(tree: ast.AST, *, in_functions: bool, for_types: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements, optionally those that run only when a function does, or only in a type checker."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif (is_type_checking(node) and not for_types) or (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not in_functions
        ):
            continue
        else:
            yield from import_nodes(node, in_functions=in_functions, for_types=for_types)


def own_modules(node: ast.Import | ast.ImportFrom) -> set[str]:
    """The modules of this package that a statement names: `data.tokens` for `lora_dpo.data.tokenize`."""
    if isinstance(node, ast.Import):
        dotted = [alias.name for alias in node.names]
    else:
        assert node.level == 0, f"line {node.lineno}: a relative import"
        found = [f"{node.module}.{alias.name}" for alias in node.names]
        dotted = [name if name.removeprefix("lora_dpo.") in MODULES else str(node.module) for name in found]
    inside = [name.removeprefix("lora_dpo.") for name in dotted if name.startswith("lora_dpo.")]
    return {name for name in inside if name} | ({"__init__"} if "lora_dpo" in dotted else set())


def imports_of(module: str, *, for_types: bool = False) -> set[str]:
    nodes = import_nodes(MODULES[module], in_functions=True, for_types=for_types)
    return {name for node in nodes for name in own_modules(node)}


def room(module: str) -> str:
    return module.partition(".")[0]


def everything_below(module: str) -> set[str]:
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        for name in imports_of(waiting.pop()) - seen:
            seen.add(name)
            waiting.append(name)
    return seen


def test_the_reader_of_imports_sees_what_there_is():
    assert "trainer" in imports_of("train")  # inside a function
    assert "data.tokens" in imports_of("data")
    assert {"config", "data.files"} <= everything_below("cli")
    assert "adapters" in imports_of("card", for_types=True)
    assert "adapters" not in imports_of("card")


def test_every_module_has_a_layer_and_every_layer_exists():
    assert {room(module) for module in MODULES} == set(LAYER)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downward(module):
    upward = [name for name in imports_of(module, for_types=True) if LAYER[room(name)] > LAYER[room(module)]]
    assert not upward, f"{module} (layer {LAYER[room(module)]}) imports {upward}"


def test_imports_have_no_cycle():
    order = list(graphlib.TopologicalSorter({module: imports_of(module) for module in MODULES}).static_order())
    assert set(order) == set(MODULES)


@pytest.mark.parametrize("module", WITHOUT_TRAINING)
def test_what_works_without_training_never_imports_it(module):
    assert not everything_below(module) & {"train", "trainer", "prepare"}


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) not in EAGER])
def test_heavy_libraries_are_imported_late(module):
    nodes = list(import_nodes(MODULES[module], in_functions=False, for_types=False))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not {name.partition(".")[0] for name in names} & HEAVY
    assert not {room(name) for node in nodes for name in own_modules(node)} & EAGER
