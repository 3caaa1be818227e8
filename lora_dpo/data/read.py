"""Sources to pairs, with an account of every row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lora_dpo.data.columns import Columns, OnNote, Wanted
from lora_dpo.data.formats.feedback import Ballot
from lora_dpo.data.formats.registry import Format, format_named, format_of
from lora_dpo.data.messages import BadRow, Messages
from lora_dpo.data.pairs import Dropped, Origin, PreferencePair, ReadReport, UnpairedAnswer
from lora_dpo.data.row_reading import Row
from lora_dpo.data.rows import files_of, read_rows
from lora_dpo.errors import DataError
from lora_dpo.text import counted

Made = TypeVar("Made", PreferencePair, UnpairedAnswer)
"""What rows become: pairs, or single answers."""


@dataclass(frozen=True)
class Outcome(Generic[Made]):
    """What one row became, or the votes that were counted together: pairs or answers, or a reason for each row."""

    read: tuple[tuple[Origin, Any], ...]
    """Each row with its place: as it was read, its text if it is broken, or the vote."""
    pairs: tuple[Made, ...] = ()
    """What was made; single answers where answers are read (`answers.py`)."""
    dropped: tuple[Dropped, ...] = ()
    title: str | None = None
    """Title of the format; None for a line that is no row."""
    asked: tuple[Messages, ...] = ()
    """The prompt of a vote that made no pair."""

    @property
    def rows(self) -> int:
        """Rows that went into it."""
        return len(self.read)


def read_pairs(
    sources: str | Sequence[str],
    *,
    on_bad_row: str = "drop",
    format: str | None = None,
    min_gap: float | None = None,
    columns: Mapping[str, str] | None = None,
) -> tuple[list[PreferencePair], ReadReport]:
    """Read preference pairs from files, folders or hub data sets, in order; those made of votes come last.

    Args:
        sources: one path or hub id, or several; votes are paired across them.
        on_bad_row: "drop" leaves unusable rows out and counts them by reason; "error" raises at the first.
        format: name of the format of all rows; None looks at each row.
        min_gap: drop pairs whose scores are closer than this, or that have none.
        columns: names of columns by what they are: `{"prompt": "Question", "chosen": "Good", "rejected": "Bad"}`.

    Raises:
        DataError: a source cannot be read, or no row of it is usable.
        UnclearColumns: what a table's columns are cannot be told, or one that is named is not there.
        ConfigError: there is no format of that name.
    """
    return gather(
        sources,
        lambda named, on_note: outcomes(named, format=format, min_gap=min_gap, columns=columns, on_note=on_note),
        on_bad_row=on_bad_row,
        nothing="holds no usable pair: {why}. The formats that are read: lora-dpo docs data",
    )


def gather(
    sources: str | Sequence[str],
    outcomes_of: Callable[[Sequence[str], OnNote], Iterable[Outcome[Made]]],
    *,
    on_bad_row: str,
    nothing: str,
) -> tuple[list[Made], ReadReport]:
    """All that the rows of some sources became, with an account; a source of which nothing is usable is an error.

    Args:
        nothing: what to say of such a source; `{why}` is the first reason.
    """
    if not sources:
        raise DataError("The list of preference files is empty. Name at least one file or hub data set.")
    named = [sources] if isinstance(sources, str) else list(sources)
    made: list[Made] = []
    report = ReadReport()
    used: set[str] = set()
    for outcome in outcomes_of(named, report.note):
        if outcome.dropped and on_bad_row == "error":
            bad = outcome.dropped[0]
            raise DataError(f"{bad.origin.source}, row {bad.origin.row}: {bad.reason}.")
        account(report, outcome)
        made.extend(outcome.pairs)
        if outcome.pairs:
            used.update(origin.source for origin, _ in outcome.read)
    for source in named:
        files = files_of(source)
        if used.isdisjoint(files):
            why = next((bad.reason for bad in report.dropped if bad.origin.source in files), "no rows")
            raise DataError(f"{source} {nothing.format(why=why)}")
    return made, report


def pair_at(
    source: str, row: int | None, *, format: str | None = None, columns: Mapping[str, str] | None = None
) -> PreferencePair:
    """The first pair of a row (a line in JSONL); with None the first pair of all.

    Raises:
        DataError: there is no such row, or it is no pair; the message says why.
    """
    rows, files = 0, set[str]()
    for outcome in outcomes(source, format=format, columns=columns, tolerant=True):
        rows += outcome.rows
        files.update(origin.source for origin, _ in outcome.read)
        for pair in outcome.pairs:
            if row is None or row in (pair.origin.row, _rejected_row(pair)):
                return pair
        for bad in outcome.dropped:
            if bad.origin.row == row:
                raise DataError(f"{bad.origin.source}, row {row} is no pair: {bad.reason}.")
    where = f", numbered in each of its {len(files)} files" if len(files) > 1 else ""
    what = "pair" if row is None else f"row {row}"
    raise DataError(f"{source} has no {what}: {counted(rows, 'row')} read{where}.")


def _rejected_row(pair: PreferencePair) -> Any:
    """The row of a pair's second vote; what `data convert` wrote down is a row of another file."""
    made = pair.provenance or {}
    return made.get("rejected_row") if made.get("file") == pair.origin.source else None


