"""`lora-dpo data …`: parse, call, draw."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from lora_dpo.cli.options import ColumnsOption, FormatOption, Seed, TemplateOption
from lora_dpo.errors import ConfigError, DataError
from lora_dpo.text import counted, harmless, json_text, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lora_dpo.data import PreferencePair

app = typer.Typer(help="Look at preference data, clean it, convert it, divide it.", no_args_is_help=True)
out = Console()
err = Console(stderr=True)

Source = Annotated[str, typer.Argument(metavar="FILE", help="A file, a folder of files, or a hub id.")]
Sources = Annotated[list[str], typer.Argument(metavar="FILE...", help="Files, folders of files, or hub ids.")]
MinGap = Annotated[
    float | None, typer.Option("--min-gap", min=0, help="Leave out pairs whose scores are closer than this.")
]
Model = Annotated[
    str | None, typer.Option("--model", help="Also look through the tokenizer and chat template of this model.")
]
MaxLength = Annotated[
    int, typer.Option("--max-length", min=1, help="Longest sequence in tokens, as trainer.max_length.")
]


@app.command()
def check(
    files: Sources,
    held_out: Annotated[
        list[str] | None, typer.Option("--eval", help="Held-out data: their prompts must not be in FILE. Repeatable.")
    ] = None,
    model: Model = None,
    template: TemplateOption = None,
    max_length: MaxLength = 1024,
    format: FormatOption = None,
    columns: ColumnsOption = None,
    min_gap: MinGap = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as JSON, all row numbers included.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with status 1 if there are errors, or no pair.")
    ] = False,
    fix: Annotated[
        Path | None,
        typer.Option("--fix", help="Write clean pairs here (.jsonl), removed rows to the same name + .dropped.jsonl."),
    ] = None,
    learned: Annotated[
        str | None,
        typer.Option(
            "--learned",
            metavar="ADAPTER",
            help="Also list the pairs that disagree most with what this adapter has learnt: look through these for "
            "wrong labels. A DPO adapter that was trained on FILE knows it; else FILE is scored with it.",
        ),
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="With --learned: how many pairs are shown.")] = 20,
    ordered: Annotated[
        Path | None,
        typer.Option("--ordered", help="With --learned: write all pairs here (.jsonl), the most suspicious first."),
    ] = None,
) -> None:
    """Find what in preference data would spoil a run: the doctor.

    Each finding says what it does to DPO, what to do, and in which rows it is. Errors are rows that a run would
    leave out, or that teach something wrong for certain; warnings are worth a look. Nothing is changed without
    --fix.

    Examples:

        lora-dpo data check data/quickstart.jsonl --eval data/quickstart-eval.jsonl

        lora-dpo data check pairs.csv --model smollm2-135m --fix clean.jsonl

        lora-dpo data check pairs.xlsx:Sheet2 --columns 'prompt=Question,chosen=Good answer,rejected=Bad answer'

        lora-dpo data check pairs.jsonl --learned adapters/pairs --ordered look-through.jsonl
    """
    from lora_dpo.cli.data_views import diagnosis_view, fixed_view
    from lora_dpo.cli.learned import suspects_of, suspects_view, write_ordered
    from lora_dpo.data.doctor.examination import examine
    from lora_dpo.data.rows import refuse_missing, refuse_twice
    from lora_dpo.data.write import write_fixed

    refuse_twice(files)
    refuse_missing([*files, *(held_out or ())])
    _check_outputs(fix, learned, ordered)
    with _counting() as count:
        diagnosis = examine(
            files,
            format=format,
            min_gap=min_gap,
            columns=columns,
            held_out=held_out or (),
            tokenizer=_tokenizer(model, template),
            chat_template_kwargs=template,
            max_length=max_length,
            on_rows=count,
        )
    suspects = None
    if learned is not None and diagnosis.pairs:
        suspects = suspects_of(files, learned, format=format, min_gap=min_gap, columns=columns, model=model)
    if as_json:
        typer.echo(json_text({**diagnosis.as_json(), **({"learned": suspects.as_json()} if suspects else {})}))
    else:
        diagnosis_view(diagnosis, out)
        if suspects is not None:
            suspects_view(suspects, str(learned), out, top=top)
    if not diagnosis.report.rows:  # as for a file without a byte: a script must not take it for clean data
        raise DataError(f"{', '.join(files)}: no rows, so nothing was checked. Is it the right file?")
    if fix is not None:
        with err.status(f"writing {fix}"):
            fixed = write_fixed(files, diagnosis, fix, format=format, min_gap=min_gap, columns=columns)
        fixed_view(fixed, err if as_json else out)
    if ordered is not None and suspects is not None:
        write_ordered(suspects, ordered)
        _written(len(suspects.pairs), ordered, err if as_json else out)
    if strict and not diagnosis.pairs:
        raise DataError(
            f"{', '.join(files)}: no pair to train on in {diagnosis.report.rows} rows. Read what was found."
        )
    if strict and diagnosis.errors:
        raise typer.Exit(1)


@app.command()
def show(
    file: Source,
    number: Annotated[int | None, typer.Argument(metavar="[ROW]", help="Row to show; default the first pair.")] = None,
    model: Model = None,
    template: TemplateOption = None,
    max_length: MaxLength = 1024,
    format: FormatOption = None,
    columns: ColumnsOption = None,
) -> None:
    """Show one pair as the model will see it.

    With --model: every token of prompt, chosen and rejected, which of them are trained on, and where max_length
    cuts. Without: the messages.

    Examples:

        lora-dpo data show pairs.jsonl

        lora-dpo data show data/quickstart.jsonl 3 --model smollm2-135m

        lora-dpo data show feedback.csv 12 --format orca --model smollm2-135m --max-length 512
    """
    from lora_dpo.cli.data_views import messages_view, tokens_view
    from lora_dpo.data.read import pair_at
    from lora_dpo.data.token_view import view_pair

    pair = pair_at(file, number, format=format, columns=columns)
    tokenizer = _tokenizer(model, template)
    if tokenizer is None:
        messages_view(pair, out)
    else:
        view = view_pair(tokenizer, pair, max_length=max_length, chat_template_kwargs=template or {})
        tokens_view(view, out, max_length)


@app.command()
def convert(
    file: Source,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="File to write, .jsonl or .jsonl.gz. Must not exist.")],
    format: FormatOption = None,
    columns: ColumnsOption = None,
    min_gap: MinGap = None,
) -> None:
    """Write pairs of any format in the canonical one: TRL's conversational JSONL, with scores and origin.

    Examples:

        lora-dpo data convert feedback-export.json pairs.jsonl

        lora-dpo data convert owner/name:train rated.jsonl.gz --format ratings --min-gap 1
    """
    from lora_dpo.cli.data_views import read_view
    from lora_dpo.data.read import read_pairs
    from lora_dpo.data.write import check_name, write_pairs

    check_name(output)
    with err.status(f"reading {file}"):
        pairs, report = read_pairs(file, format=format, min_gap=min_gap, columns=columns)
        count = write_pairs(pairs, output)
    read_view(report, out)
    _warn_of_templates(pairs)
    _written(count, output)


@app.command()
def split(
    file: Source,
    train: Annotated[Path, typer.Argument(metavar="TRAIN", help="File to write pairs for training to (.jsonl).")],
    held_out: Annotated[Path, typer.Argument(metavar="EVAL", help="File to write held-out pairs to (.jsonl).")],
    share: Annotated[float, typer.Option("--share", min=0.0001, max=0.9999, help="Share of prompts held out.")] = 0.1,
    seed: Seed = 0,
    format: FormatOption = None,
    columns: ColumnsOption = None,
    min_gap: MinGap = None,
) -> None:
    """Divide pairs into training and held-out data, so that no prompt is in both.

    Examples:

        lora-dpo data split pairs.jsonl train.jsonl eval.jsonl

        lora-dpo data split pairs.jsonl train.jsonl eval.jsonl --share 0.05 --seed 1
    """
    from lora_dpo.cli.data_views import read_view
    from lora_dpo.data.read import read_pairs
    from lora_dpo.data.write import split_by_prompt, write_both

    with err.status(f"reading {file}"):
        pairs, report = read_pairs(file, format=format, min_gap=min_gap, columns=columns)
        sides = split_by_prompt(pairs, share, seed=seed)
        write_both(sides, (train, held_out))
    read_view(report, out)
    _warn_of_templates(pairs)
    for side, path in zip(sides, (train, held_out), strict=True):
        _written(len(side), path)


@app.command()
def stats(
    files: Sources,
    model: Model = None,
    template: TemplateOption = None,
    max_length: MaxLength = 1024,
    format: FormatOption = None,
    columns: ColumnsOption = None,
    min_gap: MinGap = None,
) -> None:
    """Describe preference data in numbers: rows, formats, lengths, languages, repeated prompts.

    Examples:

        lora-dpo data stats pairs.jsonl

        lora-dpo data stats mine.jsonl folder-of-more/ --model smollm2-135m --max-length 512
    """
    from lora_dpo.cli.data_views import stats_view
    from lora_dpo.data.doctor.examination import examine
    from lora_dpo.data.rows import refuse_missing, refuse_twice

    refuse_twice(files)
    refuse_missing(files)
    with _counting() as count:
        diagnosis = examine(
            files,
            format=format,
            min_gap=min_gap,
            columns=columns,
            tokenizer=_tokenizer(model, template),
            chat_template_kwargs=template,
            max_length=max_length,
            on_rows=count,
        )
    stats_view(diagnosis, out)


@app.command("mix")
def mix_files(
    parts: Annotated[list[str], typer.Argument(metavar="FILE:SHARE...", help="Sources with shares: a.jsonl:0.7")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write (.jsonl). Must not exist.")],
    size: Annotated[int | None, typer.Option("--size", min=1, help="Pairs in all; default as many as fit.")] = None,
    seed: Seed = 0,
    format: FormatOption = None,
    columns: ColumnsOption = None,
    min_gap: MinGap = None,
) -> None:
    """Mix sources in given shares, without repeating a pair, shuffled.

    Examples:

        lora-dpo data mix mine.jsonl:0.7 public.jsonl:0.3 --output mixed.jsonl

        lora-dpo data mix mine.jsonl:2 owner/name:test:1 --size 5000 --seed 1 --output mixed.jsonl.gz
    """
    from lora_dpo.cli.data_views import read_view
    from lora_dpo.data.read import read_pairs
    from lora_dpo.data.rows import refuse_twice
    from lora_dpo.data.write import check_name, mix, write_pairs

    check_name(output)
    named = [_share(part) for part in parts]
    refuse_twice([source for source, _ in named])
    with err.status("reading"):
        read = [
            (*read_pairs(source, format=format, min_gap=min_gap, columns=columns), share) for source, share in named
        ]
        count = write_pairs(mix([(pairs, share) for pairs, _, share in read], size=size, seed=seed), output)
    for (source, _), (_, report, _) in zip(named, read, strict=True):
        out.print(f"\n{harmless(source)}", highlight=False, markup=False, soft_wrap=True)
        read_view(report, out)
    out.print()
    _warn_of_templates([pair for pairs, _, _ in read for pair in pairs])
    _written(count, output)


def _warn_of_templates(pairs: Sequence[PreferencePair]) -> None:
    from lora_dpo.data.template_notes import note_of_templates

    text = note_of_templates(pairs, "pairs")
    if text:
        _warn(text)


def _warn(text: str) -> None:
    err.print(f"[yellow]warning:[/] {escape(harmless(text))}", highlight=False, soft_wrap=True)


def _written(pairs: int, path: Path, console: Console | None = None) -> None:
    text = harmless(f"{counted(pairs, 'pair')} written to {path}")
    (console or out).print(text, highlight=False, markup=False, soft_wrap=True)


def _check_outputs(fix: Path | None, learned: str | None, ordered: Path | None) -> None:
    """Refuse what could not be written, before anything is read."""
    from lora_dpo.adapters.store import find_adapter
    from lora_dpo.data.write import check_name, dropped_of
    from lora_dpo.files import refuse_existing, refuse_unwritable

    if ordered is not None and learned is None:
        raise ConfigError("--ordered writes pairs in the order of what an adapter has learnt. Name it with --learned.")
    if learned is not None:
        find_adapter(learned)
    outputs = [*([fix, dropped_of(fix)] if fix is not None else []), *([ordered] if ordered is not None else [])]
    if len(set(outputs)) < len(outputs):
        raise ConfigError(f"{ordered} is named twice: each file needs a name of its own.")
    for path in outputs:
        check_name(path)
        refuse_existing(path)
        refuse_unwritable(path)


def _share(part: str) -> tuple[str, float]:
    source, _, share = part.rpartition(":")
    try:
        weight = float(share)
    except ValueError:
        weight = 0.0
    if not source or not 0 < weight < float("inf"):
        raise ConfigError(
            f"{shown(part)} names no share: write FILE:SHARE with a share above 0, such as pairs.jsonl:0.7."
        )
    return source, weight


def _tokenizer(model: str | None, template: dict[str, Any] | None) -> PreTrainedTokenizerBase | None:
    if model is None:
        if template:
            raise ConfigError("--template is for the chat template of a model: name it with --model.")
        return None
    from lora_dpo.cli.ready import have_model, warn_of_keywords
    from lora_dpo.model.base import load_tokenizer

    have_model(model)
    with err.status(f"loading the tokenizer of {model}"):
        tokenizer = load_tokenizer(model)
    warn_of_keywords(tokenizer, template or {})
    return tokenizer


@contextmanager
def _counting() -> Iterator[Callable[[int], None]]:
    """A status line with the number of rows read."""
    with err.status("reading") as status:

        def count(rows: int) -> None:
            if rows % 1000 == 0:
                status.update(f"{rows:,} rows")

        yield count
