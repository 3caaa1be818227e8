"""`lora-dpo docs`: the documentation that came with the package, to list and to read."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

out = Console()

INDEX = "README"
"""The page that lists the others, each with a line."""


def docs(
    page: Annotated[
        str | None, typer.Argument(metavar="[PAGE]", help="A page to read, such as data. Without one: list them.")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Print the page as it is written, in Markdown.")] = False,
) -> None:
    """Read the documentation, without a network.

    Every page came with the package. In a terminal one opens in your pager; elsewhere it is printed as it is written.

    Examples:

        lora-dpo docs

        lora-dpo docs data

        lora-dpo docs errors --plain | grep -i memory
    """
    from rich.markdown import Markdown

    from lora_dpo.config.reading import nearest
    from lora_dpo.errors import ConfigError
    from lora_dpo.text import shown

    folder = pages_folder()
    if page is None:
        _list(folder)
        return
    names = sorted(path.stem for path in folder.glob("*.md"))
    name = Path(page.partition("#")[0]).stem  # as a link has it: docs/data.md#the-formats
    if name not in names:
        raise ConfigError(f"There is no page {shown(page)}.{nearest(name, names)} List them with: lora-dpo docs")
    text = (folder / f"{name}.md").read_text(encoding="utf-8")
    if plain or not out.is_terminal:
        sys.stdout.write(text)
        return
    os.environ.setdefault("LESS", "FRX")  # as git does: colours, and no pager for what fits
    with out.pager(styles=os.name != "nt"):  # more of Windows shows their codes
        out.print(Markdown(without_pictures(text)))


def pages_folder() -> Path:
    """Where the pages are: in the package as it was built, or in the repository that it runs from.

    Raises:
        OutputError: they are in neither.
    """
    from lora_dpo.errors import OutputError

    package = Path(__file__).resolve().parent.parent
    for folder in (package / "docs", package.parent / "docs"):
        if (folder / f"{INDEX}.md").is_file():
            return folder
    raise OutputError(f"The documentation is not beside the package in {package}. Install lora-dpo again.")


def summaries(index: str) -> list[tuple[str, str]]:
    """Page and summary of each entry of the index, in its order; an entry may name a second page."""
    found: dict[str, str] = {}
    entries = re.findall(r"^(?:\d+\.|-) (\[.*(?:\n  .*)*)", index, re.MULTILINE)
    for entry in (" ".join(entry.split()) for entry in entries):
        for name, text in re.findall(r"\[[^]]+\]\((\w[\w-]*)\.md\):? ((?:(?!;|\.(?: |$)).)*)", entry):
            found.setdefault(name, text.strip())
    return list(found.items())


def without_pictures(text: str) -> str:
    """A page without its images and HTML comments, which a terminal cannot show."""
    return re.sub(r"!\[[^]]*\]\([^)]*\)|<!--.*?-->", "", text, flags=re.DOTALL)


def _list(folder: Path) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in summaries((folder / f"{INDEX}.md").read_text(encoding="utf-8")):
        table.add_row(name, escape(text))
    out.print(table)
    out.print("Read one with: lora-dpo docs PAGE", highlight=False)
