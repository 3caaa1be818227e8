"""The rooms of the package, and who may call whom: one list, held against every import, those for types included."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lora_dpo"

ROOMS = (
    *("config", "data", "model", "engine", "adapters", "judging"),
    *("evaluation", "training", "tuning", "release", "serving", "demo", "cli"),
)
"""In the order in which a pair flows. A room imports those above it and the ground, never one below."""
STRANGERS = [("adapters", "engine"), ("training", "release"), ("tuning", "release")]
"""Rooms that do not know each other, though one is above the other."""
OWNERS = {
    "trl": {"training", "config"},
    "bitsandbytes": {"model"},
    "typer": {"cli"},
    "rich": {"cli"},
    "gradio": {"demo"},
    "optuna": {"tuning"},
    "starlette": {"serving", "demo"},
    "uvicorn": {"serving", "demo"},
}
"""Libraries that belong to rooms."""
GROUND = {"errors", "events", "files", "leftovers", "places", "quiet", "systems", "text"}
"""Modules of no room: what every room may use. They import nothing but each other."""
FRONT = {"", "__main__"}
"""The package's own names, and `python -m lora_dpo`: they import what they offer."""

HEAVY = {"accelerate", "bitsandbytes", "datasets", "gradio", "peft", "torch", "transformers", "trl"}
EAGER = {
    *("engine.attention", "engine.engine", "engine.layout", "engine.logprobs", "engine.objective"),
    *(
        "engine.checkpointing",
        "engine.forked_states",
        "engine.fused_layers",
        "engine.pair_batch",
        "engine.pair_forward",
        "engine.preference_loss",
        "engine.products",
        "engine.proof",
        "engine.rematerialise",
        "engine.segments",
        "engine.small_copy",
        "engine.step_record",
        "engine.trunk_cache",
        "engine.whole_step",
    ),
    *("training.dpo_trainer", "training.pair_weights", "training.reference_guard", "training.score_ahead"),
    *("training.sft_kto_trainers", "training.engine_fallback"),
}
"""A class on top of TRL's, what it is made of, and pure tensors: imported only when a training or a score begins."""


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in MODULES.items()}


def room_of(module: str) -> str:
    first = module.partition(".")[0]
    return first if first in ROOMS else "ground"


def import_nodes(tree: ast.AST, *, late: bool = True) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements; without `late` only those that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif late or not (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        ):
            yield from import_nodes(node, late=late)


