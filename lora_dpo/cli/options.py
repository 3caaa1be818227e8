"""Options that several commands share: one name, one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_dpo.config.column_names import parse_columns
from lora_dpo.config.template_kwargs import parse_template_kwargs

STRICT = "Refuse a base that differs from the adapter's passport in any way; otherwise that is a warning."

FORMAT_HELP = (
    "Format of all rows: openwebui, shp, nectar, stackexchange, ratings, openai, swift, axolotl, winner, sharegpt, "
    "llamafactory-v1, alpaca, orca, argilla, kto, hh-rlhf or trl (lora-dpo docs data). Without it: look at each row."
)

AdapterName = Annotated[str, typer.Argument(help="A name in adapters/, or an adapter folder.")]
BaseElsewhere = Annotated[
    str | None, typer.Option("--model", help="Where the base model is, if not where the adapter's passport says.")
]
BaseModel = Annotated[
    str, typer.Option("--model", help="The base model: a name of `lora-dpo models list`, a folder, or a hub id.")
]
ColumnsOption = Annotated[
    dict | None,  # type: ignore[type-arg]  # typer reads a bare type alone
    typer.Option(
        "--columns",
        parser=parse_columns,
        metavar="NAMES",
        help="What columns are that have names of their own: 'prompt=Question, chosen=Good answer, rejected=Bad "
        "answer' (lora-dpo docs data).",
    ),
]
Criterion = Annotated[str | None, typer.Option(help="What an LLM judge is to look at.")]
FormatOption = Annotated[str | None, typer.Option("--format", help=FORMAT_HELP)]
HeldAs = Annotated[
    str, typer.Option("--quantize", help="auto: as it is stored quantised, else nf4. nf4: in 4 bits. none: as stored.")
]
HeldAsTrained = Annotated[
    str | None,
    typer.Option("--quantize", help="How the base is held: auto, nf4 or none. By default as the adapter was trained."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")]
JudgePerMinute = Annotated[float | None, typer.Option(min=0.1, help="Most requests to an LLM judge.")]
JudgePrices = Annotated[
    str | None, typer.Option(help="IN,OUT: prices of a million tokens, to count an LLM judge's cost.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
NameHere = Annotated[str | None, typer.Option("--name", help="Its name here; by default its own.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, with dots: trainer.beta=0.2 lora.rank=8"),
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")]
RecipeFile = Annotated[Path, typer.Argument(help="The recipe, a YAML file such as configs/quickstart.yaml.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the draws.")]
Strict = Annotated[bool, typer.Option("--strict", help=STRICT)]
StrictAboutAll = Annotated[
    bool, typer.Option("--strict", help="Leave out adapters whose base differs in any way from this one.")
]
StrictAboutReference = Annotated[bool, typer.Option("--strict", help=f"With reference: adapter:PATH. {STRICT}")]
TemplateOption = Annotated[
    dict | None,  # type: ignore[type-arg]  # typer reads a bare type alone
    typer.Option(
        "--template",
        parser=parse_template_kwargs,
        metavar="KEYWORDS",
        help="Keywords for the chat template, such as enable_thinking=false; of an adapter on top of its own.",
    ),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
