from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import pandas
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_formats import CASES

from lora_dpo.data import Origin, PreferencePair, ReadReport, read_pairs
from lora_dpo.data.formats.trl import pair_from_row
from lora_dpo.data.messages import ROLES, BadRow
from lora_dpo.data.rows import read_rows
from lora_dpo.errors import ConfigError, DataError

HERE = Origin("rows", 1)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def pair_of(row: dict[str, Any]) -> tuple[list[Any], list[Any], list[Any]]:
    pair = pair_from_row(row, HERE)
    return list(pair.prompt), list(pair.chosen), list(pair.rejected)


def jsonl(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


TEXT_ROW = {"prompt": "Hi", "chosen": "Yes", "rejected": "No"}
MESSAGES_ROW = {"prompt": [user("Hi")], "chosen": [assistant("Yes")], "rejected": [assistant("No")]}
EXPECTED = ([user("Hi")], [assistant("Yes")], [assistant("No")])


# --- kinds of files -------------------------------------------------------------------------------


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_json(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps(rows, indent=2, ensure_ascii=False).encode()


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(
        {key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()} for row in rows
    )
    return text.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


WRITERS = {".jsonl": as_jsonl, ".json": as_json, ".csv": as_csv, ".parquet": as_parquet, ".JSONL": as_jsonl}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("row", [TEXT_ROW, MESSAGES_ROW], ids=["text", "messages"])
def test_every_kind_of_file_gives_the_same_pairs(tmp_path, suffix, row):
    path = tmp_path / f"pairs{suffix}"
    other = {**row, "chosen": 'Ünï, "quoted"\nand 🙂' if isinstance(row["chosen"], str) else [assistant("Ü\n🙂")]}
    path.write_bytes(WRITERS[suffix]([row, other]))
    pairs, report = read_pairs(str(path))
    assert [list(pairs[0].prompt), list(pairs[0].chosen), list(pairs[0].rejected)] == list(EXPECTED)
    assert pairs[1].chosen[0]["content"] in ('Ünï, "quoted"\nand 🙂', "Ü\n🙂")
    first = 2 if suffix == ".csv" else 1  # of a table as a spreadsheet shows it, below the header
    assert [pair.origin.row for pair in pairs] == [first, first + 1]
    assert (report.rows, report.kept) == (2, 2)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path, suffix):
    path = tmp_path / f"pairs{suffix}"
    path.write_bytes(b"\xef\xbb\xbf" + WRITERS[suffix]([TEXT_ROW]))
    pairs, _ = read_pairs(str(path))
    assert list(pairs[0].prompt) == [user("Hi")]


def test_blank_lines_are_no_rows_and_keep_line_numbers_true(tmp_path):
    path = tmp_path / "pairs.jsonl"
    line = json.dumps(TEXT_ROW)
    path.write_text(f"\n{line}\n   \n{line}\r\n\n", encoding="utf-8")
    pairs, report = read_pairs(str(path))
    assert [str(pair.origin) for pair in pairs] == [f"{path}:2", f"{path}:4"]
    assert report.rows == 2


def test_a_line_separator_inside_an_answer_does_not_split_the_row(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(as_jsonl([{**TEXT_ROW, "chosen": "a\u2028b\x85c"}]))
    pairs, _ = read_pairs(str(path))
    assert pairs[0].chosen[0]["content"] == "a\u2028b\x85c"


def test_a_csv_answer_may_be_longer_than_the_csv_modules_default_limit(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_bytes(as_csv([{**TEXT_ROW, "chosen": "x" * 200_000}]))
    pairs, _ = read_pairs(str(path))
    assert len(pairs[0].chosen[0]["content"]) == 200_000


def test_a_short_csv_row_is_dropped_for_what_it_lacks(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected\nHi,Yes\nHi,Yes,No\nHo,Yes,No,\n")  # a comma at the end is no cell
    pairs, report = read_pairs(str(path))
    assert len(pairs) == 2
    assert "without 'rejected'" in report.dropped[0].reason


def test_a_csv_row_with_an_unquoted_comma_is_never_read_as_other_answers(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected\nHi,Yes,No\nWhy?,Yes, of course,No\nHo,Yes,No\n")
    with pytest.raises(DataError, match=r"pairs\.csv, row 3: more cells than columns: quote texts that hold commas"):
        read_pairs(str(path))
    told = []
    rows = list(read_rows(str(path), on_broken=lambda *broken: told.append(broken)))
    assert [number for number, _ in rows] == [2, 4]
    assert told == [(3, "more cells than columns: quote texts that hold commas", '["Why?", "Yes", " of course", "No"]')]


def test_items_of_a_json_list_that_are_no_objects_are_told(tmp_path):
    path, told = tmp_path / "a.json", []
    path.write_text('[{"prompt": "Hi"}, null, ["x"]]')
    rows = list(read_rows(str(path), on_broken=lambda *broken: told.append(broken)))
    assert rows == [(1, {"prompt": "Hi"})]
    assert told == [(2, "expected an object, found NoneType", "null"), (3, "expected an object, found list", '["x"]')]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_one_bad_byte_breaks_one_line(tmp_path, name):
    path, told = tmp_path / name, []
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xbc"}\n{"a": "caf\xe9"}\n\xef\xbb\xbf{"a": 1}\n{"a": 2}\n')
    rows = list(read_rows(str(path), on_broken=lambda *broken: told.append(broken)))
    assert rows == [(1, {"a": "ü"}), (4, {"a": 2})]  # a byte order mark is one at the file's start only
    assert told[0] == (2, "not UTF-8 text (byte 25 of the file). Save it as UTF-8", '{"a": "caf\\xe9"}')
    assert [number for number, _, _ in told] == [2, 3]


def test_one_object_is_one_row(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(TEXT_ROW, indent=1))
    assert [pair.origin.row for pair in read_pairs(str(path))[0]] == [1]


def test_every_form_is_known_from_one_object(tmp_path):
    for case in CASES.values():
        for row in case.rows:
            path = tmp_path / "a.json"
            path.write_text(json.dumps(row))
            assert list(read_rows(str(path))) == [(1, row)]


@pytest.mark.parametrize("name", ["a.ndjson", "a.ndjson.gz"])
def test_ndjson_is_jsonl(tmp_path, name):
    content = as_jsonl([TEXT_ROW, TEXT_ROW])
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    for source in (tmp_path / name, tmp_path):
        assert [pair.origin.row for pair in read_pairs(str(source))[0]] == [1, 2]


def test_an_empty_name_is_not_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "a.jsonl", TEXT_ROW)
    for name in ("", " "):
        with pytest.raises(DataError, match="has an empty name"):
            read_pairs([name])
    assert read_pairs(".")[0]


def test_sources_are_read_in_the_order_given(tmp_path):
    first = jsonl(tmp_path / "b.jsonl", TEXT_ROW, {**TEXT_ROW, "prompt": "Two"})
    second = jsonl(tmp_path / "a.jsonl", {**TEXT_ROW, "prompt": "Three"})
    pairs, report = read_pairs([first, second])
    assert [pair.prompt[0]["content"] for pair in pairs] == ["Hi", "Two", "Three"]
    assert [(pair.origin.source, pair.origin.row) for pair in pairs] == [(first, 1), (first, 2), (second, 1)]
    assert report.rows == 3


def test_a_name_that_is_no_file_is_asked_from_the_hub_with_its_split(monkeypatch):
    asked = []

    def load_dataset(name: str, split: str) -> list[dict[str, str]]:
        asked.append((name, split))
        return [TEXT_ROW]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    read_pairs("owner/pairs")
    pairs, _ = read_pairs("owner/pairs:test_prefs")
    assert asked == [("owner/pairs", "train"), ("owner/pairs", "test_prefs")]
    assert pairs[0].origin == Origin("owner/pairs:test_prefs", 1)


def test_a_configuration_of_a_hub_data_set_is_named_before_the_split(monkeypatch):
    asked = []

    def load_dataset(*names: str, split: str) -> list[dict[str, str]]:
        asked.append((*names, split))
        if len(names) == 1:
            raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['en', 'de']")
        return [TEXT_ROW]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    read_pairs("owner/pairs/en:test")
    read_pairs("owner/pairs/v1.0")
    assert asked == [("owner/pairs", "en", "test"), ("owner/pairs", "v1.0", "train")]
    with pytest.raises(DataError, match=r"Config name is missing\.+\)\. Name one as owner/name/CONFIGURATION\."):
        read_pairs("owner/pairs")


def test_a_hub_failure_is_a_data_error_in_one_line(monkeypatch):
    def load_dataset(name: str, split: str) -> None:
        raise RuntimeError("offline\nmany\nlines")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError) as caught:
        read_pairs("owner/pairs")
    assert "owner/pairs" in str(caught.value)
    assert "RuntimeError: offline" in str(caught.value)
    assert "many" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("a.jsnl", "Did you mean a.jsonl?"),
        ("a.jsol.gz", "Did you mean a.jsonl?"),
        ("none.jsonl", "none.jsonl does not exist. Give the path of a preference file, or owner/name of the hub."),
        ("pears", "Did you mean pairs?"),
        ("pairs/bb.jsonl", "Did you mean pairs/b.jsonl?"),
        ("pairs/b", "Did you mean pairs/b.jsonl?"),
        ("pairs/unlike.csv", "owner/name of the hub."),
        ("./owner/name", "does not exist"),
        ("/owner/name", "does not exist"),
        ("~/owner/name", "does not exist"),
        ("owner/name/config/more", "does not exist"),
        ("x" * 300 + ".jsonl", "cannot be read: File name too long"),
        ("x" * 300, "cannot be read: File name too long"),
    ],
)
def test_a_mistyped_file_is_answered_here_and_never_asked_from_the_hub(tmp_path, monkeypatch, source, hint):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "a.jsonl", TEXT_ROW)
    (tmp_path / "a.csv").write_text("")
    (tmp_path / "pairs").mkdir()
    jsonl(tmp_path / "pairs" / "b.jsonl", TEXT_ROW)
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it fails
    with pytest.raises(DataError) as caught:
        read_pairs(source)
    assert hint in str(caught.value)
    assert str(caught.value).count("Did you mean") == hint.count("Did you mean")


