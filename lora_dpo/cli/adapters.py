"""`lora-dpo adapters …`: parse, call, draw."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lora_dpo.cli.options import AdapterName, BaseElsewhere, NameHere, Strict, Yes

if TYPE_CHECKING:
    from lora_dpo.release.mixture import Mixed

app = typer.Typer(help="The adapters on this machine: list, check, share, mix.", no_args_is_help=True)
out = Console()
err = Console(stderr=True)


@app.command("list")
def list_() -> None:
    """List the adapters in adapters/: base, rank, size, date, held-out accuracy, whether verified here.

    Example:

        lora-dpo adapters list
    """
    from lora_dpo import places
    from lora_dpo.adapters.store import list_adapters

    rows = list_adapters()
    if not rows:
        nothing = f"There is no adapter in {places.adapters()}/."
        out.print(
            f"{escape(nothing)} Train one with: lora-dpo train DATA, or begin with: lora-dpo init", soft_wrap=True
        )
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("name", "base", "rank", "size", "made", "accuracy", "verified"):
        table.add_column(column, overflow="fold", justify="right" if column in ("rank", "size", "accuracy") else "left")
    for row in rows:
        accuracy = "" if row.accuracy is None else f"{row.accuracy:.3f}"
        rank = str(row.rank or "")
        cells = (row.name, row.base, rank, f"{row.size / 1e6:.1f} MB", row.created, accuracy, row.state)
        table.add_row(*map(escape, cells))
    out.print(table)


@app.command()
def show(name: AdapterName) -> None:
    """Show what an adapter is and what it was made from.

    Example:

        lora-dpo adapters show quickstart
    """
    from lora_dpo.adapters.describe import describe
    from lora_dpo.adapters.store import find_adapter

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in describe(find_adapter(name)):
        table.add_row(escape(key), escape(value))
    out.print(table)


@app.command()
def verify(name: AdapterName, model: BaseElsewhere = None, strict: Strict = False) -> None:
    """Rescore an adapter's few stored pairs and compare with the scores that it was shared with.

    Exit status 1 if it does not score as it did.

    Example:

        lora-dpo adapters verify quickstart
    """
    from lora_dpo.adapters.folder import strictness
    from lora_dpo.adapters.store import find_adapter, record_verified
    from lora_dpo.cli.ready import have_base_of
    from lora_dpo.errors import AdapterError
    from lora_dpo.evaluation.verify_adapter import verify as run_verify

    folder = find_adapter(name)
    have_base_of(folder, model)
    with strictness(strict), err.status("rescoring the stored pairs"):
        found = run_verify(folder, model=model)
    out.print(
        f"adapter: {found.adapter_drift:.2g} nats a token from its stored scores (its effect is {found.effect:.2g})\n"
        f"base:    {found.base_drift:.2g} nats a token\n"
        f"pairs that it gets right: {found.accuracy:.0%} of {found.pairs}, stored {found.stored_accuracy:.0%}",
        highlight=False,
    )
    if not found.ok:
        raise AdapterError(f"{folder} is not verified. {found.reason}")
    record_verified(folder)
    out.print(f"[green]verified[/] {escape(str(folder))}. {found.reason}", highlight=False)


@app.command()
def pack(
    name: AdapterName,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file to write; by default NAME.lora.zip here.")
    ] = None,
) -> None:
    """Pack an adapter into one file to share: weights, config, passport, stored pairs, recipe, card.

    Example:

        lora-dpo adapters pack quickstart
    """
    from lora_dpo.adapters.exchange import pack as run_pack
    from lora_dpo.adapters.store import find_adapter

    file = run_pack(find_adapter(name), output)
    out.print(f"packed {escape(str(file))} ({file.stat().st_size / 1e6:.1f} MB)", highlight=False, soft_wrap=True)


@app.command()
def install(
    source: Annotated[str, typer.Argument(help="A .lora.zip file, an adapter folder, or a hub id (owner/name).")],
    name: NameHere = None,
) -> None:
    """Check an adapter that comes from elsewhere, and put it into adapters/.

    Only safetensors and small text files are read. Pickles, symlinks, paths, bombs and weights that do not fit are
    refused by name, and then nothing has changed here.

    Examples:

        lora-dpo adapters install quickstart.lora.zip

        lora-dpo adapters install ~/Downloads/some-peft-folder --name friendly
    """
    from lora_dpo.adapters.exchange import install as run_install
    from lora_dpo.adapters.hub import download

    with err.status("checking"):
        done = run_install(source, name=name, fetch=download)
    _installed(done.folder, done.notes)


@app.command()
def pull(
    repo: Annotated[str, typer.Argument(help="A hub id, owner/name.")],
    name: NameHere = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
) -> None:
    """Download an adapter from the Hugging Face hub and install it, with every check of install.

    Example:

        lora-dpo adapters pull someone/brief-smollm2 --revision main
    """
    from lora_dpo.adapters.hub import pull as run_pull

    with err.status("downloading and checking"):
        done = run_pull(repo, name=name, revision=revision)
    _installed(done.folder, done.notes)


@app.command()
def push(
    name: AdapterName,
    repo: Annotated[str, typer.Argument(help="A hub id of yours, owner/name. Made if it is not there.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public; private otherwise.")] = False,
) -> None:
    """Upload an adapter with its model card to the Hugging Face hub.

    Log in first with: hf auth login

    Example:

        lora-dpo adapters push quickstart me/brief-smollm2
    """
    from lora_dpo.adapters.hub import paths_told
    from lora_dpo.adapters.hub import push as run_push
    from lora_dpo.adapters.store import find_adapter

    folder = find_adapter(name)
    if told := paths_told(folder):
        err.print(f"warning: {', '.join(told)} name a place on this machine.", highlight=False, soft_wrap=True)
    with err.status("uploading"):
        address = run_push(folder, repo, private=not public)
    out.print(f"pushed: {escape(address)}", highlight=False, soft_wrap=True)


@app.command()
def remove(
    name: Annotated[str, typer.Argument(help="A name in adapters/.")],
    yes: Yes = False,
) -> None:
    """Remove an adapter from adapters/.

    Example:

        lora-dpo adapters remove quickstart-2
    """
    from lora_dpo.adapters.store import removable
    from lora_dpo.adapters.store import remove as run_remove

    folder = removable(name)
    if not yes:
        typer.confirm(f"Remove {folder}?", abort=True)
    out.print(f"removed {escape(str(run_remove(name)))}", highlight=False)


@app.command()
def diff(
    first: AdapterName,
    second: Annotated[str, typer.Argument(help="Another one.")],
) -> None:
    """Show in which settings and metrics two adapters differ.

    Example:

        lora-dpo adapters diff quickstart quickstart-2
    """
    from lora_dpo.adapters.describe import diff as run_diff
    from lora_dpo.adapters.store import find_adapter

    one, other = find_adapter(first), find_adapter(second)
    rows = run_diff(one, other)
    if not rows:
        out.print("They differ in no setting and no metric.")
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("", one.name, other.name):
        table.add_column(escape(column), overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    out.print(table)


@app.command()
def mix(
    parts: Annotated[list[str], typer.Argument(metavar="NAME:WEIGHT...", help="Adapters of one base, with weights.")],
    output: Annotated[str, typer.Option("--output", "-o", help="The new adapter's name in adapters/, or a folder.")],
    method: Annotated[
        str, typer.Option(help="cat, svd, linear, ties, dare_linear, dare_ties, magnitude_prune, or one with _svd.")
    ] = "cat",
    rank: Annotated[int | None, typer.Option(help="Rank of the result, for svd and _svd.")] = None,
    density: Annotated[float | None, typer.Option(help="Share of entries that ties, dare and prune keep.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of what dare drops.")] = 0,
    sweep: Annotated[int, typer.Option(help="Also score this many weights between two adapters, and plot them.")] = 0,
    model: BaseElsewhere = None,
    strict: Strict = False,
) -> None:
    """Mix adapters of one base into a new one, and score it on the held-out pairs of each parent.

    cat is exact: the result's update is the weighted sum of the parents' (ranks add up). svd cuts that sum to a rank;
    with one adapter it extracts a smaller one. linear, ties and dare work on the matrices A and B.

    Examples:

        lora-dpo adapters mix brief:0.6 kind:0.4 --output both

        lora-dpo adapters mix quickstart:1 --method svd --rank 4 --output quickstart-r4

        lora-dpo adapters mix brief:0.5 kind:0.5 --method svd --sweep 5 --output half
    """
    from lora_dpo import places
    from lora_dpo.adapters.folder import strictness
    from lora_dpo.adapters.package import check_name
    from lora_dpo.adapters.store import find_adapter
    from lora_dpo.cli.ready import have_base_of
    from lora_dpo.cli.views import stages
    from lora_dpo.files import refuse_existing
    from lora_dpo.release.mixture import mix as run_mix
    from lora_dpo.release.mixture import parse_part

    found = [(find_adapter(name), weight) for name, weight in map(parse_part, parts)]
    target = Path(output) if len(Path(output).parts) > 1 else places.adapters() / check_name(output)
    refuse_existing(target)
    have_base_of(found[0][0], model)
    with strictness(strict), stages(err) as stage:
        done = run_mix(
            found,
            target,
            method=method,
            rank=rank,
            density=density,
            seed=seed,
            sweep=sweep,
            model=model,
            on_stage=stage,
        )
    out.print(f"[green]mixed[/] {escape(str(done.folder))}: {method}, rank {done.rank}", highlight=False)
    _draw_mix(done, found[0][0].name)


def _draw_mix(done: Mixed, first: str) -> None:
    """Scores on each parent's pairs, then the sweep over the first parent's weight."""
    from lora_dpo.release.mixture import SWEEP_PLOT

    if not done.scores:
        out.print("Not scored: the adapters carry no pairs.")
    for of, scores in done.scores.items():
        table = Table(title=escape(f"on the held-out pairs of {of}"), title_justify="left")
        for column in ("", "reward accuracy", "margin (nats)"):
            table.add_column(column, justify="left" if not column else "right")
        for name, score in scores.items():
            table.add_row(escape(name), f"{score.accuracy:.3f}", f"{score.margin:+z.2f}")
        out.print(table)
    if done.sweep:
        names = list(done.scores)
        table = Table(title=escape(f"weight of {first}: accuracy, margin"), title_justify="left")
        for column in ("weight", *(f"pairs of {name}" for name in names)):
            table.add_column(escape(column), justify="right")
        for weight, swept in done.sweep.items():
            cells = (f"{swept[name].accuracy:.3f}, {swept[name].margin:+z.2f}" for name in names)
            table.add_row(f"{weight:.2f}", *cells)
        out.print(table)
        out.print(f"plot: {escape(str(done.folder / SWEEP_PLOT))}", highlight=False, soft_wrap=True)


def _installed(folder: Path, notes: tuple[str, ...]) -> None:
    out.print(f"[green]installed[/] {escape(str(folder))}", highlight=False)
    for note in notes:
        out.print(f"  {escape(note)}", highlight=False, soft_wrap=True)
    out.print(f"  lora-dpo adapters verify {escape(folder.name)}", highlight=False)
