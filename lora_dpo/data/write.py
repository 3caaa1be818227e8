"""Pairs to files: the canonical format, a cleaned copy with an account of what was removed, splits and mixtures."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import IO, Any

from lora_dpo.data.doctor.checks import prompt_text
from lora_dpo.data.doctor.examination import Diagnosis
from lora_dpo.data.pairs import Origin, PreferencePair, UnpairedAnswer
from lora_dpo.data.read import Made, Outcome, outcomes
from lora_dpo.data.row_reading import Row
from lora_dpo.data.rows import refuse_twice
from lora_dpo.errors import ConfigError, DataError
from lora_dpo.files import atomic_files
from lora_dpo.text import counted


@dataclass(frozen=True)
class Fixed:
    """What a cleaning wrote. `rows - removed` rows became the pairs; a pair of votes is two rows."""

    rows: int
    """Rows that were read."""
    pairs: int
    """Pairs written to `out`."""
    removed: int
    """Rows written to `dropped`, each with its reason."""
    out: Path
    dropped: Path


def canonical_row(pair: PreferencePair) -> Row:
    """TRL's conversational format, with scores and tools if there are any, and where the pair came from."""
    row: Row = {"prompt": list(pair.prompt), "chosen": list(pair.chosen), "rejected": list(pair.rejected)}
    if pair.chosen_score is not None:
        row["chosen_score"] = pair.chosen_score
    if pair.rejected_score is not None:
        row["rejected_score"] = pair.rejected_score
    if pair.tools:
        row["tools"] = list(pair.tools)
    row["origin"] = dict(pair.provenance) if pair.provenance else {"file": pair.origin.source, "row": pair.origin.row}
    return row


def write_pairs(pairs: Iterable[PreferencePair], out: Path) -> int:
    """Write pairs as JSONL, whole or not at all; returns how many.

    Raises:
        OutputError: the file exists or cannot be written.
        ConfigError: its name does not end in .jsonl or .jsonl.gz.
        DataError: there is no pair.
    """
    count = 0
    with _writer(out) as file:
        for count, pair in enumerate(pairs, start=1):  # noqa: B007 - counted
            _line(file, canonical_row(pair))
        if not count:
            raise DataError(f"No pair is left to write to {out}.")
    return count


def write_rows(rows: Iterable[Row], out: Path) -> None:
    """Write rows that are canonical already. Raises as `write_pairs`, but takes no rows, too."""
    with _writer(out) as file:
        for row in rows:
            _line(file, row)


def write_both(sides: Sequence[Sequence[PreferencePair]], outs: Sequence[Path]) -> None:
    """Write several files of pairs; all of them appear, or none. Raises as `write_pairs`."""
    if len({path.absolute() for path in outs}) < len(outs):
        raise ConfigError(f"{outs[0]} is named twice: each part needs a file of its own.")
    with _writers(outs) as files:
        for pairs, file in zip(sides, files, strict=True):
            for pair in pairs:
                _line(file, canonical_row(pair))


def write_fixed(
    sources: Sequence[str],
    diagnosis: Diagnosis,
    out: Path,
    *,
    format: str | None = None,
    min_gap: float | None = None,
    columns: Mapping[str, str] | None = None,
) -> Fixed:
    """Write what the doctor would keep to `out`, and every removed row with its reason to `out.dropped.jsonl`.

    The sources are read once more, so that no text had to be kept. Both files appear, or none.

    Raises:
        OutputError, ConfigError, DataError: as `write_pairs`.
        ConfigError: a file is named twice, so a row's place would name two rows.
    """
    refuse_twice(sources)
    removals = diagnosis.removals()
    dropped = dropped_of(out)
    rows = kept = removed = 0
    with _writers([out, dropped]) as (clean, rest):
        for outcome in outcomes(sources, format=format, min_gap=min_gap, columns=columns, tolerant=True):
            rows += outcome.rows
            reason = _reason(outcome, removals)
            if reason is None:
                for pair in outcome.pairs:
                    _line(clean, canonical_row(pair))
                kept += len(outcome.pairs)
            else:
                for origin, content in outcome.read:
                    _line(rest, _removed_row(origin, reason, content))
                removed += outcome.rows
        if not kept:
            raise DataError(f"No pair is left after cleaning, so {out} was not written. Read what was found above.")
    return Fixed(rows, kept, removed, out, dropped)


def dropped_of(out: Path) -> Path:
    """Where a cleaning to `out` accounts for what it removed."""
    return out.with_name(f"{out.name}.dropped.jsonl")


def _reason(outcome: Outcome[PreferencePair], removals: Mapping[Origin, str]) -> str | None:
    """Why the rows of an outcome are removed, or None. All pairs of one row have one origin, so they go together."""
    if outcome.dropped:
        return outcome.dropped[0].reason
    return removals.get(outcome.pairs[0].origin)