def test_the_help_names_every_form():
    from lora_dpo.cli.options import FORMAT_HELP
    from lora_dpo.data.formats.registry import FORMATS

    named = FORMAT_HELP.partition(": ")[2].partition(" (")[0].replace(" or ", ", ").split(", ")
    assert named == [format.name for format in FORMATS]


def test_a_mistyped_form_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"Did you mean llamafactory-v1\?"):
        read_pairs(jsonl(tmp_path / "a.jsonl", TEXT_ROW), format="lamafactory")


# --- files that cannot be read --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.parquet", b"", "a.parquet is empty"),
        ("a.jsonl", b'{"prompt": 1}\n\n{"prompt": \n', "a.jsonl, line 3: broken JSON"),
        ("a.json", b'[\n{"prompt": 1},\n{"prompt" 2}]', "a.json, line 3: broken JSON"),
        ("a.json", b'{"prompt": "Hi"}', "a.json holds no usable pair: without 'chosen'"),
        ("a.json", b'{"text": "Hi"}', "a.json holds one object, not a list of rows."),
        ("a.json", b"3", "a.json holds one int, not a list of rows"),
        (
            "a.json",
            b'{"version": 1, "data": [{"prompt": "Hi"}, {}]}',
            "a.json holds one object, not a list of rows. Its 'data' is a list of 2: save that list alone.",
        ),
        ("a.jsonl", b"[1]\n", "a.jsonl, row 1: expected an object, found list"),
        ("a.json", b'[{"prompt": "Hi"}, null]', "a.json, row 2: expected an object, found NoneType"),
        ("a.csv", b'prompt,chosen,rejected\n"a,b\n', "a.csv: broken CSV"),
        ("a.parquet", b"PAR1 but not really", "a.parquet: broken Parquet"),
        ("a.jsonl", b'{"prompt": "caf\xe9"}\n', "a.jsonl, line 1: not UTF-8 text (byte 15 of the file)"),
        ("a.csv", "prompt,chosen\n".encode("utf-16")[:-1], "a.csv: its text is no whole UTF-16 (truncated data)"),
        ("a.csv", b"prompt\r\n\xc3\xa9t\xc3\xa9\xff\r\n", "a.csv is not UTF-8 text (byte 13). Save it as UTF-8"),
        ("a.doc", b"x", "a.doc: unknown kind of file. Known are .csv, .json, .jsonl, .ndjson, .ods, .parquet, .tsv"),
        ("a.xls", b"x", "a.xls: unknown kind of file. Save it as .xlsx, .ods or .csv."),
        (
            "a.txt",
            b"a\tb\n",
            "a.txt: unknown kind of file. If it is a table, as Excel's Unicode text is, give it a name",
        ),
        ("a", b"text", "a: unknown kind of file"),
        ("a.jsonl", b"[" * 200_000 + b"\n", "a.jsonl, line 1: JSON nested too deeply"),
        ("a.jsonl", b"\n \n", "a.jsonl holds no usable pair: no rows"),
        ("a.json", b"[]", "a.json holds no usable pair: no rows"),
        ("a.csv", b"prompt,chosen,rejected\n", "a.csv holds no usable pair: no rows"),
        ("a.csv", b"text\nHi,surplus\n", "a.csv, row 2: more cells than columns"),
        ("a.csv", b"text\nHi\n", "a.csv: no column says that it is prompt or chosen or rejected. Its columns are"),
        ("a.jsonl", b'{"question": "Hi"}\n', "a.jsonl holds no usable pair: without 'chosen' (columns: question)"),
        ("a.csv", b"prompt,chosen,rejected,chosen\nHi,a,b,c\n", "a.csv has two columns named 'chosen'. Rename or"),
        ("a.csv", b"prompt,chosen, chosen,rejected\nHi,a,b,c\n", "a.csv has two columns named 'chosen'"),
        (
            "a.jsonl",
            b'\n{"prompt": "Hi", "chosen": "a", "chosen": "b"}\n',
            "line 2: an object has the key 'chosen' twice",
        ),
        ("a.json", b'[{"prompt": [{"role": "user", "role": "system"}]}]', "an object has the key 'role' twice"),
        (
            "a.jsonl",
            b'{"text": "Hi", "chosen_response": "a", "rejected_response": "b"}\n',
            "without 'input', 'instruction' or 'prompt' (columns: chosen_response, rejected_response, text)",
        ),
        (
            "a.jsonl",
            b'{"text": "Hi", "generations": ["a", "b"], "ratings": [1, 2]}\n',
            "without 'instruction', 'input', 'prompt' or 'messages' (columns: generations, ratings, text)",
        ),
        ("a.jsonl", b'{"conversations": null, "chosen": "a", "rejected": "b"}\n', "without 'conversations'"),
        ("a.jsonl", b'{"answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]}\n', "without 'prompt'"),
    ],
)
def test_a_file_that_cannot_be_used_says_where_and_why(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_pairs(str(tmp_path / name))
    assert str(caught.value).startswith(str(tmp_path))
    assert message in str(caught.value)


ORIENTS = ["columns", "index", "split", "table", "list"]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("orient", ORIENTS)
@pytest.mark.parametrize("row", [TEXT_ROW, MESSAGES_ROW], ids=["text", "messages"])
def test_a_whole_table_in_one_object_is_said_to_be_one(tmp_path, name, orient, row):
    frame = pandas.DataFrame([row, {**row, "chosen": row["rejected"], "rejected": row["chosen"]}])
    text = json.dumps(frame.to_dict("list")) if orient == "list" else frame.to_json(orient=orient)
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"holds columns, not rows: .*orient='records', lines=True"):
        read_pairs(str(tmp_path / name))


