"""The command line: parse, call, draw. Errors become one line and exit status 1, bugs a report and 70."""

from __future__ import annotations

import io
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from lora_dpo.cli import pairs
from lora_dpo.cli.adapters import app as adapters_app
from lora_dpo.cli.chat import chat
from lora_dpo.cli.clean import clean
from lora_dpo.cli.crash import first_line, quiet_exit, write_crash
from lora_dpo.cli.data import app as data_app
from lora_dpo.cli.demo import demo
from lora_dpo.cli.docs import docs
from lora_dpo.cli.eval import evaluate, report
from lora_dpo.cli.export import export
from lora_dpo.cli.help import make_readable
from lora_dpo.cli.init import ModelToTune, Preset, init, recipe_of
from lora_dpo.cli.merge import merge
from lora_dpo.cli.models import app as models_app
from lora_dpo.cli.options import ColumnsOption, Overrides, StrictAboutReference
from lora_dpo.cli.plan import plan
from lora_dpo.cli.ready import have_model
from lora_dpo.cli.serve import serve
from lora_dpo.cli.tune import sweep, tune
from lora_dpo.errors import BaseDiffers, LoraDPOError
from lora_dpo.files import refusal
from lora_dpo.systems import make_writable, nobody_reads


class InOrder(TyperGroup):
    """Lists commands and groups of commands in the order of `_PANELS`; typer has the groups last."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of all commands."""
        return [name for commands in _PANELS.values() for name in commands]


app = typer.Typer(
    name="lora-dpo",
    cls=InOrder,
    no_args_is_help=True,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

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

    New here? lora-dpo train pairs.csv trains on your pairs; lora-dpo init puts the quickstart with its data into this
    folder, for lora-dpo train configs/quickstart.yaml. Read on with lora-dpo docs.
    """
    if version:
        from lora_dpo import __version__

        out.print(f"lora-dpo {__version__}", highlight=False)
        raise typer.Exit


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE|DATA", help="A recipe, or pairs: a file or folder.")],
    overrides: Overrides = None,
    model: ModelToTune = None,
    preset: Preset = None,
    columns: ColumnsOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run of this recipe.")] = False,
    show_dropped: Annotated[
        bool, typer.Option("--show-dropped", help="List every data row that was left out, with its reason.")
    ] = False,
    strict: StrictAboutReference = False,
) -> None:
    """Train an adapter as a recipe says.

    Prints what was resolved before loading any weights; measures held-out pairs and answers before and
    after. Ctrl-C saves a checkpoint and prints the command that resumes. For pairs in place of a recipe it first
    writes one beside them, as lora-dpo init does.

    Examples:

        lora-dpo train configs/quickstart.yaml

        lora-dpo train pairs.csv

        lora-dpo train configs/quickstart.yaml trainer.beta=0.2 lora.rank=8 output=adapters/beta02
    """
    from lora_dpo.adapters.checkpoints import checkpoints
    from lora_dpo.adapters.folder import strictness
    from lora_dpo.adapters.run_folder import partial_of, resume_command
    from lora_dpo.cli.signals import stop_on_signals
    from lora_dpo.cli.views import RunView
    from lora_dpo.config.reading import read_recipe
    from lora_dpo.events import Stopped, StopSignal
    from lora_dpo.training.prepare import check_early, with_reference
    from lora_dpo.training.run import train as run_training

    recipe = recipe_of(recipe, overrides, model, preset, columns)
    settings = with_reference(read_recipe(recipe, overrides or ()))
    check_early(settings)
    have_model(settings.model.name)
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


# `--help` lists them in this order, panel by panel: first what a new person needs.
_PANELS: dict[str, dict[str, Callable[..., Any] | typer.Typer]] = {
    "Start here": {"init": init, "train": train, "chat": chat, "demo": demo, "eval": evaluate},
    "Your data": {"data": data_app, "pairs": pairs.pairs},
    "Before, beside and after a run": {
        "plan": plan,
        "recipe": recipe_help,
        "tune": tune,
        "sweep": sweep,
        "improve": pairs.improve,
        "report": report,
    },
    "What becomes of an adapter": {"adapters": adapters_app, "serve": serve, "merge": merge, "export": export},
    "This machine": {"models": models_app, "clean": clean, "docs": docs},
}
_PAGES = {name: name for commands in _PANELS.values() for name in commands} | {
    "clean": "adapter-folder",
    "docs": "",
    "sweep": "tune",
}
"""The page of `lora-dpo docs` that tells of a command."""
for _panel, _commands in _PANELS.items():
    for _name, _what in _commands.items():
        if isinstance(_what, typer.Typer):
            app.add_typer(_what, name=_name, rich_help_panel=_panel)
        else:
            app.command(_name, rich_help_panel=_panel)(_what)
make_readable(app, _PAGES)


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