def split_by_prompt(pairs: Sequence[Made], share: float, *, seed: int = 0) -> tuple[list[Made], list[Made]]:
    """Train and held-out pairs, in order; all pairs of one prompt are on one side.

    Prompts are drawn by a hash of their text and the seed: rows that are added later move no others far.

    Args:
        share: of the prompts that are held out, rounded up; from 1 on, their number. One at least stays to train on.

    Raises:
        DataError: fewer than two different prompts.
    """
    keys = [_prompt_hash(pair, seed) for pair in pairs]
    prompts = sorted(set(keys))
    if len(prompts) < 2:
        raise DataError(f"There is {len(prompts)} different prompt: a split needs two or more.")
    wanted = ceil(share * len(prompts) - 1e-9) if share < 1 else int(share)  # 0.1 * 30 is a little more than 3
    held = set(prompts[: min(len(prompts) - 1, wanted)])
    sides: tuple[list[Made], list[Made]] = ([], [])
    for pair, key in zip(pairs, keys, strict=True):
        sides[key in held].append(pair)
    return sides


def hold_out_prompts(rows: Sequence[Made], wanted: float) -> tuple[list[Made], list[Made]]:
    """`split_by_prompt` as the setting `data.hold_out` asks for it.

    Raises:
        DataError: no prompt would be left to train on.
    """
    prompts = len({prompt_text(row.prompt) for row in rows})
    if prompts <= max(1, wanted):
        raise DataError(
            f"data.hold_out is {wanted}, and the training data has {counted(prompts, 'different prompt')}: none would "
            "be left to train on. Lower it, or leave it out."
        )
    return split_by_prompt(rows, wanted)


def mix(
    parts: Sequence[tuple[Sequence[PreferencePair], float]], *, size: int | None = None, seed: int = 0
) -> list[PreferencePair]:
    """Draw pairs without repetition so that parts have the given shares, and shuffle them.

    Args:
        parts: pairs with a weight above 0; weights are divided by their sum.
        size: pairs in all; None takes as many as the scarcest part allows.

    Raises:
        ConfigError: a part has too few pairs for this size, or a share is 0 beside the largest.
    """
    heaviest = max(weight for _, weight in parts)
    weights = [weight / heaviest for _, weight in parts]  # the sum of large weights could be infinite
    shares = [weight / sum(weights) for weight in weights]
    if not all(shares):
        raise ConfigError("The shares are too far apart: one of them is 0 beside the largest. Leave that part out.")
    largest = min(len(pairs) / share for (pairs, _), share in zip(parts, shares, strict=True))
    wanted = int(largest + 1e-9) if size is None else size
    counts = _rounded(shares, wanted)
    draw = random.Random(seed)  # noqa: S311 - not for secrets
    drawn: list[PreferencePair] = []
    for number, ((pairs, _), count) in enumerate(zip(parts, counts, strict=True), start=1):
        if count > len(pairs):
            raise ConfigError(
                f"Part {number} has {len(pairs)} pairs, but {wanted} in these shares need {count} of it. "
                f"At most {int(largest + 1e-9)} are possible."
            )
        drawn += draw.sample(list(pairs), count)
    draw.shuffle(drawn)
    return drawn


def check_name(out: Path) -> None:
    """Raise `ConfigError` unless JSONL can be written under that name."""
    if not out.name.lower().endswith((".jsonl", ".jsonl.gz")):
        raise ConfigError(f"{out} should end in .jsonl or .jsonl.gz: the canonical format is written as JSON lines.")


def _rounded(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers with that sum, each within one of its share (largest remainders)."""
    exact = [share * total for share in shares]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def _prompt_hash(pair: PreferencePair | UnpairedAnswer, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}\n{prompt_text(pair.prompt)}".encode(), digest_size=12).digest()


def _removed_row(origin: Origin, reason: str, content: Any) -> Row:
    return {"file": origin.source, "row": origin.row, "reason": reason, "content": content}


def _line(file: IO[str], row: Row) -> None:
    # Rows of Parquet files hold dates and bytes; half a character (a lone surrogate) can only be written escaped.
    text = json.dumps(row, ensure_ascii=False, default=str)
    if not _is_utf8(text):
        text = json.dumps(row, default=str)
    file.write(text + "\n")


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def _writer(out: Path) -> Iterator[IO[str]]:
    with _writers([out]) as [file]:
        yield file


@contextmanager
def _writers(outs: Sequence[Path]) -> Iterator[list[IO[str]]]:
    """Text files, packed where the name says so; all of them appear, or none."""
    for out in outs:
        check_name(out)
    with atomic_files(outs) as temporaries, ExitStack() as stack:
        named = zip(temporaries, outs, strict=True)
        yield [stack.enter_context(_text(path, packed=out.suffix.lower() == ".gz")) for path, out in named]


@contextmanager
def _text(path: Path, *, packed: bool) -> Iterator[IO[str]]:
    with path.open("wb") as raw:
        # no name and no time inside: the same pairs give the same bytes
        inner = gzip.GzipFile("", fileobj=raw, mode="wb", mtime=0) if packed else raw
        with io.TextIOWrapper(inner, encoding="utf-8", newline="\n") as text:
            yield text