@pytest.mark.parametrize(
    ("start", "header"),
    [
        (b"sep=,\nprompt,chosen,rejected\n", 1),
        (b"sep=,\r\nprompt,chosen,rejected\n", 1),
        (b"\nprompt,chosen,rejected\n", 2),
        (b"\r\n \nprompt,chosen,rejected\n", 3),
        (b",,\nprompt,chosen,rejected\n", 2),
        (b"\xef\xbb\xbfsep=,\nprompt,chosen,rejected\n", 1),
        (b"prompt , chosen , rejected\n", 1),
        (b'"prompt", "chosen", "rejected"\n', 1),
    ],
)
def test_a_csv_as_spreadsheets_and_hands_write_it(tmp_path, start, header):
    path = tmp_path / "a.csv"
    after = b" " if b", " in start else b""
    path.write_bytes(start + b'Hi,%s"Hello, you",%sGo\n\nYo,%sHey,%s"No, ""you"""\n' % ((after,) * 4))
    read, _ = read_pairs(str(path))
    assert [(one.prompt[0]["content"], one.chosen[0]["content"], one.rejected[0]["content"]) for one in read] == [
        ("Hi", "Hello, you", "Go"),
        ("Yo", "Hey", 'No, "you"'),
    ]
    assert [one.origin.row for one in read] == [header + 1, header + 3]  # as a spreadsheet shows them


