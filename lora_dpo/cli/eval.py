"""`lora-dpo eval` and `lora-dpo report`: parse, call, draw."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lora_dpo.cli.options import (
    AdapterName,
    BaseElsewhere,
    ColumnsOption,
    Criterion,
    HeldAsTrained,
    Json,
    JudgePerMinute,
    JudgePrices,
    MaxNewTokens,
    Seed,
    Strict,
    TemplateOption,
)
from lora_dpo.cli.pairs import JUDGE_HELP, endpoint_settings
from lora_dpo.text import json_text

if TYPE_CHECKING:
    from lora_dpo.evaluation.requirements import Requirement
    from lora_dpo.evaluation.result import Assessment

NOT_MET = 3
"""Exit status of an evaluation that ended, and did not meet a requirement."""

out = Console()
err = Console(stderr=True)


def evaluate(
    adapter: AdapterName,
    data: Annotated[list[str], typer.Option("--data", help="Held-out preference pairs; several add up.")],
    columns: ColumnsOption = None,
    judge: Annotated[list[str] | None, typer.Option("--judge", help=f"Who compares answers: {JUDGE_HELP}")] = None,
    votes: Annotated[
        Path | None, typer.Option(help="Blind votes of the demo, in place of a judge (its votes.jsonl).")
    ] = None,
    against: Annotated[str, typer.Option(help="What it is compared with: base, or another adapter.")] = "base",
    require: Annotated[
        list[str] | None,
        typer.Option("--require", help="A bound such as 'accuracy>0.7' or 'win-rate.low>0.5'; exit status 3 if unmet."),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Prompts to answer instead of the data's: text, rows, or preference data.")
    ] = None,
    answers: Annotated[int, typer.Option(min=0, help="How many prompts are answered, spread over them.")] = 64,
    max_new_tokens: MaxNewTokens = 160,
    temperature: Annotated[float, typer.Option(min=0, help="Of the answers that are judged; 0 is greedy.")] = 0.0,
    seed: Seed = 0,
    kl_answers: Annotated[
        int, typer.Option(min=0, help="Answers drawn at temperature 1 to measure KL on; 0 leaves it out.")
    ] = 24,
    text: Annotated[
        Path | None, typer.Option(help="Plain text for perplexity with the adapter and without: what was forgotten.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Longest prompt and answer of a pair, in tokens.")] = 2048,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for report.html and eval.json; must not exist.")
    ] = None,
    as_json: Json = False,
    model: BaseElsewhere = None,
    quantize: HeldAsTrained = None,
    template: TemplateOption = None,
    criterion: Criterion = None,
    judge_per_minute: JudgePerMinute = None,
    judge_prices: JudgePrices = None,
    strict: Strict = False,
) -> None:
    """Say whether an adapter is better, with 95% intervals.

    And what it cost. Loads one base, once. Scores held-out pairs against the reference of the adapter's training, has a
    judge compare answers in both orders, measures KL from the reference, length, endings, repetition and refusals, and
    writes report.html and eval.json.

    Examples:

        lora-dpo eval quickstart --data data/quickstart-eval.jsonl --judge 'rules:length<=40' --judge rules:finished

        lora-dpo eval adapters/beta02 --data eval.jsonl --against adapters/beta01 --judge llm:qwen3:8b@http://server/v1

        lora-dpo eval quickstart --data eval.jsonl --require 'accuracy>0.7' --require 'kl<0.5' --json
    """
    from lora_dpo.adapters.folder import strictness
    from lora_dpo.adapters.loading import load_policy
    from lora_dpo.adapters.store import find_adapter
    from lora_dpo.cli.ready import have_base_of, warn_of_keywords
    from lora_dpo.cli.views import RunView
    from lora_dpo.config.reading import one_of
    from lora_dpo.data.prompts import prompts_with_report
    from lora_dpo.data.rows import refuse_missing
    from lora_dpo.evaluation.evaluate import AssessPlan, assess
    from lora_dpo.evaluation.requirements import parse_requirements
    from lora_dpo.evaluation.saved import evaluation_folder, save_evaluation
    from lora_dpo.judging.policy_and_judge import load_with_judge
    from lora_dpo.model.decoding import Sampling

    if quantize is not None:
        one_of("--quantize", quantize, ("auto", "nf4", "none"))
    requirements = parse_requirements(require or ())
    folder = find_adapter(adapter)
    refuse_missing([*data, *([str(votes)] if votes else [])])
    _check(folder, judge, votes, answers, kl_answers, text, requirements)
    other = against if against == "base" else str(find_adapter(against))
    target = evaluation_folder(folder.resolve().name, output)
    endpoint = endpoint_settings(criterion, judge_per_minute, judge_prices, judge or [])
    asked = None
    if prompts:
        asked, read = prompts_with_report(prompts)
        err.print(f"prompts: {read.summary(prompts)}", highlight=False, markup=False, soft_wrap=True)
    have_base_of(folder, model)
    plan = AssessPlan(
        answers=answers,
        kl_answers=kl_answers,
        sampling=Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=0.95, seed=seed),
        max_length=max_length,
        against=other,
        votes=str(votes) if votes else None,
        text=str(text) if text else None,
        columns=columns or {},
    )
    view = RunView(err)  # progress beside the result, so that the result can be piped
    with strictness(strict):
        with err.status("loading the model"):
            how = {"model": model, "adapter": folder, "quantize": cast(Any, quantize), "chat_template_kwargs": template}
            if judge:
                cache = target.with_name(target.name + ".judge.sqlite")
                policy, judged_by = load_with_judge(judge, cache=cache, endpoint=endpoint, **how)
            else:
                policy, judged_by = load_policy(**how), None
        warn_of_keywords(policy.base.tokenizer, policy.chat_template_kwargs)
        with view.live():
            found = assess(policy, data, plan=plan, judge=judged_by, prompts=asked, on_event=view)
    save_evaluation(target, found)
    _show(found, requirements, target, as_json=as_json)


def _check(
    folder: Path,
    judge: list[str] | None,
    votes: Path | None,
    answers: int,
    kl_answers: int,
    text: Path | None,
    requirements: list[Requirement],
) -> None:
    """Refuse what could not be done, before anything is loaded."""
    from lora_dpo.errors import ConfigError, DataError
    from lora_dpo.evaluation.prequential import at_first_sight
    from lora_dpo.evaluation.requirements import NAMES, check_measurable
    from lora_dpo.judging.specs import check_specs

    if judge and votes:
        raise ConfigError("--judge and --votes both say who wins. Give one of them.")
    if judge and not answers:
        raise ConfigError("--judge compares answers, and --answers is 0. Raise it, or leave --judge out.")
    if judge:
        check_specs(judge)
    if text and not text.is_file():
        raise DataError(f"{text} does not exist. Give a file of plain text.")
    missing = set() if at_first_sight(folder) else {"learned"}
    missing |= set() if judge or votes else {"win-rate", "win-rate-lc"}
    missing |= set() if text else {"perplexity-ratio"}
    missing |= set() if kl_answers and answers else {"kl"}
    missing |= set() if answers else {"length", "length-change", "finished", "repetition", "refusals"}
    check_measurable(requirements, [name for name in NAMES if name not in missing])


def _show(found: Assessment, requirements: list[Requirement], target: Path, *, as_json: bool) -> None:
    numbers = found.numbers()
    unmet = [one for one in requirements if not one.met(numbers)]
    if as_json:
        met = [{"require": one.text, "met": one not in unmet} for one in requirements]
        print(json_text({**found.to_json(), "requirements": met, "report": str(target / "report.html")}))
    else:
        out.print(table(found))
        out.print(found.verdict(), soft_wrap=True, highlight=False)
        for text in found.warnings():
            out.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True, highlight=False)
        if found.cost:
            out.print(f"judge  {found.cost}", highlight=False)
        for one in requirements:
            word = "[red]not met[/]" if one in unmet else "[green]met[/]"
            out.print(f"{word}  {escape(one.seen(numbers))}", highlight=False)
        out.print(f"[green]written[/] [bold]{escape(str(target / 'report.html'))}[/]", soft_wrap=True)
    if unmet:
        raise typer.Exit(NOT_MET)


def table(found: Assessment) -> Table:
    """All numbers with their intervals."""
    from lora_dpo.evaluation.report.write import number_rows

    drawn = Table(title=f"{found.adapter} against {found.against}", title_justify="left")
    for column in ("", "value", "95% interval", "from"):
        drawn.add_column(column, justify="left" if not column else "right")
    for row in number_rows(found.to_json()):
        drawn.add_row(*map(escape, row))
    return drawn


def report(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN…", help="Adapters, evaluations or a search: folders, or their names.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page to write. Default: reports/NAME.html, a free name.")
    ] = None,
    table: Annotated[
        Path | None, typer.Option("--table", help="The results for programs, too: FILE.csv or FILE.json.")
    ] = None,
) -> None:
    """Write one page about a run, or one that compares several.

    Several runs (β, rank, learning rate, seeds) become one page: what differs in their settings, results side by
    side, curves in one plot, and answers to the same prompts. Runs that differ in their seeds alone are one group, too,
    with mean and 95% interval. The page is one file and loads nothing. A search or sweep has its page already; of it
    --table writes every candidate.

    Examples:

        lora-dpo report quickstart

        lora-dpo report adapters/beta01 adapters/beta02 adapters/beta05 --output beta.html

        lora-dpo report adapters/brief.search --table candidates.csv
    """
    from lora_dpo.evaluation.report.table_file import check_table
    from lora_dpo.evaluation.report.write import find_run, write_report
    from lora_dpo.tuning.folder import ENDING, is_search

    if table is not None:
        check_table(table)
    folders = [find_run(name) for name in runs]
    # A search that made no adapter, or a sweep, is found by its own name, too.
    others = [find_run(name + ENDING) for name in runs]
    folders = [
        folder if folder.is_dir() or not is_search(other) else other
        for folder, other in zip(folders, others, strict=True)
    ]
    searches = [folder for folder in folders if is_search(folder)]
    if searches:
        _report_search(searches[0], len(folders), output, table)
        return
    written = [write_report(folders, output, table), *([table] if table else [])]
    for path in written:
        out.print(f"[green]written[/] [bold]{escape(str(path))}[/]", soft_wrap=True)


def _report_search(folder: Path, runs: int, output: Path | None, table: Path | None) -> None:
    from lora_dpo.errors import ConfigError
    from lora_dpo.tuning.folder import PAGE
    from lora_dpo.tuning.table import write_search_report

    if runs > 1:
        raise ConfigError(f"{folder} is a search, which has a page of its own. Name it alone.")
    for path in write_search_report(folder, output, table):
        if path == folder / PAGE:
            out.print(f"page  {escape(str(path))}", soft_wrap=True, highlight=False)
        else:
            out.print(f"[green]written[/] [bold]{escape(str(path))}[/]", soft_wrap=True)
