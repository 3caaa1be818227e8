"""The commands that make preference pairs from a model's own answers: parse, call, draw."""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lora_dpo.cli.options import (
    ColumnsOption,
    Criterion,
    FormatOption,
    HeldAsTrained,
    JudgePerMinute,
    JudgePrices,
    MaxNewTokens,
    Overrides,
    Seed,
    Strict,
    StrictAboutReference,
    TemplateOption,
)
from lora_dpo.text import counted, harmless, shown

if TYPE_CHECKING:
    from lora_dpo.judging.pair_making import PairReport

out = Console()
err = Console(stderr=True)

JUDGE_HELP = (
    "rules:RULE such as rules:length<=40, reward:MODEL, llm:MODEL@URL, implicit, or module:function. Several add up."
)


def pairs(
    prompts: Annotated[
        str, typer.Argument(help="Prompts: a .txt with one a line, rows with 'prompt', or preference data.")
    ],
    judge: Annotated[list[str], typer.Option("--judge", help=JUDGE_HELP)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .jsonl or .jsonl.gz to write. Must not exist.")],
    model: Annotated[
        str | None, typer.Option(help="The model that answers: a packaged name, a folder, or a hub id.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="An adapter on it: a name, or a folder. Its base is then found by itself.")
    ] = None,
    answers: Annotated[int, typer.Option(min=2, help="Answers sampled to each prompt.")] = 4,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use this many prompts, spread evenly over the file.")
    ] = None,
    format: FormatOption = None,
    columns: ColumnsOption = None,
    temperature: Annotated[float, typer.Option(min=0.01, help="Higher is more varied.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.01, max=1, help="Draw from the likeliest tokens of this share.")] = 0.95,
    max_new_tokens: MaxNewTokens = 256,
    seed: Seed = 0,
    system: Annotated[str | None, typer.Option(help="A system turn while sampling; no part of the pairs.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers decoded together.")] = 32,
    select: Annotated[
        str, typer.Option(help="best-worst: at most one pair a prompt. gaps: all that are far enough apart.")
    ] = "best-worst",
    min_gap: Annotated[float, typer.Option(min=0, help="Smallest difference of two scores.")] = 0.0,
    samples: Annotated[
        Path | None, typer.Option(help="Where answers are kept; name an earlier run's file to judge them anew.")
    ] = None,
    quantize: HeldAsTrained = None,
    template: TemplateOption = None,
    criterion: Criterion = None,
    judge_per_minute: JudgePerMinute = None,
    judge_prices: JudgePrices = None,
    strict: Strict = False,
) -> None:
    """Make preference pairs from a model's own answers.

    Samples several answers to each prompt, has a judge score them, and writes the best against the worst
    as training data. Run the same command again to go on after an interruption: nothing is sampled twice.

    Examples:

        lora-dpo pairs prompts.txt --model smollm2-135m --judge 'rules:length<=40' -o pairs.jsonl

        lora-dpo pairs p.txt --adapter quickstart --judge llm:qwen3:8b@http://localhost:11434/v1 -o pairs.jsonl

        lora-dpo pairs p.jsonl --model smollm2-135m --judge my_judge:score --select gaps --min-gap 0.5 -o pairs.jsonl

    Rules to judge by, each a score from 0 to 1 (lora-dpo docs judges has all):

        --judge 'rules:length<=40'         words; sentences, chars, tokens, too

        --judge 'rules:regex=^Dear '       it is found in the answer

        --judge 'rules:keywords=lake,sea'  the share of them that is there

        --judge rules:json                 the whole answer is valid JSON

        --judge rules:exact                it is a known answer

        --judge rules:numeric              its last number is a known one

    exact, contains and numeric compare with 'accepted' in the rows of PROMPTS. A weight is a number before it:
    --judge '0.5*rules:no-repeat'.
    """
    from lora_dpo.adapters.folder import strictness
    from lora_dpo.adapters.store import find_adapter
    from lora_dpo.cli.ready import have_base_of, have_model, warn_of_keywords
    from lora_dpo.cli.views import RunView
    from lora_dpo.data.prompts import prompts_with_report
    from lora_dpo.judging.pair_making import Selection, make_pairs
    from lora_dpo.judging.policy_and_judge import load_with_judge
    from lora_dpo.judging.samples import SamplePlan
    from lora_dpo.judging.specs import check_specs
    from lora_dpo.model.decoding import Sampling

    one_of("--select", select, ("best-worst", "gaps"))
    if quantize is not None:
        one_of("--quantize", quantize, ("auto", "nf4", "none"))
    _check_places(output, samples)
    check_specs(judge)
    folder = find_adapter(adapter) if adapter else None
    endpoint = endpoint_settings(criterion, judge_per_minute, judge_prices, judge)
    asked, read = prompts_with_report(prompts, limit=limit, format=format, columns=columns)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    plan = SamplePlan(answers=answers, sampling=sampling, system=system, batch_size=batch_size)
    if folder is not None:
        have_base_of(folder, model)
    elif model is not None:
        have_model(model)
    with strictness(strict), err.status("loading the model"):
        policy, judged_by = load_with_judge(
            judge,
            cache=output.with_name(output.name + ".judge.sqlite"),
            endpoint=endpoint,
            model=model,
            adapter=folder,
            quantize=cast(Any, quantize),
            chat_template_kwargs=template,
        )
    warn_of_keywords(policy.base.tokenizer, policy.chat_template_kwargs)
    show_lines(
        [
            ("model", policy.base.name + (f" with {folder}" if folder else "")),
            ("judge", judged_by.spec + (f" ({judged_by.about})" if judged_by.about else "")),
            ("prompts", read.summary(prompts)),
            ("answers", f"{answers} a prompt, temperature {temperature:g}, at most {max_new_tokens} tokens"),
            ("output", str(output)),
        ]
    )
    view = RunView(out)
    selection = Selection(select=cast(Literal["best-worst", "gaps"], select), min_gap=min_gap)
    try:
        with view.live():
            report = make_pairs(
                asked, policy, judged_by, output, plan=plan, selection=selection, samples=samples, on_event=view
            )
    except KeyboardInterrupt:
        out.print("Stopped. What was sampled and judged is kept: the same command goes on.")
        raise
    show_report(report)


def _check_places(output: Path, samples: Path | None) -> None:
    """Refuse, before anything is loaded, what could not be written."""
    from lora_dpo.data.write import check_name
    from lora_dpo.files import refuse_existing, refuse_unwritable

    check_name(output)
    refuse_existing(output)
    for path in (output, samples or output.with_name(output.name + ".samples.jsonl")):
        refuse_unwritable(path)


def endpoint_settings(criterion: str | None, per_minute: float | None, prices: str | None, judges: list[str]) -> Any:
    """The options of an LLM judge, refused where there is none."""
    from dataclasses import replace

    from lora_dpo.errors import ConfigError
    from lora_dpo.judging.endpoint import EndpointSettings

    given = {"--criterion": criterion, "--judge-per-minute": per_minute, "--judge-prices": prices}
    unused = [name for name, value in given.items() if value is not None]
    if unused and not any("llm:" in spec for spec in judges):
        raise ConfigError(f"{unused[0]} is about an LLM judge, and there is none. Remove it, or add --judge llm:….")
    settings = EndpointSettings(per_minute=per_minute)
    if prices is not None:
        try:
            prompt_price, answer_price = map(float, prices.split(","))
            if not (0 <= prompt_price < inf and 0 <= answer_price < inf):
                raise ValueError
        except ValueError:
            raise ConfigError(
                f"--judge-prices is {shown(prices)}: write two numbers, 0 or more, such as 0.15,0.6."
            ) from None
        settings = replace(settings, prices=(prompt_price, answer_price))
    return replace(settings, criterion=criterion) if criterion else settings


def show_lines(lines: list[tuple[str, str]]) -> None:
    """What was resolved, before the work begins."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in lines:
        table.add_row(label, escape(harmless(value)))
    out.print(table)
    out.print()


def show_report(report: PairReport) -> None:
    """What came out, every prompt accounted for."""
    out.print(
        f"\n[green]written[/] [bold]{escape(str(report.output))}[/]   {counted(report.pairs, 'pair')}", soft_wrap=True
    )
    score = "none" if report.mean_score is None else f"{report.mean_score:.3f}"
    lines = [("mean score", f"{score} over {counted(report.answers, 'answer')}")]
    used = report.prompts - sum(report.skipped.values())
    reasons = "".join(f", {count} {reason}" for reason, count in report.skipped.most_common())
    lines.append(("prompts", f"{used} of {report.prompts} gave pairs{reasons}"))
    lines.append(
        (
            "length",
            f"chosen {counted(round(report.chosen_words), 'word')}, rejected {report.rejected_words:.0f}; "
            f"the chosen one is longer in {report.chosen_longer:.0%} of the pairs",
        )
    )
    if report.cost:
        lines.append(("judge", report.cost))
    show_lines(lines)


def one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise `ConfigError` for a value that an option does not know."""
    from lora_dpo.config.reading import nearest
    from lora_dpo.errors import ConfigError

    if value not in allowed:
        raise ConfigError(f"{option} is {shown(value)}: allowed are {', '.join(allowed)}.{nearest(value, allowed)}")


def improve(
    recipe: Annotated[
        Path, typer.Argument(help="A recipe with an improve: section, such as configs/improve/quickstart.yaml.")
    ],
    overrides: Overrides = None,
    strict: StrictAboutReference = False,
) -> None:
    """Improve a model on its own answers, round by round.

    Each round samples answers, has the judge score them, trains on the pairs, and measures the judge's score
    on held-out prompts. Ends when a round no longer raises that score. Run the same command again to go on
    after an interruption.

    Examples:

        lora-dpo improve configs/improve/quickstart.yaml

        lora-dpo improve configs/improve/quickstart.yaml improve.rounds=1 output=adapters/short
    """
    from lora_dpo.adapters.folder import strictness
    from lora_dpo.cli.ready import have_model
    from lora_dpo.cli.signals import stop_on_signals
    from lora_dpo.cli.views import RunView
    from lora_dpo.config.improve_recipe import read_improve_recipe
    from lora_dpo.events import Stopped, StopSignal
    from lora_dpo.training.improve_rounds import improve as run_rounds
    from lora_dpo.training.improve_rounds import read_rounds

    settings = read_improve_recipe(recipe, overrides or ())
    read_rounds(settings)  # what is wrong with it, before a model is fetched
    have_model(settings.model.name)
    view, stop = RunView(out), StopSignal()
    try:
        with strictness(strict), stop_on_signals(stop, err.print), view.live():
            result = run_rounds(settings, name=recipe.stem, on_event=view, stop=stop)
    except (Stopped, KeyboardInterrupt):
        out.print("Stopped. What is finished is kept: the same command goes on.")
        raise typer.Exit(130) from None
    if result.cost:
        out.print(f"judge  {result.cost}", highlight=False)
    if result.adapter is None or result.best == 0:
        out.print("No round was better than the start.")
    else:
        out.print(f"[green]best[/] round {result.best}: [bold]{escape(str(result.adapter))}[/]", soft_wrap=True)