def test_a_space_that_a_cell_begins_with_stays_where_the_header_has_none(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\nHi, a, b\n")
    (pair,), _ = read_pairs(str(tmp_path / "a.csv"))
    assert (pair.chosen[0]["content"], pair.rejected[0]["content"]) == (" a", " b")


def test_two_parquet_columns_of_one_name_are_said(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table([["Hi"], ["a"], ["b"], ["c"]], names=["prompt", "chosen", "rejected", "chosen"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet has two columns named 'chosen'"):
        read_pairs(str(tmp_path / "a.parquet"))


def test_no_source_at_all_is_said():
    with pytest.raises(DataError, match="list of preference files is empty"):
        read_pairs([])


def test_a_missing_file_in_a_list_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
        read_pairs([jsonl(tmp_path / "a.jsonl", TEXT_ROW), str(tmp_path / "none.jsonl")])


def test_a_number_too_long_for_python_is_broken_json(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": ' + "1" * 5000 + "}\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 1"):
        read_pairs(str(tmp_path / "a.jsonl"))


def test_a_bad_byte_is_placed_where_it_is_in_the_file(tmp_path):
    row = as_jsonl([TEXT_ROW])
    (tmp_path / "a.jsonl").write_bytes(row * 1000 + b"\xff\n")
    with pytest.raises(DataError, match=f"byte {len(row) * 1000}"):
        read_pairs(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_missing_file_is_named(tmp_path, suffix):
    with pytest.raises(DataError, match=f"pairs{suffix} does not exist"):
        read_pairs(str(tmp_path / f"pairs{suffix}"))


@pytest.mark.parametrize("name", ["folder", "folder.jsonl"])
def test_a_folder_is_no_file(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match="is a folder"):
        read_pairs(str(tmp_path / name))


def test_a_second_source_without_a_usable_pair_is_an_error_with_its_own_reason(tmp_path):
    good = jsonl(tmp_path / "good.jsonl", TEXT_ROW, {**TEXT_ROW, "chosen": ""})
    bad = jsonl(tmp_path / "bad.jsonl", {**TEXT_ROW, "rejected": "Yes"})
    with pytest.raises(DataError, match=r"bad\.jsonl holds no usable pair: chosen equals rejected"):
        read_pairs([good, bad])


# --- formats of rows ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        TEXT_ROW,
        MESSAGES_ROW,
        {**MESSAGES_ROW, "prompt": "Hi"},
        {**TEXT_ROW, "prompt": [user("Hi")]},
        {"prompt": [user("Hi")], "chosen": assistant("Yes"), "rejected": assistant("No")},
        {"chosen": [user("Hi"), assistant("Yes")], "rejected": [user("Hi"), assistant("No")]},
        {"prompt": None, "chosen": [user("Hi"), assistant("Yes")], "rejected": [user("Hi"), assistant("No")]},
        {key: json.dumps(value) for key, value in MESSAGES_ROW.items()},
        {**MESSAGES_ROW, "score": 0.5, "id": None},
    ],
    ids=["text", "messages", "text-prompt", "text-answers", "one-message", "implicit", "null-prompt", "json", "extra"],
)
def test_every_form_means_the_same_pair(row):
    assert pair_of(row) == EXPECTED


def test_text_that_only_looks_like_json_messages_stays_text():
    for text in ('[{"a": 1}]', '[{"role": "user"', "[1, 2]", '[{"role": "user"}, 3]'):
        assert pair_of({**TEXT_ROW, "chosen": text})[1] == [assistant(text)]


@pytest.mark.parametrize(
    "cell",
    [
        json.dumps([assistant("Yes")], indent=2),
        '[ {"role": "assistant", "content": "Yes"}]',
        str([assistant("Yes")]),
        " [\n  {'content': 'Yes', 'role': 'assistant', 'weight': None}]",
        "[{'from': 'gpt', 'value': 'Yes'}]",
    ],
    ids=["indented", "a-space", "pandas", "pandas-none", "sharegpt"],
)
def test_messages_in_a_cell_are_read_however_they_were_written(cell):
    assert pair_of({**TEXT_ROW, "chosen": cell})[1] == [assistant("Yes")]
    assert pair_of({**TEXT_ROW, "prompt": cell.replace("assistant", "user").replace("gpt", "human")})[0] == [
        user("Yes")
    ]


@pytest.mark.parametrize(
    "cell",
    [
        "[{'role': 'user', 'content': 'Hi'}\n {'role': 'assistant', 'content': 'Yes'}]",  # what numpy prints
        '[{"role": "assistant", "content": "Yes',  # a cell that a spreadsheet cut
        "[{'role': 'assistant', 'content': 'Yes', []: 1}]",
        "[{'role': 'assistant', 'content': " + "(" * 300 + ")" * 300 + "}]",
    ],
    ids=["numpy", "cut", "unhashable", "deep"],
)
def test_messages_in_a_cell_that_cannot_be_read_never_become_text(cell):
    with pytest.raises(BadRow, match="neither JSON nor a Python list: write them as JSON"):
        pair_of({**TEXT_ROW, "chosen": cell})


@pytest.mark.parametrize(
    "cell",
    [
        '{"role": "assistant", "content": "Yes"}',
        "{'content': \"Yes\", 'role': 'assistant', 'name': None}",
        "{'from': 'gpt', 'value': 'Yes'}",
        ' {"from": "gpt", "value": "Yes"}',
    ],
)
def test_one_message_in_a_cell_is_a_message(cell):
    assert pair_of({**TEXT_ROW, "chosen": cell})[1] == [assistant("Yes")]


def test_one_message_in_a_cell_that_was_cut_never_becomes_text():
    for cell in ("{'from': 'gpt', 'value': 'Yes", '{"role": "assistant", "content": "Yes'):
        with pytest.raises(BadRow, match="neither JSON nor a Python list: write them as JSON"):
            pair_of({**TEXT_ROW, "chosen": cell})


@pytest.mark.parametrize(
    "answer",
    [
        '{"role": "admin", "content": "x"}',
        '{"from": "Rome", "to": "Bari"}',
        '{"from": "gpt", "value": 3}',
        '{"from": [], "value": "x"}',
        '{"role": "assistant"}',
        '{"answer": 3}',
        '{"role": "assistant", "content": "x"} is what you send.',
        "{'a': 1, 'role': 'cook', 'content': 'soup'",
    ],
)
def test_an_answer_that_is_json_of_its_own_stays_text(answer):
    assert pair_of({**TEXT_ROW, "chosen": answer})[1] == [assistant(answer)]


def test_a_python_list_that_is_no_messages_stays_text():
    for text in ("[{'a': 1}]", "[{'role': 'x'", "[{'role': 3}, 'content']", "[ {x}]"):
        assert pair_of({**TEXT_ROW, "chosen": text})[1] == [assistant(text)]


def test_a_system_column_beside_the_prompt_is_its_first_turn():
    row = {**TEXT_ROW, "system": "Be brief."}
    assert pair_of(row)[0] == [system("Be brief."), user("Hi")]
    assert pair_of({**row, "prompt": [system("Own."), user("Hi")]})[0] == [system("Own."), user("Hi")]


@pytest.mark.parametrize(
    ("given", "read"),
    [("{}", {}), ("", {}), (None, {}), ({}, {}), ('{"day": 1}', {"day": 1}), ("[]", {}), ("Monday", "Monday")],
)
def test_arguments_of_a_call_are_an_object(given, read):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "rain", "arguments": given}}]}
    made = pair_of({**TEXT_ROW, "chosen": [call]})[1][0]["tool_calls"][0]["function"]["arguments"]
    assert made == read


