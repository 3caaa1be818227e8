"""The pairs that someone has collected: the votes and what was uploaded, to look through, mend and take away.

FOLDER/votes.jsonl     the votes
FOLDER/uploads/        files in the canonical form, one an upload
FOLDER/runs/           what the runs that were started here train on, and what was held out of it
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

from lora_dpo.config.column_names import checked_columns
from lora_dpo.data import Message, PreferencePair, ReadReport, read_pairs
from lora_dpo.data.doctor.checks import Texts
from lora_dpo.data.doctor.examination import Diagnosis, examine
from lora_dpo.data.formats.registry import format_of
from lora_dpo.data.formats.trl import checked_pair
from lora_dpo.data.journal import rewrite_durably
from lora_dpo.data.messages import BadRow
from lora_dpo.data.read import outcomes
from lora_dpo.data.row_reading import Row
from lora_dpo.data.rows import read_rows
from lora_dpo.data.unpacked import unpacked_size
from lora_dpo.data.write import canonical_row, write_pairs
from lora_dpo.demo.votes import VoteLog
from lora_dpo.errors import DataError, UnclearColumns
from lora_dpo.files import numbered
from lora_dpo.model.tensor_file import State, state_of
from lora_dpo.systems import is_reserved
from lora_dpo.text import plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOTES = "votes"
Verdict = Literal["keep", "swap", "drop"]
"""What becomes of a pair that someone looked at."""
MAX_UPLOAD = 64 << 20
"""Bytes of a file of pairs or prompts, unpacked. More is for the command line."""
PLANNED = 3600.0
"""Seconds that a page may take from the plan of a run to its start."""
KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".xlsx", ".xlsm", ".ods", ".parquet", ".gz")
PROMPT_KINDS = (*KINDS, ".txt")


@dataclass(frozen=True)
class Import:
    """What became of an upload."""

    name: str
    report: ReadReport
    diagnosis: Diagnosis
    """Of the file as it came, rows that are no pairs included."""


@dataclass(frozen=True)
class Entry:
    """A pair, the line that it is on, and a mark of its content: what is changed must be what was seen."""

    line: int
    pair: PreferencePair
    mark: str

    @property
    def texts(self) -> tuple[str, str, str]:
        """What is asked last, the chosen and the rejected answer."""
        last = (self.pair.prompt, self.pair.chosen, self.pair.rejected)
        return last[0][-1]["content"], last[1][-1]["content"], last[2][-1]["content"]


class PairStore:
    """The files of one folder. Names are `votes` and those of uploads; a path is never taken from outside."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.book = VoteLog(folder / f"{VOTES}.jsonl")
        self.uploads = folder / "uploads"
        self._doctor = threading.Lock()  # one examination at a time: each takes a processor for long, and the tokenizer
        self._diagnosed: dict[str, tuple[State, Diagnosis]] = {}
        self.runs = folder / "runs"

    def names(self) -> list[str]:
        """What there is: the votes first, if there are any, then the uploads by name."""
        found = sorted(path.name.removesuffix(".jsonl") for path in self.uploads.glob("[!.]*.jsonl"))
        return ([VOTES] if self.book.path.is_file() else []) + found

    def path_of(self, name: str) -> Path:
        """The file of that name. Raises `DataError` if there is none."""
        if name not in self.names():
            raise DataError(f"There are no pairs called {plain(name)}. Vote, or upload some.")
        return self.book.path if name == VOTES else self.uploads / f"{name}.jsonl"

    def take_in(
        self,
        path: Path,
        name: str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> Import:
        """Read an uploaded file in any known form and keep its pairs in the canonical form.

        Args:
            name: what the file is called by its owner; only letters, digits, `-`, `_` and dots of it are kept.
            columns: names of columns by what they are, for a file with names of its own.

        Raises:
            UnclearColumns: which column is what cannot be told.
            DataError: it is too large, of another kind, or holds no usable pair.
        """
        check_upload(path, name, KINDS)
        with self._doctor, _named_as_by_its_owner(path, name):
            named = _checked(columns or {})
            diagnosis = examine([str(path)], tokenizer=tokenizer, columns=named)
            read = outcomes(str(path), columns=named, tolerant=True)
            found = [pair for outcome in read for pair in outcome.pairs]
            if not found:
                _refuse_without_pairs(path, diagnosis)
        pairs = [replace(pair, origin=replace(pair.origin, source=Path(name).name)) for pair in found]
        with self.book.held():  # two uploads of one name must not take the same place
            taken = set(map(str.casefold, self.names()))  # many disks do not tell A from a
            kept = next(free for free in numbered(clean_name(name)) if free.casefold() not in taken)
            write_pairs(pairs, self.uploads / f"{kept}.jsonl")
        return Import(kept, diagnosis.report, diagnosis)

    def entries(self, name: str, search: str = "") -> list[Entry]:
        """The pairs of a file that hold all words of `search`, in order."""
        path = self.path_of(name)
        if not path.stat().st_size:
            return []
        words = search.casefold().split()
        found = []
        for pair in _pairs_of(path, path.stat().st_mtime_ns, path.stat().st_size):
            text = " ".join((*vars(Texts.of(pair)).values(),)).casefold() if words else ""
            if all(word in text for word in words):
                found.append(Entry(pair.origin.row, pair, mark_of(canonical_row(pair))))
        return found

    def entry(self, name: str, line: int, mark: str) -> Entry:
        """The pair on a line, if it is still as its mark says. Raises `DataError`."""
        found = next((entry for entry in self.entries(name) if (entry.line, entry.mark) == (line, mark)), None)
        if found is None:
            raise DataError("This pair was changed or removed meanwhile. Look at the list again.")
        return found

    def diagnose(self, name: str, tokenizer: PreTrainedTokenizerBase | None = None) -> Diagnosis | None:
        """What the doctor says about a file, examined again only when it changed; None if it is empty."""
        path = self.path_of(name)
        with self._doctor:
            state = state_of(path)
            known = self._diagnosed.get(name)
            if known is None or known[0] != state:
                if not path.stat().st_size:
                    return None
                known = self._diagnosed[name] = (state, examine([str(path)], tokenizer=tokenizer))
            return known[1]

    def clean_runs(self, used: str) -> None:
        """Remove what earlier runs were to train on, but for files that `used` names and those of the last hour."""
        for path in self.runs.glob("*.jsonl"):
            with contextlib.suppress(OSError):  # another page is at it as well
                if path.name not in used and time.time() - path.stat().st_mtime > PLANNED:
                    path.unlink()

    def change(self, name: str, entry: Entry, *, prompt: str, chosen: str, rejected: str) -> None:
        """Write other words for the last turn of a pair's prompt and of its answers.

        Raises:
            DataError: the pair is not there any more as it was, or it would be no pair.
        """
        pair = entry.pair
        parts = [_with_last(part, text) for part, text in ((pair.prompt, prompt), (pair.chosen, chosen))]
        parts.append(_with_last(pair.rejected, rejected))
        provenance = {**(pair.provenance or {}), "edited": True}
        try:
            changed = checked_pair(
                parts[0],
                parts[1],
                parts[2],
                pair.origin,
                scores=(pair.chosen_score, pair.rejected_score),
                tools=pair.tools,
                provenance=provenance,
            )
        except BadRow as bad:
            raise DataError(f"With these words it would be no pair: {bad}.") from None
        self._rewrite(name, {entry.line: entry.mark}, canonical_row(changed))

    def delete(self, name: str, entries: Sequence[Entry]) -> None:
        """Take pairs out. Raises `DataError` if one is not there any more as it was."""
        self._rewrite(name, {entry.line: entry.mark for entry in entries}, None)

    def looked_through(self, name: str, decided: Sequence[tuple[PreferencePair, Verdict]]) -> str:
        """Write a file's pairs to a new upload, without those that are dropped, and with the answers of some swapped.

        A swapped pair has no scores: they say what its label no longer does.

        Args:
            decided: pairs of `entries`, and what becomes of them. All others are kept.

        Returns:
            The new upload's name.

        Raises:
            DataError: a pair is not there any more as it was, or none would be left.
        """
        verdicts = {(pair.origin.row, mark_of(canonical_row(pair))): verdict for pair, verdict in decided}
        with self.book.held():
            entries = self.entries(name)
            if not verdicts.keys() <= {(entry.line, entry.mark) for entry in entries}:
                raise DataError("A pair was changed or removed meanwhile. Look for them again.")
            left = []
            for entry in entries:
                verdict = verdicts.get((entry.line, entry.mark), "keep")
                if verdict != "drop":
                    left.append(_swapped(entry.pair) if verdict == "swap" else entry.pair)
            if not left:
                raise DataError("Every pair is dropped, so there is nothing to write.")
            taken = set(map(str.casefold, self.names()))
            new = next(free for free in numbered(f"{name[:40]}-looked-through") if free.casefold() not in taken)
            write_pairs(left, self.uploads / f"{new}.jsonl")
        return new

    def export(self, names: Sequence[str], target: Path) -> Path:
        """Write files as one in the canonical form; `target` is a new file. Raises `DataError` if there is no pair."""
        sources = [str(path) for path in map(self.path_of, names) if path.stat().st_size]
        if not sources:
            raise DataError("There is no pair to take away. Vote, or upload some.")
        pairs, _ = read_pairs(sources)
        write_pairs(pairs, target)
        return target

    def _rewrite(self, name: str, expected: dict[int, str], new: Row | None) -> None:
        path = self.path_of(name)
        with self.book.held():
            now = {entry.line: entry.mark for entry in self.entries(name)}
            if any(now.get(line) != mark for line, mark in expected.items()):
                raise DataError("This pair was changed or removed meanwhile. Look at the list again.")
            rewrite_durably(path, lambda line, row: new if line in expected else row)


def _checked(columns: Mapping[str, str]) -> dict[str, str]:
    try:
        return checked_columns(columns)
    except ValueError as error:
        raise DataError(f"{str(error).removesuffix('.')}. Choose another column.") from None


def _refuse_without_pairs(path: Path, diagnosis: Diagnosis) -> NoReturn:
    """Say why a file holds no pair; where no format knew its rows, their columns can be named."""
    report = diagnosis.report
    why = next((reason for reason, _ in report.reasons()), "no rows")
    text = f"{path} holds no usable pair: {why}."
    if set(report.formats) == {format_of({}).title}:
        _, row = next(read_rows(str(path), on_broken=lambda *broken: None))
        raise UnclearColumns(text, columns=tuple(map(str, row)))
    raise DataError(text)


@contextlib.contextmanager
def _named_as_by_its_owner(path: Path, name: str) -> Iterator[None]:
    """The place that an upload lay in for a moment says nothing to anyone: errors name the file as it was called."""
    try:
        yield
    except DataError as error:
        text = str(error).replace(str(path), plain(Path(name).name))
        if isinstance(error, UnclearColumns):
            raise UnclearColumns(text, columns=error.columns, guess=error.guess) from None
        raise DataError(text) from None


def check_upload(path: Path, name: str, kinds: Sequence[str]) -> None:
    """Raise `DataError` unless a file is of a known kind and no larger than `MAX_UPLOAD`."""
    if path.suffix.lower() not in kinds or not path.is_file():
        raise DataError(f"{plain(Path(name).name)} is no file of a known kind: known are {', '.join(kinds)}.")
    size = path.stat().st_size
    if size > MAX_UPLOAD:
        _refuse_size(name, f"has {size / 1e6:,.0f} MB")
    if unpacked_size(path, MAX_UPLOAD) > MAX_UPLOAD:
        _refuse_size(name, "unpacks to more than that")


def _refuse_size(name: str, has: str) -> NoReturn:
    raise DataError(
        f"{plain(Path(name).name)} {has}; at most {MAX_UPLOAD / 1e6:,.0f} MB are taken in here. Use lora-dpo data "
        "convert and train with a recipe."
    )


def clean_name(name: str) -> str:
    """A file's name as a short word of letters, digits, `-`, `_` and dots; never `votes`, never empty."""
    stem = re.split(r"[/\\]", name)[-1]
    while Path(stem).suffix.lower() in PROMPT_KINDS:
        stem = stem[: -len(Path(stem).suffix)]
    word = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:60].strip("-._")
    return "upload" if word.casefold() in ("", VOTES) or is_reserved(word) else word


def mark_of(row: Row) -> str:
    """A short hash of a row's content, the same in whatever order its keys are."""
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16]


def _swapped(pair: PreferencePair) -> PreferencePair:
    """The pair with its label the other way round."""
    provenance = {**(pair.provenance or {"file": pair.origin.source, "row": pair.origin.row}), "swapped": True}
    sides = {"chosen": pair.rejected, "rejected": pair.chosen, "chosen_score": None, "rejected_score": None}
    return replace(pair, **sides, provenance=provenance)  # type: ignore[arg-type]


def _with_last(part: tuple[Message, ...], text: str) -> tuple[Message, ...]:
    return (*part[:-1], {**part[-1], "content": text})


@functools.lru_cache(maxsize=4)
def _pairs_of(path: Path, modified: int, size: int) -> tuple[PreferencePair, ...]:
    """Pairs of a canonical file, read again only when it changed."""
    return tuple(pair for outcome in outcomes(str(path), tolerant=True) for pair in outcome.pairs)
