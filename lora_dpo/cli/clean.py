"""`lora-dpo clean`: show what killed commands left behind, or remove it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

out = Console()


def clean(yes: Annotated[bool, typer.Option("--yes", help="Remove what is shown.")] = False) -> None:
    """Show, or remove, what killed commands left behind.

    In this folder, among the fetched models, and in the system's place for temporary files. Nothing that a process
    still holds is shown, and no run that can go on with --resume.

    Examples:

        lora-dpo clean

        lora-dpo clean --yes
    """
    from lora_dpo import places
    from lora_dpo.cli.cleaning import leftovers, remove

    found = leftovers(dict.fromkeys((Path(), places.project(), *places.models())))
    if not found:
        out.print("Nothing is left behind.")
        return
    left = 0
    for one in found:
        gone = yes and remove(one)
        left += not gone
        said = "removed " if gone else "cannot be removed: " if yes else ""
        line = f"{said}{escape(str(one.path))}  {one.size / 1e6:,.1f} MB  {one.what}"
        out.print(line, highlight=False, soft_wrap=True)
    size = f"{sum(one.size for one in found) / 1e6:,.1f} MB"
    if not yes:
        out.print(f"{len(found)} leftovers, {size}. Remove them with: lora-dpo clean --yes", highlight=False)
    if yes and left:
        raise typer.Exit(1)