def test_extra_keys_of_a_message_are_left_out():
    row = {**MESSAGES_ROW, "chosen": [{**assistant("Yes"), "weight": 1, "name": "x"}]}
    assert pair_of(row)[1] == [assistant("Yes")]


def test_a_system_turn_and_earlier_turns_belong_to_the_prompt():
    before = [system("Be brief."), user("Hi"), assistant("Hello"), user("And?")]
    explicit = {"prompt": before, "chosen": "Yes", "rejected": "No"}
    implicit = {"chosen": [*before, assistant("Yes")], "rejected": [*before, assistant("No")]}
    expected = (before, [assistant("Yes")], [assistant("No")])
    assert pair_of(explicit) == expected
    assert pair_of(implicit) == expected


def test_an_implicit_prompt_ends_where_the_conversations_part():
    chosen = [user("Hi"), assistant("A"), user("Go on"), assistant("B")]
    rejected = [user("Hi"), assistant("C")]
    assert pair_of({"chosen": chosen, "rejected": rejected}) == ([user("Hi")], chosen[1:], rejected[1:])


@pytest.mark.parametrize("between", [[user("One?")], []], ids=["own-question", "answer-after-answer"])
def test_an_implicit_prompt_never_ends_with_the_assistant(between):
    start = [user("Hi"), assistant("Hello")]
    row = {"chosen": [*start, *between, assistant("1")], "rejected": [*start, user("Two?"), assistant("2")]}
    if not between:
        row["rejected"] = [*start, assistant("2")]
    with pytest.raises(BadRow):
        pair_from_row(row, HERE)


