"""Broken files and odd rows, thrown at every reader: a clean error or a counted drop, never a traceback or a hang."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from spreadsheets import as_ods, as_xlsx
from test_formats import CASES

from lora_dpo.data import read_pairs
from lora_dpo.data.answers import read_answers
from lora_dpo.data.doctor.examination import examine
from lora_dpo.data.formats.registry import FORMATS
from lora_dpo.data.messages import ROLES
from lora_dpo.data.pairs import ReadReport
from lora_dpo.data.prompts import read_prompts
from lora_dpo.data.read import account, outcomes
from lora_dpo.data.write import canonical_row, write_fixed
from lora_dpo.errors import DataError, LoraDPOError

ROWS = [row for case in CASES.values() for row in case.rows]
FUZZ = settings(
    max_examples=120,
    deadline=3000,  # milliseconds: a hang fails
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def as_jsonl() -> bytes:
    return "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def as_csv(separator: str = ",") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, sorted({key for row in ROWS for key in row}), delimiter=separator)
    writer.writeheader()
    for row in ROWS:
        writer.writerow({key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()})
    return text.getvalue().encode()


def as_parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    rows = CASES["trl-text"].rows + CASES["shp"].rows
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**rows[0], **row} for row in rows]), buffer)
    return buffer.getvalue()


def as_sheet(kind: str) -> bytes:
    rows = [("Question", "good", "bad"), *[(f"Number {number}?", number, f"no {number}") for number in range(4)]]
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / f"a{kind}"
        (as_ods if kind == ".ods" else as_xlsx)(path, {"Pairs": rows})
        return path.read_bytes()


WHOLE = {
    ".jsonl": as_jsonl(),
    ".json": json.dumps(ROWS).encode(),
    ".csv": as_csv(),
    ".parquet": as_parquet(),
    ".jsonl.gz": gzip.compress(as_jsonl(), mtime=0),
    ".json.gz": gzip.compress(json.dumps(ROWS).encode(), mtime=0),
    ".csv.gz": gzip.compress(as_csv(), mtime=0),
    ".parquet.gz": gzip.compress(as_parquet(), mtime=0),
    ".tsv": as_csv("\t"),
    ".xlsx": as_sheet(".xlsx"),
    ".ods": as_sheet(".ods"),
}
FEWER = (".tsv", ".xlsx", ".ods")

edits = st.lists(
    st.tuples(
        st.sampled_from(["set", "insert", "cut", "repeat", "truncate"]),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=8)
        | st.sampled_from([b"\x00", b'"', b"{", b"\n", b"\xff", b"\\ud800", b"[" * 9]),
    ),
    min_size=1,
    max_size=6,
)


def broken(whole: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    for kind, share, extra in changes:
        place = int(share * len(whole))
        if kind == "set":
            whole = whole[:place] + extra + whole[place + len(extra) :]
        elif kind == "insert":
            whole = whole[:place] + extra + whole[place:]
        elif kind == "cut":
            whole = whole[:place] + whole[place + 50 :]
        elif kind == "repeat":
            whole = whole[:place] + whole[max(0, place - 200) :]
        else:
            whole = whole[: max(1, place)]
    return whole


def must_be_readable(source: str) -> None:
    """Read single answers and prompts: a `DataError` of one line, or an account that adds up."""
    for good_only in (True, False):
        try:
            answers, report = read_answers(source, good_only=good_only)
        except DataError as error:
            assert "\n" not in str(error)  # noqa: PT017 - one of two good ends
        else:
            assert report.kept == len(answers) == report.rows - len(report.dropped) + report.surplus
            assert all(vote.up for vote in answers) or not good_only
    try:
        prompts = read_prompts(source)
    except DataError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert prompts
        assert all(prompt.messages for prompt in prompts)


def must_end_well(path: Path) -> None:
    """Read, examine and clean a file: a `LoraDPOError`, or an account that adds up."""
    must_be_readable(str(path))
    with contextlib.suppress(DataError):
        pairs, report = read_pairs(str(path))
        assert report.kept == len(pairs) == report.rows - len(report.dropped) + report.surplus
    out = path.with_name("clean.jsonl")
    try:
        found = examine([str(path)])
        fixed = write_fixed([str(path)], found, out)
    except LoraDPOError as error:
        assert "\n" not in str(error)  # noqa: PT017 - one of two good ends
        assert not out.exists()
        return
    assert found.report.kept == found.pairs
    assert fixed.pairs == out.read_bytes().count(b"\n")
    assert fixed.removed == fixed.dropped.read_bytes().count(b"\n")
    assert fixed.rows == found.report.rows
    removed = {json.loads(line)["row"] for line in fixed.dropped.read_bytes().splitlines()}
    read = list(outcomes(str(path), tolerant=True))
    places = [origin.row for outcome in read for origin, _ in outcome.read]
    assert len(set(places)) == len(places) == fixed.rows
    assert len(removed & set(places)) == fixed.removed
    assert fixed.pairs == sum(len(each.pairs) for each in read if not removed & {origin.row for origin, _ in each.read})
    for written in (out, fixed.dropped):
        written.unlink()


@pytest.mark.parametrize("kind", WHOLE)
def test_a_whole_file_reads(tmp_path, kind):
    path = tmp_path / f"a{kind}"
    path.write_bytes(WHOLE[kind])
    assert read_pairs(str(path))[0]
    assert read_answers(str(path), good_only=False)[0]
    must_end_well(path)


@pytest.mark.parametrize("kind", WHOLE)
def test_a_broken_file_ends_well(tmp_path, kind):
    path = tmp_path / f"a{kind}"

    @settings(FUZZ, max_examples=12 if kind in FEWER else FUZZ.max_examples)
    @given(changes=edits)
    def run(changes: list[tuple[str, float, bytes]]) -> None:
        path.write_bytes(broken(WHOLE[kind], changes))
        must_end_well(path)

    run()


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", *FEWER])
def test_any_bytes_end_well(tmp_path, kind):
    path = tmp_path / f"a{kind}"

    @settings(FUZZ, max_examples=60)
    @given(content=st.binary(max_size=400) | st.text(max_size=200).map(str.encode))
    def run(content: bytes) -> None:
        path.write_bytes(content)
        must_end_well(path)

    run()


# --- odd values in the columns of each format -----------------------------------------------------

texts = st.sampled_from(
    ["", " ", "Hi", "\n\nHuman: Hi\n\nAssistant: Yes", "\n\nHuman: Hi\n\nAssistant:", "[{", "\ud83d"]
)
texts |= st.text(max_size=8)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
turns = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(ROLES) | scalars,
        "from": st.sampled_from(["human", "gpt", "function_call", "observation", "system"]) | scalars,
        "content": texts | st.lists(st.fixed_dictionaries({"type": texts, "text": scalars}), max_size=2) | scalars,
        "value": texts | st.sampled_from(['{"name": "f", "arguments": {}}', '{"name": 3}', "[]"]) | scalars,
        "tool_calls": st.lists(st.fixed_dictionaries({"function": st.dictionaries(texts, scalars)}), max_size=2)
        | scalars,
        "id": texts | st.sampled_from("ab"),
        "parentId": st.none() | st.sampled_from("ab"),
        "answer": texts,
        "rank": scalars,
    },
)
values = st.recursive(
    scalars | turns | st.lists(turns, max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
trees = st.fixed_dictionaries(
    {
        "chat": st.fixed_dictionaries(
            {
                "chat": st.fixed_dictionaries(
                    {},
                    optional={
                        "history": st.fixed_dictionaries(
                            {"messages": st.dictionaries(st.sampled_from("ab"), turns) | values}
                        ),
                        "messages": values,
                        "params": values,
                    },
                )
            }
        )
    }
)
COLUMNS = sorted({key for row in ROWS for key in row})


@pytest.mark.parametrize("format", [*FORMATS, None], ids=[*(format.name for format in FORMATS), "detected"])
def test_odd_rows_are_pairs_or_counted_drops(tmp_path, format):
    path = tmp_path / "rows.jsonl"
    examples = [row for case in CASES.values() if format is None or case.format == format.name for row in case.rows]

    @settings(FUZZ, max_examples=100)
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        rows: list[dict[str, Any]] = []
        for _ in range(data.draw(st.integers(1, 3))):
            row = dict(data.draw(st.sampled_from(examples)))
            for column in data.draw(st.lists(st.sampled_from([*row, *COLUMNS]), max_size=3)):
                row[column] = data.draw(trees if column == "snapshot" else values)
            rows.append(row)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        report = ReadReport()
        pairs = []
        for outcome in outcomes(str(path), format=format.name if format else None, tolerant=True):
            account(report, outcome)
            pairs += outcome.pairs
        assert report.rows == len(rows)
        assert report.kept == len(pairs)
        for pair in pairs:
            json.dumps(canonical_row(pair), ensure_ascii=False).encode("utf-8")
        examine([str(path)], format=format.name if format else None)
        must_be_readable(str(path))

    run()