def account(report: ReadReport, outcome: Outcome[Made]) -> None:
    """Enter an outcome into the report."""
    report.rows += outcome.rows
    report.dropped.extend(outcome.dropped)
    report.surplus += len(outcome.pairs) - (outcome.rows - len(outcome.dropped))
    if outcome.title:
        report.formats[outcome.title] += outcome.rows


def outcomes(
    sources: str | Sequence[str],
    *,
    format: str | None = None,
    min_gap: float | None = None,
    columns: Mapping[str, str] | None = None,
    wanted: Wanted = "pairs",
    tolerant: bool = False,
    on_note: OnNote | None = None,
) -> Iterator[Outcome[PreferencePair]]:
    """What each row of the sources became; votes come at the end, when all are known, paired across the sources.

    Args:
        columns: names of columns by what they are, for files with names of their own.
        wanted: "answers" if rows with one answer are no mistake: they make no pairs, and need no columns of such.
        tolerant: what `read_rows` finds broken is dropped, in place of an error.
        on_note: told of what a person should know of how a file was read, as `ReadReport.note`.

    Raises:
        DataError: a file cannot be read.
        UnclearColumns: what a table's columns are cannot be told, or one that is named is not there.
        ConfigError: there is no format of that name.
    """
    forced = format_named(format) if format is not None else None
    ballot, vote_titles = Ballot(), dict[Origin, str]()
    for file in all_files(sources):
        told = Columns(file, columns, wanted=wanted, recognise=forced is None)
        for item in _of_file(file, told, forced, min_gap, tolerant=tolerant):
            told.tell(on_note)
            if isinstance(item, Outcome):
                yield item
            else:
                ballot.add(item[0])
                vote_titles[item[0].origin] = item[1]
    for votes, result in ballot.count():
        title = vote_titles[votes[0].origin]
        problem = result if isinstance(result, BadRow) else _gap_problem(result, min_gap)
        if problem is not None:
            for vote in votes:
                yield left_out(vote.origin, problem, title, vote_row(vote), asked=(vote.prompt,))
        elif isinstance(result, PreferencePair):
            yield Outcome(tuple((vote.origin, vote_row(vote)) for vote in votes), (result,), title=title)


def _of_file(
    file: str, told: Columns, forced: Format | None, min_gap: float | None, *, tolerant: bool
) -> Iterator[Outcome[PreferencePair] | tuple[UnpairedAnswer, str]]:
    """What each row of a file became, or the vote that it is with the title of its format."""
    broken: list[Outcome[PreferencePair]] = []

    def on_broken(line: int, reason: str, text: str) -> None:
        dropped = Dropped(Origin(file, line), f"unreadable: {reason}", "unreadable")
        broken.append(Outcome(((dropped.origin, text),), dropped=(dropped,)))

    rows = read_rows(file, on_broken=on_broken if tolerant else None, facts=told.facts)
    for number, row in told.over(rows):
        yield from broken
        broken.clear()
        origin, fits = Origin(file, number), forced
        try:
            meant = told.meant(row)
            fits = forced or format_of(meant)
            told.check(fits, meant)
            made = fits.read(meant, origin)
        except BadRow as bad:
            yield left_out(origin, bad, (fits or format_of(row)).title, row)
            continue
        if isinstance(made, UnpairedAnswer):
            yield made, fits.title
        else:
            yield _pairs(made if isinstance(made, list) else [made], origin, fits, min_gap, row)
    yield from broken


def all_files(sources: str | Sequence[str]) -> Iterator[str]:
    """The files of one source or several, in order."""
    for source in [sources] if isinstance(sources, str) else sources:
        yield from files_of(source)


def vote_row(vote: UnpairedAnswer) -> Row:
    """A vote in TRL's format."""
    return {"prompt": list(vote.prompt), "completion": list(vote.answer), "label": vote.up}


def _pairs(
    made: list[PreferencePair], origin: Origin, format: Format, min_gap: float | None, row: Row
) -> Outcome[PreferencePair]:
    problems = [_gap_problem(pair, min_gap) for pair in made]
    kept = tuple(pair for pair, problem in zip(made, problems, strict=True) if problem is None)
    if not kept and problems[0] is not None:
        return left_out(origin, problems[0], format.title, row)
    return Outcome(((origin, row),), kept, title=format.title)


def left_out(origin: Origin, bad: BadRow, title: str, content: Row, asked: tuple[Messages, ...] = ()) -> Outcome[Any]:
    """The outcome of a row that is none."""
    return Outcome(((origin, content),), dropped=(Dropped(origin, str(bad), bad.kind),), title=title, asked=asked)


def _gap_problem(pair: PreferencePair, min_gap: float | None) -> BadRow | None:
    if min_gap is None:
        return None
    if pair.gap is None:
        return BadRow("without scores, and a least gap is asked for", "tie")
    return BadRow(f"score gap below {min_gap:g}", "tie") if pair.gap < min_gap else None