def test_an_implicit_prompt_is_as_strict_about_empty_text_as_an_explicit_one():
    row = {"chosen": [user(" "), assistant("Yes")], "rejected": [user(" "), assistant("No")]}
    with pytest.raises(BadRow, match="empty prompt"):
        pair_from_row(row, HERE)


@pytest.mark.parametrize("prompt", ["Hi", [user("Hi")]], ids=["text", "messages"])
def test_an_explicit_prompt_is_not_said_twice_when_the_answers_repeat_it(prompt):
    row = {"prompt": prompt, "chosen": [user("Hi"), assistant("Yes")], "rejected": [user("Hi"), assistant("No")]}
    assert pair_of(row) == EXPECTED


def test_an_answer_that_starts_with_another_question_is_a_bad_row():
    row = {"prompt": "Hi", "chosen": [user("Hello"), assistant("Yes")], "rejected": "No"}
    with pytest.raises(BadRow, match="chosen starts with the user"):
        pair_from_row(row, HERE)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": None}, "without 'chosen' (columns: chosen, prompt, rejected)"),
        ({"rejected": None}, "without 'rejected' (columns: chosen, prompt, rejected)"),
        ({"prompt": None}, "without 'prompt', and chosen and rejected share no first message"),
        ({"chosen": ""}, "empty chosen answer"),
        ({"rejected": " \n\t"}, "empty rejected answer"),
        ({"chosen": []}, "empty chosen answer"),
        ({"prompt": " "}, "empty prompt"),
        ({"prompt": []}, "empty prompt"),
        ({"prompt": [user("")]}, "empty prompt"),
        ({"prompt": [user("Hi"), assistant("Hello")]}, "prompt ends with the assistant"),
        ({"chosen": [user("Yes")]}, "chosen does not end with the assistant"),
        ({"rejected": [assistant("No"), user("Why?")]}, "rejected does not end with the assistant"),
        ({"rejected": "Yes"}, "chosen equals rejected"),
        ({"rejected": [assistant("Yes")]}, "chosen equals rejected"),
        ({"prompt": 3}, "prompt is neither text nor a list of messages"),
        ({"chosen": 3.5}, "chosen is neither text nor a list of messages"),
        ({"rejected": True}, "rejected is neither text nor a list of messages"),
        ({"chosen": ["Yes"]}, "chosen has a message without text content"),
        ({"chosen": {"role": "assistant"}}, "chosen has a message without text content"),
        ({"chosen": [{"role": "assistant", "content": None}]}, "chosen has a message without text content"),
        ({"prompt": [{"role": "user", "content": [{"text": "Hi"}]}]}, "prompt has a message without text content"),
        ({"prompt": [{"role": "human", "content": "Hi"}]}, "prompt has a message with an unknown role ('human')"),
        ({"chosen": [{"content": "Yes"}]}, "chosen has a message with an unknown role (None)"),
    ],
)
def test_a_bad_row_is_dropped_and_counted_by_its_reason(tmp_path, change, reason):
    source = jsonl(tmp_path / "a.jsonl", TEXT_ROW, {**TEXT_ROW, **change}, TEXT_ROW)
    pairs, report = read_pairs(source)
    assert [pair.origin.row for pair in pairs] == [1, 3]
    assert report.reasons() == [(reason, 1)]
    assert report.dropped[0].origin == Origin(source, 2)


