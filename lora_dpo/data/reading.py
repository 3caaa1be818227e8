"""Sources to pairs, with an account of every row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lora_dpo.data.files import files_of, read_rows
from lora_dpo.data.messages import BadRow
from lora_dpo.data.pairs import Dropped, Origin, PreferencePair, ReadReport, Vote
from lora_dpo.data.table import Form, form_named, form_of
from lora_dpo.data.votes import Ballot
from lora_dpo.errors import DataError


@dataclass(frozen=True)
class Outcome:
    """What one row became, or the votes that were counted together: pairs, or a reason for each row."""

    rows: int
    pairs: tuple[PreferencePair, ...] = ()
    dropped: tuple[Dropped, ...] = ()
    title: str | None = None
    """Title of the form; None for a line that is no row."""
    text: str = ""
    """The line, if it is no row."""


def read_pairs(
    sources: str | Sequence[str],
    *,
    on_bad_row: str = "drop",
    form: str | None = None,
    min_gap: float | None = None,
) -> tuple[list[PreferencePair], ReadReport]:
    """Read preference pairs from files, folders or hub data sets, in order.

    Args:
        sources: one path or hub id, or several.
        on_bad_row: "drop" leaves unusable rows out and counts them by reason; "error" raises at the first.
        form: name of the form of all rows; None looks at each row.
        min_gap: drop pairs whose scores are closer than this, or that have none.

    Raises:
        DataError: a source cannot be read, or no row of it is usable.
        ConfigError: there is no form of that name.
    """
    if not sources:
        raise DataError("The list of preference files is empty. Name at least one file or hub data set.")
    pairs: list[PreferencePair] = []
    report = ReadReport()
    for source in [sources] if isinstance(sources, str) else sources:
        before, dropped_before = len(pairs), len(report.dropped)
        for outcome in outcomes(source, form=form, min_gap=min_gap):
            if outcome.dropped and on_bad_row == "error":
                bad = outcome.dropped[0]
                raise DataError(f"{bad.origin.source}, row {bad.origin.row}: {bad.reason}.")
            account(report, outcome)
            pairs.extend(outcome.pairs)
        if len(pairs) == before:
            why = report.dropped[dropped_before].reason if len(report.dropped) > dropped_before else "no rows"
            raise DataError(f"{source} holds no usable pair: {why}. See docs/data.md for the forms that are read.")
    return pairs, report


def account(report: ReadReport, outcome: Outcome) -> None:
    """Enter an outcome into the report."""
    report.rows += outcome.rows
    report.dropped.extend(outcome.dropped)
    report.surplus += len(outcome.pairs) - (outcome.rows - len(outcome.dropped))
    if outcome.title:
        report.forms[outcome.title] += outcome.rows


def outcomes(
    source: str, *, form: str | None = None, min_gap: float | None = None, tolerant: bool = False
) -> Iterator[Outcome]:
    """What each row of a source became; votes come at the end, when all are known.

    Args:
        tolerant: lines of JSONL files that are no rows are dropped, in place of an error.

    Raises:
        DataError: a file cannot be read.
        ConfigError: there is no form of that name.
    """
    forced = form_named(form) if form is not None else None
    ballot, vote_titles = Ballot(), dict[Origin, str]()
    for file in files_of(source):
        broken: list[Outcome] = []

        def on_broken(line: int, reason: str, text: str, file: str = file, broken: list[Outcome] = broken) -> None:
            dropped = Dropped(Origin(file, line), f"unreadable: {reason}", "unreadable")
            broken.append(Outcome(1, dropped=(dropped,), text=text))

        for number, row in read_rows(file, on_broken=on_broken if tolerant else None):
            yield from broken
            broken.clear()
            fits = forced or form_of(row)
            origin = Origin(file, number)
            try:
                made = fits.read(row, origin)
            except BadRow as bad:
                yield _dropped((origin,), bad, fits.title)
                continue
            if isinstance(made, Vote):
                ballot.add(made)
                vote_titles[origin] = fits.title
            else:
                yield _pairs(made if isinstance(made, list) else [made], origin, fits, min_gap)
        yield from broken
    for votes, result in ballot.count():
        origins, title = tuple(vote.origin for vote in votes), vote_titles[votes[0].origin]
        if isinstance(result, BadRow):
            yield _dropped(origins, result, title)
        elif (bad_gap := _gap_problem(result, min_gap)) is not None:
            yield _dropped(origins, bad_gap, title)
        else:
            yield Outcome(len(votes), (result,), title=title)


def _pairs(made: list[PreferencePair], origin: Origin, form: Form, min_gap: float | None) -> Outcome:
    problems = [_gap_problem(pair, min_gap) for pair in made]
    kept = tuple(pair for pair, problem in zip(made, problems, strict=True) if problem is None)
    if not kept and problems[0] is not None:
        return _dropped((origin,), problems[0], form.title)
    return Outcome(1, kept, title=form.title)


def _dropped(origins: tuple[Origin, ...], bad: BadRow, title: str) -> Outcome:
    return Outcome(len(origins), dropped=tuple(Dropped(origin, str(bad), bad.kind) for origin in origins), title=title)


def _gap_problem(pair: PreferencePair, min_gap: float | None) -> BadRow | None:
    if min_gap is None:
        return None
    if pair.gap is None:
        return BadRow("without scores, and a least gap is asked for", "tie")
    return BadRow(f"score gap below {min_gap:g}", "tie") if pair.gap < min_gap else None