def imported(node: ast.Import | ast.ImportFrom) -> set[str]:
    """Whole names of what a statement imports: `lora_dpo.data.tokenize`, `torch.nn`."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    assert node.level == 0, f"line {node.lineno}: a relative import"
    found = {f"{node.module}.{alias.name}" for alias in node.names}
    return {name if name.removeprefix("lora_dpo.") in MODULES else str(node.module) for name in found}


def own_imports(module: str, *, late: bool = True) -> set[str]:
    names = {name for node in import_nodes(TREES[module], late=late) for name in imported(node)}
    return {name.removeprefix("lora_dpo").lstrip(".") for name in names if re.match(r"lora_dpo\b", name)}


def libraries(module: str, *, late: bool = True) -> set[str]:
    names = {name for node in import_nodes(TREES[module], late=late) for name in imported(node)}
    return {name.partition(".")[0] for name in names}


def may_import(importer: str, target: str) -> bool:
    """Whether one room may import another."""
    if importer == target or target == "ground":
        return True
    if importer == "ground" or (importer, target) in STRANGERS or (target, importer) in STRANGERS:
        return False
    return ROOMS.index(target) < ROOMS.index(importer)


def test_the_reader_of_imports_sees_what_there_is():
    assert "training.dpo_trainer" in own_imports("training.run")  # inside a function
    assert "training.dpo_trainer" not in own_imports("training.run", late=False)
    assert "data.tokenize" in own_imports("data")
    assert "adapters.passport" in own_imports("evaluation.report.model_card")  # for types
    assert "trl" in libraries("training.dpo_trainer")


def test_the_rule_tells_up_from_down():
    assert may_import("engine", "model")
    assert may_import("cli", "demo")
    assert may_import("data", "ground")
    assert not may_import("model", "engine")
    assert not may_import("ground", "config")
    assert not may_import("adapters", "engine")
    assert not may_import("release", "training")


def test_every_module_is_in_a_room_or_on_the_ground():
    assert {module for module in MODULES if room_of(module) == "ground"} == GROUND | FRONT
    assert {module for module in ROOMS if module in MODULES} == set(ROOMS)


@pytest.mark.parametrize("module", sorted(set(MODULES) - FRONT))
def test_a_room_imports_those_above_it(module):
    wrong = [name for name in own_imports(module) if not may_import(room_of(module), room_of(name))]
    assert not wrong
    assert "" not in own_imports(module) or room_of(module) == "cli", "the package's front imports everything"


def test_nobody_imports_the_terminal_and_the_terminal_alone_the_page():
    for module in set(MODULES) - FRONT:
        rooms = {room_of(name) for name in own_imports(module)} - {room_of(module)}
        assert "cli" not in rooms, module
        assert "demo" not in rooms or room_of(module) == "cli", module


def test_imports_have_no_circle():
    benchmarks = {path.stem: path for path in sorted((ROOT / "benchmarks" / "dpo_vs_ppo").glob("*.py"))}
    graph = {module: own_imports(module) - {module} for module in MODULES if module.rpartition(".")[2] != "__init__"}
    # A package's own names come from its modules: a circle through them is none of the modules'.
    packages = {module for module, path in MODULES.items() if path.name == "__init__.py"}
    graph = {module: names - packages for module, names in graph.items() if module not in packages}
    list(TopologicalSorter(graph).static_order())
    own = {}
    for name, path in benchmarks.items():
        nodes = list(import_nodes(ast.parse(path.read_text(encoding="utf-8"))))
        found = {each for node in nodes for each in _of_benchmarks(node)}
        own[name] = (found & set(benchmarks)) - {name}
    list(TopologicalSorter(own).static_order())


def _of_benchmarks(node: ast.Import | ast.ImportFrom) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name.rpartition(".")[2] for alias in node.names}
    return {str(node.module).rpartition(".")[2], *(alias.name for alias in node.names)}


@pytest.mark.parametrize(("library", "rooms"), OWNERS.items())
def test_a_library_belongs_to_its_rooms(library, rooms):
    users = {room_of(module) for module in MODULES if library in libraries(module)}
    assert users <= rooms


@pytest.mark.parametrize("module", sorted(set(MODULES) - EAGER))
def test_heavy_libraries_are_imported_late(module):
    if room_of(module) == "demo":
        assert not libraries(module, late=False) & (HEAVY - {"gradio"})
    else:
        assert not libraries(module, late=False) & HEAVY
    assert not own_imports(module, late=False) & EAGER


@pytest.mark.parametrize("statement", ["import lora_dpo", "import lora_dpo.cli"])
def test_importing_it_loads_nothing_heavy(statement):
    script = f"import sys; {statement}; print(sorted(set(sys.modules) & {HEAVY!r}))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"


# --- what a room says of itself -------------------------------------------------------------------

PACKAGES = sorted(module for module, path in MODULES.items() if path.name == "__init__.py" and module)


def named_in(doc: str) -> list[str]:
    """The files that a room's docstring lists, in its order."""
    found = []
    for line in doc.splitlines():
        match = re.fullmatch(r"([a-z_]+/?(?:, [a-z_]+)*)(?:  +\S.*)?", line.strip())
        if match and (line.strip() != match[1] or ", " in match[1]):
            found += [name.rstrip("/") for name in match[1].split(", ")]
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_a_room_lists_its_files_once_each(package):
    doc = ast.get_docstring(TREES[package], clean=False) or ""
    folder = MODULES[package].parent
    files = [path.stem for path in folder.glob("*.py") if path.name != "__init__.py"]
    files += [path.name for path in folder.iterdir() if (path / "__init__.py").exists()]
    assert sorted(named_in(doc)) == sorted(files)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_room_has_the_names_that_it_offers(package):
    module = importlib.import_module(f"lora_dpo.{package}")
    for name in getattr(module, "__all__", ()):
        assert hasattr(module, name)
    offered = {name for name in vars(module) if not name.startswith("_")} & set(getattr(module, "__all__", ()))
    hidden = {name for name in offered if f"{package}.{name}" in MODULES}
    assert not hidden, "a name that hides a module"


def test_the_front_offers_what_rooms_offer():
    import lora_dpo

    for name in lora_dpo.__all__:
        rooms = [room for room in ROOMS if name in getattr(importlib.import_module(f"lora_dpo.{room}"), "__all__", ())]
        assert len(rooms) == 1 or name in ("BaseDiffers", "LoraDPOError"), (name, rooms)
        assert name not in MODULES, "a name that hides a module"


def test_names_that_the_docs_show_are_where_they_were():
    shown = {"config": "LoraSection", "model": "detach", "data": "read_pairs", "events": "Note"}
    for module, name in {**shown, "data.doctor": "examine", "release": "recommend"}.items():
        assert hasattr(importlib.import_module(f"lora_dpo.{module}"), name)


# --- how much a reader has to hold ----------------------------------------------------------------


def test_no_file_is_longer_than_400_lines_but_for_a_reason_at_its_top():
    for module, path in MODULES.items():
        if len(path.read_text(encoding="utf-8").splitlines()) > 400:
            assert "onger than 400 lines" in (ast.get_docstring(TREES[module]) or ""), module


def test_no_function_is_longer_than_60_lines_but_for_a_reason_at_its_files_top():
    """Counted without its signature and docstring: those of a command are its `--help`."""
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                if body and body[-1].end_lineno - body[0].lineno + 1 > 60:
                    assert "onger than 60 lines" in (ast.get_docstring(tree) or ""), f"{module}.{node.name}"


def test_at_most_ten_files_lie_at_the_top():
    assert len(list(PACKAGE.glob("*.py"))) <= 10
