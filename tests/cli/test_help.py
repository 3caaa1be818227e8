"""`--help` on a terminal of 80 columns, and the pages that came with the package."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import typer

from lora_dpo.cli.commands import app, main
from lora_dpo.cli.docs import pages_folder, summaries
from lora_dpo.cli.help import readable

ROOT = Path(__file__).resolve().parent.parent.parent


def words_of(command, words=()):
    yield words
    for name, child in getattr(command, "commands", {}).items():
        yield from words_of(child, (*words, name))


WORDS = list(words_of(typer.main.get_command(app)))


@pytest.fixture
def help_of(monkeypatch, capsys):
    """What `--help` of a command prints on 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")

    def call(words):
        assert main([*words, "--help"]) == 0
        return capsys.readouterr().out

    return call


def test_it_begins_with_what_a_new_person_needs(help_of):
    panels = re.findall(r"─ ([A-Z][\w ,]+) ─", help_of(()))
    assert panels[:2] == ["Options", "Start here"]
    names = re.findall(r"^│ ([a-z]+) ", help_of(()), re.MULTILINE)
    new = [name for name in ("init", "train", "chat", "demo", "eval") if name in names]
    assert names[: len(new)] == new
    assert set(new) >= {"train", "chat", "demo", "eval"}
    assert sorted(names) == sorted(words[0] for words in WORDS if len(words) == 1)


def test_each_command_of_the_first_page_has_one_line(help_of):
    lines = [line for line in help_of(()).partition("Start here")[2].splitlines() if line.startswith("│")]
    assert [line for line in lines if line.startswith("│  ")] == []


@pytest.mark.parametrize("words", WORDS, ids=lambda words: " ".join(words) or "lora-dpo")
def test_nothing_is_wider_than_the_terminal_or_cut(words, help_of):
    text = help_of(words)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in re.sub(r"RUN…|LORA_DPO_API_KEY=…|llm:…", "", text)  # rich cuts with that
    prose = text.partition("╭")[0]
    # a line of prose is full: the next word would not have fitted
    paragraph = [line.rstrip() for line in prose.splitlines()]
    for line, following in pairwise(paragraph):
        if line.strip() and following.strip() and not line.startswith("     ") and not following.startswith("     "):
            assert len(line) + 1 + len(following.split()[0]) > 79, line


@pytest.mark.parametrize("words", [words for words in WORDS if words], ids=" ".join)
def test_an_example_can_be_copied_into_a_shell(words, help_of):
    """Lines that go on end with a backslash, and what a shell makes of them are this command's words."""
    shown = help_of(words).partition("╭")[0]
    examples = re.sub(r" +\\ *\n +", " ", shown)
    for line in re.findall(r"^ +((?:\w+=\S+ )?lora-dpo .*)$", examples.partition("Examples:")[2], re.MULTILINE):
        typed = [word for word in shlex.split(line) if "=" not in word or word.startswith("-")]
        assert typed[0] == "lora-dpo"


@pytest.mark.parametrize("words", [words for words in WORDS if words], ids=" ".join)
def test_it_names_a_page_that_is_there(words, help_of):
    page = re.search(r"More: lora-dpo docs ([\w-]+)", help_of(words))
    assert page or words == ("docs",)
    assert page is None or (ROOT / "docs" / f"{page[1]}.md").is_file()


def test_a_docstring_becomes_paragraphs_and_examples():
    made = readable(
        """Do it.

        One paragraph of
        two lines.

        Examples:

            lora-dpo do one --with "two words" --and "three more words" --until 'the line is full'

            lora-dpo do two
        """,
        "page",
    )
    assert made == (
        "Do it.\n\nOne paragraph of two lines.\n\nExamples:\n\n"
        '    lora-dpo do one --with "two words" --and "three more words" \\\n'
        "        --until 'the line is full'\n"
        "    lora-dpo do two\n\n"
        "More: lora-dpo docs page"
    )


# --- the documentation ----------------------------------------------------------------------------


def test_docs_lists_every_page_with_a_line(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["docs"]) == 0
    shown = capsys.readouterr().out
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"README"}
    listed = summaries((ROOT / "docs" / "README.md").read_text(encoding="utf-8"))
    assert {name for name, _ in listed} == pages
    assert [name for name, text in listed if len(text) < 10 or text.count("(") != text.count(")")] == []
    assert all(re.search(rf"^{name} ", shown, re.MULTILINE) for name in pages)


def test_a_page_is_printed_as_it_is_where_there_is_no_terminal(capsys):
    assert main(["docs", "data"]) == 0
    assert capsys.readouterr().out == (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["data.md", "docs/data.md", "data#the-formats", "docs/data.md#the-formats"])
def test_a_page_is_found_however_a_message_names_it(name, capsys):
    assert main(["docs", name]) == 0
    assert capsys.readouterr().out.startswith("# ")


def test_a_page_that_is_not_there_is_answered_with_the_nearest(capsys):
    assert main(["docs", "dota"]) == 1
    assert "There is no page 'dota'. Did you mean data? List them with: lora-dpo docs" in capsys.readouterr().err


def test_every_page_that_a_message_names_is_there():
    """In the code's own texts: `lora-dpo docs NAME`."""
    named = set()
    for path in (ROOT / "lora_dpo").rglob("*.py"):
        named |= set(re.findall(r"lora-dpo docs ([a-z]+(?:-[a-z]+)*)", path.read_text(encoding="utf-8")))
        assert not re.search(r'^[^#"]*"[^"]*docs/[a-z-]+\.md', path.read_text(encoding="utf-8"), re.MULTILINE), path
    assert len(named) > 3
    assert [name for name in named if not (pages_folder() / f"{name}.md").is_file()] == []


def test_in_a_terminal_a_page_is_drawn(tmp_path):
    """With a pager that a test can read."""
    script = "import sys; from lora_dpo.cli import docs; from rich.console import Console; "
    script += "docs.out = Console(force_terminal=True, width=80, no_color=True); docs.docs('engine')"
    env = {"PAGER": "cat", "PATH": "/usr/bin:/bin", "TERM": "xterm", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env)
    assert "![" not in done.stdout
    assert "<!--" not in done.stdout
    assert "gradient_checkpointing" in done.stdout
