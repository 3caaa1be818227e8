"""`lora-dpo models …`: parse, call, draw."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from lora_dpo.cli.options import Json
from lora_dpo.text import json_text

app = typer.Typer(help="Base models: those of a package index, and what works of any.", no_args_is_help=True)
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


@app.command("check")
def check(
    name: Annotated[str, typer.Argument(help="A packaged model, a model folder, or a hub id.")],
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub model.")] = None,
    as_json: Json = False,
) -> None:
    """Say what of a base model works here: chat template, engine, LoRA, memory, export.

    From its configuration and tokenizer alone: no weights are read. The engine is tried on a small random copy.

    Examples:

        lora-dpo models check smollm2-135m

        lora-dpo models check Qwen/Qwen3-1.7B --json
    """
    from lora_dpo.cli.model_check import check_model, lines

    found = check_model(name, revision=revision)
    if as_json:
        print(json_text(found.to_json()))
        return
    for label, value in lines(found):
        out.print(f"{label:8}  {escape(value)}", highlight=False, soft_wrap=True)