def test_two_equal_conversations_are_no_preference():
    whole = [user("Hi"), assistant("Yes")]
    with pytest.raises(BadRow, match="chosen equals rejected"):
        pair_from_row({"chosen": whole, "rejected": list(whole)}, HERE)


@pytest.mark.parametrize("part", ["prompt", "chosen"])
def test_half_of_a_surrogate_pair_is_a_bad_row(tmp_path, part):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(TEXT_ROW) + "\n" + json.dumps({**TEXT_ROW, part: "cut \ud83d"}) + "\n")
    _, report = read_pairs(str(path))
    assert [dropped.origin.row for dropped in report.dropped] == [2]


def test_on_bad_row_error_stops_at_the_first_bad_row_with_its_place(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", TEXT_ROW, {**TEXT_ROW, "chosen": ""}, {"chosen": "x"})
    with pytest.raises(DataError) as caught:
        read_pairs(source, on_bad_row="error")
    assert str(caught.value) == f"{source}, row 2: empty chosen answer."


def test_the_report_accounts_for_every_row(tmp_path):
    empty = {**TEXT_ROW, "chosen": ""}
    first = jsonl(tmp_path / "a.jsonl", TEXT_ROW, empty, {**TEXT_ROW, "rejected": "Yes"}, empty)
    second = jsonl(tmp_path / "b.jsonl", empty, TEXT_ROW)
    pairs, report = read_pairs([first, second])
    assert (report.rows, report.kept, len(report.dropped)) == (6, len(pairs), 4)
    assert report.rows == report.kept + len(report.dropped)
    assert report.reasons() == [("empty chosen answer", 3), ("chosen equals rejected", 1)]
    assert report.summary() == "2 pairs read, 4 dropped (3 empty chosen answer, 1 chosen equals rejected)"


def test_a_report_without_drops_says_so():
    assert ReadReport(rows=3).summary() == "3 pairs read, 0 dropped"


# --- any row at all -------------------------------------------------------------------------------

words = (
    st.sampled_from(["Hi", "Yes", "No", "", " ", "\n", '[{"role": "user", "content": "Hi"}]', '[{"role":']) | st.text()
)
messages = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from([*ROLES, "human", "", None]) | st.integers(),
        "content": words | st.none() | st.lists(words, max_size=1),
        "name": words,
    },
)
good_messages = st.builds(lambda role, text: {"role": role, "content": text}, st.sampled_from(ROLES), words)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
parts = words | st.lists(good_messages, max_size=4) | st.lists(messages, max_size=3) | messages | anything
rows = st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "messages"]) | words, parts, max_size=5)
likely_rows = st.fixed_dictionaries({"chosen": parts, "rejected": parts}, optional={"prompt": parts})


