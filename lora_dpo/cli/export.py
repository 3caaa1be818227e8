"""`lora-dpo export`: parse, call, draw."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from lora_dpo.cli.merge import base_text, say_keywords
from lora_dpo.cli.options import BaseElsewhere, Strict
from lora_dpo.systems import command_line

out = Console()
err = Console(stderr=True)

_NOT_ITS_BASE = {
    "gguf-adapter": "It was trained on 4-bit weights and is itself only on their values: make that base with "
    "lora-dpo export BASE --to gguf --into trained-base.",
    "peft": "It was trained on 4-bit weights; a server that holds the base in 16 bits answers otherwise. What was "
    "measured is served by the folder of: lora-dpo merge ADAPTER --into trained-base.",
}


def export(
    source: Annotated[
        str,
        typer.Argument(help="An adapter: its folder, or its name in adapters/. For gguf and ollama also a base model."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file or folder to write. Must not exist.")],
    to: Annotated[str, typer.Option(help="gguf-adapter, gguf, ollama or peft.")] = "gguf",
    kind: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0; with llama.cpp's llama-quantize q4_k_m and the other "
            "K-quants. Default f16; f32 for gguf-adapter.",
        ),
    ] = None,
    into: Annotated[
        str | None,
        typer.Option(help="What is merged into, as in merge: base16 or trained-base. Default: what it was trained on."),
    ] = None,
    model: BaseElsewhere = None,
    strict: Strict = False,
) -> None:
    """Write an adapter for llama.cpp, Ollama or PEFT servers.

    gguf-adapter is a LoRA file for llama.cpp --lora, on top of the base in GGUF; gguf is the merged model in one file;
    ollama is a folder with that file and a Modelfile; peft is the adapter without this tool's own files.

    Examples:

        lora-dpo export adapters/quickstart --to gguf --type q8_0 --output quickstart-q8_0.gguf

        lora-dpo export adapters/quickstart --to gguf-adapter --output quickstart-lora.gguf

        lora-dpo export smollm2-135m --to gguf --into trained-base --output smollm2-135m-nf4.gguf

        lora-dpo export adapters/quickstart --to ollama --output ollama/quickstart
    """
    from lora_dpo.adapters.folder import strictness
    from lora_dpo.cli.ready import have_base_of, have_model
    from lora_dpo.cli.views import stages
    from lora_dpo.config.reading import one_of
    from lora_dpo.files import refuse_existing
    from lora_dpo.release.exports.export_adapter import adapter_of
    from lora_dpo.release.exports.export_adapter import export as run_export
    from lora_dpo.release.merge_base import trained_into

    one_of("--to", to, ("gguf-adapter", "gguf", "ollama", "peft"))
    if into is not None:
        one_of("--into", into, ("base16", "trained-base"))
    adapter = adapter_of(source)
    refuse_existing(output)
    if adapter and to != "peft":  # which is a copy
        have_base_of(adapter, model)
    elif not adapter and to in ("gguf", "ollama"):
        have_model(source)
    with strictness(strict), stages(err) as stage:
        path = run_export(
            source,
            output,
            to=to,  # type: ignore[arg-type]
            kind=kind,
            into=into,  # type: ignore[arg-type]
            model=model,
            on_tensor=lambda done, total: stage("exporting", done, total),
        )
    out.print(f"[green]exported[/] {escape(source)} as {to}: [bold]{escape(str(path))}[/]", soft_wrap=True)
    if to in ("gguf", "ollama"):
        which = into or (trained_into(adapter, model) if adapter else "base16")
        out.print(
            f"  {'merged into' if adapter else 'the weights are'} {which}: {base_text(which, adapter)}", highlight=False
        )
    elif adapter and _trained_on_quantised(adapter):
        out.print(f"  {_NOT_ITS_BASE[to]}", highlight=False, soft_wrap=True)
    say_keywords(adapter, held=to in ("gguf", "ollama"))
    if to == "ollama":
        words = ["ollama", "create", path.name, "-f", str(path / "Modelfile")]
        out.print(f"  {escape(command_line(words))}", soft_wrap=True)


def _trained_on_quantised(adapter: Path) -> bool:
    from lora_dpo.adapters.passport import read_passport

    passport = read_passport(adapter)
    return passport is not None and passport.quantize != "none"
