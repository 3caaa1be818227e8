"""The docs say what the code does: generated pages are fresh, links lead somewhere, snippets and recipes are valid."""

import ast
import functools
import importlib
import inspect
import re
from pathlib import Path

import pytest
import typer
from scripts_here import load_script

import lora_dpo
from lora_dpo.cli.commands import app
from lora_dpo.config.reading import read_recipe

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
LINKING = [path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES) if path.is_file()]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


def relative(path):
    return str(path.relative_to(ROOT))


def prose(path):
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def code_blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


# --- generated pages ------------------------------------------------------------------------------


def test_the_page_of_settings_is_fresh():
    make_docs = load_script("make_docs")
    assert make_docs.is_fresh(), "make it again with: python scripts/make_docs.py"
    assert make_docs.main(["--check"]) == 0


def test_a_stale_page_fails_the_check(tmp_path, monkeypatch, capsys):
    make_docs = load_script("make_docs")
    monkeypatch.setattr(make_docs, "PAGE", tmp_path / "recipe.md")
    assert make_docs.main(["--check"]) == 1
    assert "stale" in capsys.readouterr().err
    assert make_docs.main([]) == 0
    assert make_docs.main(["--check"]) == 0


# --- links ----------------------------------------------------------------------------------------


def anchors(path):
    """The anchors that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKING, ids=relative)
def test_relative_links_lead_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{relative(page)} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{relative(page)} links to {target}"


@pytest.mark.parametrize("page", LINKING, ids=relative)
def test_every_row_of_a_table_stands_in_one(page):
    lines = prose(page).split("\n")
    heads = [
        number for number, line in enumerate(lines) if line.startswith("|") and not lines[number - 1].startswith("|")
    ]
    assert [lines[number] for number in heads if not re.match(r"\|[-:| ]+\|$", lines[number + 1])] == []


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if page.name != "README.md" and f"({page.name}" not in index] == []


def test_the_page_on_the_architecture_names_what_there_is():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    package = ROOT / "lora_dpo"
    rooms = [path.parent.name for path in package.glob("*/__init__.py")]
    assert [room for room in rooms if f"| `{room}/` |" not in page] == []
    files = re.findall(r"`([a-z_]+/[a-z_/]+\.py)`", page)
    assert len(files) > 40
    assert [name for name in files if not (package / name).is_file() and not (ROOT / name).is_file()] == []


# --- the command line -----------------------------------------------------------------------------


def commands(command, words=()):
    """Yield `(words, command)` for every command that does something."""
    children = getattr(command, "commands", None)
    if children:
        for name, child in children.items():
            yield from commands(child, (*words, name))
    else:
        yield words, command


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_help_and_a_place_in_the_docs(words):
    command = COMMANDS[words]
    assert command.help
    assert [option.name for option in command.params if not getattr(option, "help", None)] == []
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert f"lora-dpo {' '.join(words)}" in text


WITH_A_PAGE = [words for words in COMMANDS if (ROOT / "docs" / f"{words[0]}.md").is_file()]


@pytest.mark.parametrize("words", WITH_A_PAGE, ids=" ".join)
def test_the_page_of_a_command_has_every_option(words):
    text = (ROOT / "docs" / f"{words[0]}.md").read_text(encoding="utf-8")
    options = [flag for option in COMMANDS[words].params for flag in option.opts if flag.startswith("--")]
    assert [flag for flag in options if flag != "--help" and flag not in text] == []


# --- recipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_a_recipe_is_valid_down_to_trl(path, tmp_path):
    from lora_dpo.config.trl_dpo import trainer_config, trainer_settings

    recipe = read_recipe(path)
    trainer_config(trainer_settings(recipe), output_dir=tmp_path, dtype="float32")


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_a_recipe_names_its_command_and_files_that_exist(path):
    header = path.read_text(encoding="utf-8").partition("\nmodel:")[0]
    assert f"lora-dpo train {relative(path)}" in header
    recipe = read_recipe(path)
    named = [recipe.data.train, recipe.data.eval, recipe.evaluation.questions]
    flat = [source for sources in named if sources for source in ([sources] if isinstance(sources, str) else sources)]
    local = [source for source in flat if Path(source).suffix in (".jsonl", ".json", ".csv", ".parquet")]
    assert [source for source in local if not (ROOT / source).is_file()] == []


def test_the_recipe_in_the_docs_is_valid(tmp_path):
    blocks = code_blocks(ROOT / "docs" / "recipe.md", "yaml")
    assert blocks
    for block in blocks:
        (tmp_path / "recipe.yaml").write_text(block, encoding="utf-8")
        read_recipe(tmp_path / "recipe.yaml")


# --- Python ---------------------------------------------------------------------------------------

SNIPPETS = [(page, block) for page in PAGES for block in code_blocks(page, "python")]


def imports_of_ours(tree):
    """Yield `(module, name)` for every `from lora_dpo… import name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lora_dpo":
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize(("page", "snippet"), SNIPPETS, ids=[relative(page) for page, _ in SNIPPETS])
def test_a_snippet_compiles_and_imports_what_exists(page, snippet):
    tree = ast.parse(snippet)
    for module, name in imports_of_ours(tree):
        if module == "lora_dpo":
            assert name in lora_dpo.__all__
        else:
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


@pytest.mark.parametrize(("page", "snippet"), SNIPPETS, ids=[relative(page) for page, _ in SNIPPETS])
def test_a_snippet_calls_our_functions_with_arguments_that_they_have(page, snippet):
    tree = ast.parse(snippet)
    ours = {name: getattr(importlib.import_module(module), name) for module, name in imports_of_ours(tree)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ours):
            continue
        function = ours[node.func.id]
        if isinstance(function, type) and issubclass(function, BaseException):
            continue
        positional = [None] * len(node.args)
        keywords = {keyword.arg: None for keyword in node.keywords}
        inspect.signature(function).bind(*positional, **keywords)


def test_the_docs_show_every_public_verb():
    shown = {name for _, snippet in SNIPPETS for _, name in imports_of_ours(ast.parse(snippet))}
    verbs = {"DPOTrainer", "attach_lora", "generate", "load_base", "merge", "open_chat", "read_pairs", "train"}
    assert verbs <= set(lora_dpo.__all__)
    assert verbs - shown == set()


# --- errors ---------------------------------------------------------------------------------------

FIT = "\u2026"
"""Stands for what a message's code fills in."""


def text_of(node):
    """A text as code writes it, `FIT` for what is filled in; None for what is no text."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or FIT for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = text_of(node.left), text_of(node.right)
        return None if sides == (None, None) else "".join(side or FIT for side in sides)
    return None


@functools.cache
def sentences():
    """Every text of the package's code that is no docstring, whole: parts of an f-string are one text."""
    found = []
    for path in (ROOT / "lora_dpo").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        texts = (text_of(node) for node in ast.walk(tree) if id(node) not in parts | said)
        found += [text for text in texts if text]
    return found


def documented(page):
    """First cells of a page's tables: messages, with `…` for the parts that change."""
    return re.findall(r"^\| `(.+?)` \|", page.read_text(encoding="utf-8"), re.MULTILINE)


def says(sentence, message):
    """True if a text of the code may become this message: its words stand there whole, in this order and together.

    Before them stands nothing, the end of a sentence, or what is filled in; any words if the message begins with `…`.
    """
    body = message.removeprefix(FIT).lstrip()
    before = rf"(?:\A|[.:] ?|{FIT})" if body == message else r"(?<!\w)" if body[:1].isalnum() else ""
    words = "(?s:.*)".join(map(re.escape, body.split(FIT)))
    return re.search(before + words, sentence) is not None


MESSAGES = documented(ROOT / "docs" / "errors.md")


@pytest.mark.parametrize("message", MESSAGES)
def test_a_documented_message_is_in_the_code(message):
    assert any(says(sentence, message) for sentence in sentences())


def test_a_message_that_the_code_does_not_write_is_noticed():
    for message in MESSAGES[::20]:  # each is held against every text of the code
        words = message.split()
        for changed in (
            [*words[:-1], "zz" + words[-1]],
            [words[0] + "zz", *words[1:]] if FIT not in words[0] else None,
        ):
            if changed:
                assert not any(says(sentence, " ".join(changed)) for sentence in sentences()), changed