@settings(max_examples=300, deadline=None)
@given(row=rows | likely_rows)
@example(row=TEXT_ROW)
def test_any_row_is_a_valid_pair_or_a_bad_row(row):
    try:
        pair = pair_from_row(row, HERE)
    except BadRow as bad:
        assert str(bad)  # noqa: PT017 - one of two good ends
        return
    assert isinstance(pair, PreferencePair)
    for part in (pair.prompt, pair.chosen, pair.rejected):
        assert isinstance(part, tuple)
        assert part
        assert all({"role", "content"} <= set(message) <= {"role", "content", "name"} for message in part)
        assert all(message["role"] == "tool" for message in part if "name" in message)
        assert all(message["role"] in ROLES and isinstance(message["content"], str) for message in part)
        assert part[-1]["content"].strip()
    assert pair.prompt[-1]["role"] != "assistant"
    assert pair.chosen[-1]["role"] == pair.rejected[-1]["role"] == "assistant"
    assert pair.chosen != pair.rejected
    assert pair.origin == HERE


@pytest.mark.parametrize("more", [{"schema": "CREATE TABLE t", "data": "x"}, {"columns": "a, b", "data": "x"}])
def test_a_row_that_has_columns_of_a_table_s_names_is_a_row(more, tmp_path):
    row = {"prompt": "Which?", "chosen": "This.", "rejected": "That.", **more}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    assert len(read_pairs(str(tmp_path / "a.jsonl"))[0]) == 1
