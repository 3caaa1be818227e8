"""Events drawn in a terminal with rich. No decisions are made here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from lora_dpo.events import (
    Alarmed,
    Answered,
    Compared,
    Event,
    Note,
    Resolved,
    RoundsMeasured,
    RowsDropped,
    Sampled,
    Saved,
    StepLogged,
    Tabulated,
)
from lora_dpo.events import Progress as ProgressEvent
from lora_dpo.systems import command_line
from lora_dpo.text import harmless

if TYPE_CHECKING:
    from lora_dpo.release.merge_fidelity import Fidelity


class RunView:
    """Draws a run: resolved settings, one progress bar a stage, the comparison, the answers."""

    def __init__(self, console: Console, *, show_dropped: bool = False) -> None:
        self.console = console
        self.show_dropped = show_dropped
        self.progress = Progress(
            TextColumn("{task.description:<41}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,  # a log file gets one plain line a step instead
        )
        self.tasks: dict[str, TaskID] = {}

    @contextmanager
    def live(self) -> Iterator[None]:
        """Show the progress bars for the length of the block."""
        with self.progress:
            yield

    def __call__(self, event: Event) -> None:
        """Draw one event."""
        match event:
            case Resolved(lines):
                self._resolved(lines)
            case RowsDropped(rows) if self.show_dropped:
                self.console.print(dropped_table(rows))
            case ProgressEvent("training") if not self.console.is_terminal:
                pass  # the lines of metrics say it
            case ProgressEvent(stage, done, total):
                self._stage(stage, done, total)
            case StepLogged(step, total, metrics) if "loss" in metrics:
                self._stage(f"training  {step_line(metrics)}", step, total, key="training")
            case Sampled(step, numbers, _):
                self.console.print(f"step {step}: {sample_line(numbers)}", highlight=False)
            case Alarmed(_, _, text):
                self.console.print(f"[yellow]alarm:[/] {escape(text)}", highlight=False)
            case Note(text, warning):
                self.console.print(("[yellow]warning:[/] " if warning else "") + escape(harmless(text)))
            case Compared(rows) if rows:
                self._compared(rows)
            case Answered(rows, names):
                self.console.print(side_by_side("prompt", rows, names))
            case RoundsMeasured(rows):
                self._table("held-out prompts, by round", rows)
            case Tabulated(title, rows, grows) if not grows or _width(rows) <= self.console.width:
                self._table(title, rows)
            case Tabulated(_, rows):  # too wide: of a table that grows by a row each time, that row is told in words
                cells = [(name, cell) for name, cell in zip(rows[0], rows[-1], strict=True) if cell not in ("", "-")]
                told = ", ".join(f"{name} {cell}".strip() for name, cell in cells)
                self.console.print(escape(harmless(told)), highlight=False, soft_wrap=True)
            case Saved(folder):
                self.console.print(f"\n[green]saved[/] [bold]{escape(str(folder))}[/]   talk to it:", soft_wrap=True)
                command = command_line(["lora-dpo", "chat", str(folder), "--compare"])
                self.console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)

    def _stage(self, text: str, done: int, total: int, key: str | None = None) -> None:
        key = key or text
        if not self.console.is_terminal:
            if key not in self.tasks or key != text:
                self.console.print(f"{text}  {done}/{total}", highlight=False)
            self.tasks[key] = TaskID(0)
            return
        if key not in self.tasks:
            self.tasks[key] = self.progress.add_task(text, total=total)
        keep_metrics = key == text == "training"
        self.progress.update(self.tasks[key], completed=done, total=total, description=None if keep_metrics else text)

    def _resolved(self, lines: tuple[tuple[str, str], ...]) -> None:
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="bold cyan", no_wrap=True)
        table.add_column(overflow="fold")  # a long path is to be read whole
        for label, value in lines:
            table.add_row(label, escape(value))
        self.console.print(table)
        self.console.print()

    def _compared(self, rows: tuple[tuple[str, str, str], ...]) -> None:
        table = Table(title="held-out data, before and after", title_justify="left")
        table.add_column("")
        table.add_column("before", justify="right")
        table.add_column("after", justify="right")
        for row in rows:
            table.add_row(*map(escape, row))
        self.console.print(table)

    def _table(self, title: str, rows: tuple[tuple[str, ...], ...]) -> None:
        table = Table(title=title, title_justify="left")
        for index, name in enumerate(rows[0]):
            table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
        for row in rows[1:]:
            table.add_row(*map(escape, row))
        self.console.print(table)


def _width(rows: tuple[tuple[str, ...], ...]) -> int:
    """Columns of the terminal that a table takes without breaking a cell."""
    return 1 + sum(3 + max(map(len, column)) for column in zip(*rows, strict=True))


def step_line(metrics: Mapping[str, float]) -> str:
    """The numbers to watch, short enough for one line."""
    parts = [("loss", "loss"), ("margin", "rewards/margins"), ("acc", "rewards/accuracies")]
    return "  ".join(f"{label} {metrics[key]:z.2f}" for label, key in parts if key in metrics)


def sample_line(numbers: Mapping[str, float]) -> str:
    """What the guard saw of a few sampled answers."""
    parts = [
        ("health/answer_tokens", "answers of {:.0f} tokens"),
        ("health/finished", "{:.0%} end by themselves"),
        ("health/repetition", "{:.0%} repeated"),
        ("health/kl", "KL {:.2f} nats a token"),
        ("health/judge", "judge {:.2f}"),
    ]
    return ", ".join(form.format(numbers[key]) for key, form in parts if key in numbers)


def side_by_side(
    first: str, rows: tuple[tuple[str, str, str], ...], names: tuple[str, str] = ("before", "after")
) -> Table:
    """A table of prompts with two answers each."""
    table = Table(show_lines=True, expand=True)
    table.add_column(first, ratio=2, style="bold")
    for name in names:
        table.add_column(name, ratio=4)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def dropped_table(rows: tuple[tuple[str, str], ...]) -> Table:
    """Every dropped row with its place and reason."""
    table = Table(title=f"{len(rows)} dropped rows", title_justify="left")
    table.add_column("row")
    table.add_column("reason")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


@contextmanager
def stages(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars for named stages: call the result with a stage, how much is done, and of how much."""
    columns = (TextColumn("{task.description:<22}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done)

        yield show


def fidelity_table(found: Sequence[Fidelity]) -> Table:
    """Merged models held against the live adapter."""
    table = Table(title="against the live adapter", title_justify="left")
    table.add_column("")
    for one in found:
        table.add_column(f"{one.into}, {one.dtype}", justify="right")
    rows: list[tuple[str, Callable[[Fidelity], str]]] = [
        ("mean |Δ log-prob| a token (nats)", lambda one: f"{one.mean_delta:.2g}"),
        ("max |Δ log-prob|", lambda one: f"{one.max_delta:.2g}"),
        ("KL of next tokens (nats)", lambda one: f"{one.kl:.2g}"),
        ("top-1 agreement", lambda one: f"{one.top1:.1%} of {one.tokens}"),
        ("reward accuracy (live)", lambda one: f"{one.accuracy:.1%} ({one.live_accuracy:.1%}) of {one.pairs}"),
        ("same greedy answers", lambda one: f"{one.same_answers} of {one.answers}"),
    ]
    for name, cell in rows:
        table.add_row(name, *(cell(one) for one in found))
    return table
