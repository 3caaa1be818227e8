"""Collected pairs: uploads become canonical, pairs are mended and removed safely, and no name leads elsewhere."""

from __future__ import annotations

import gzip
import io
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from bounded import within
from spreadsheets import as_ods, as_xlsx

from lora_dpo.data import read_pairs
from lora_dpo.data.unpacked import unpacked_size
from lora_dpo.demo import column_pickers
from lora_dpo.demo.html import findings
from lora_dpo.demo.pair_store import KINDS, PairStore, check_upload, clean_name
from lora_dpo.demo.votes import ShownAnswer
from lora_dpo.errors import DataError, UnclearColumns


@pytest.fixture
def collection(tmp_path):
    return PairStore(tmp_path / "collected")


def upload(tmp_path, text, name="pairs.jsonl"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


ROWS = [
    {"instruction": "Say one.", "input": "", "chosen": "One.", "rejected": "1"},
    {"instruction": "Say two.", "input": "", "chosen": "Two.", "rejected": "Two."},
    {"instruction": "Say three.", "input": "", "chosen": "Three.", "rejected": "3", "system": "Be brief."},
]


@pytest.fixture
def taken(collection, tmp_path):
    text = "".join(json.dumps(row) + "\n" for row in ROWS) + "no row\n"
    return collection.take_in(upload(tmp_path, text), "My pairs (1).jsonl")


def test_an_upload_becomes_canonical_with_its_account(collection, taken):
    assert taken.name == "My-pairs-1"
    assert taken.report.summary() == "2 pairs read, 2 dropped (1 chosen equals rejected, 1 unreadable: broken JSON)"
    assert set(taken.diagnosis.findings) == {"equal", "unreadable"}
    assert collection.names() == ["My-pairs-1"]
    path = collection.path_of("My-pairs-1")
    pairs, report = read_pairs(str(path), on_bad_row="error")
    assert report.read_as == "TRL preference pairs"
    assert pairs[1].prompt[0] == {"role": "system", "content": "Be brief."}
    assert pairs[0].provenance == {"file": "My pairs (1).jsonl", "row": 1}  # never the path of a temporary folder
    assert str(path.parent) not in path.read_text()


def test_a_spreadsheet_is_an_upload_like_others(collection, tmp_path):
    rows = [
        ("Frage", "besser", "schlechter", "Notiz"),
        ("Wie?", "So.", "Weiß nicht.", "x"),
        ("Wo?", "Hier.", "#NV", ""),
    ]
    for name, writer in (("a.xlsx", as_xlsx), ("b.ods", as_ods)):
        taken = collection.take_in(Path(writer(tmp_path / name, {"S": rows})), f"Meine {name}")
        assert taken.report.noted() == [
            "read 'Frage' as prompt, 'besser' as chosen, 'schlechter' as rejected; not read: 'Notiz'"
        ]
        (entry,) = collection.entries(taken.name)
        assert entry.texts == ("Wie?", "So.", "Weiß nicht.")
        assert entry.pair.provenance == {"file": f"Meine {name}", "row": 2}
        shown = findings(taken.diagnosis, taken.report)
        assert "read &#x27;Frage&#x27; as prompt" in shown
        assert "chosen is an error of the spreadsheet" not in shown  # it is the rejected one
        assert "rejected is an error of the spreadsheet (#NV)" in shown


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_an_upload_whose_columns_cannot_be_told_says_which_there_are_and_takes_them_by_name(collection, tmp_path, kind):
    text = "Q,A,B\nWhy?,So.,Not so.\n" if kind == "csv" else json.dumps({"Q": "Why?", "A": "So.", "B": "Not so."})
    path = upload(tmp_path, text, f"0123.{kind}")
    with pytest.raises(UnclearColumns) as caught:
        collection.take_in(path, f"mine.{kind}")
    assert caught.value.columns == ("Q", "A", "B")
    assert str(caught.value).startswith(f"mine.{kind}")
    assert str(tmp_path) not in str(caught.value)
    assert "--columns" not in caught.value.problem
    assert collection.names() == []
    for named, says in (
        ({"prompt": "Q", "chosen": "A", "rejected": "A"}, "'A' cannot be both chosen and rejected. Choose another"),
        ({"prompt": "Q", "chosen": "A", "rejected": "C"}, "there is no column 'C', which is to be rejected."),
    ):
        with pytest.raises(DataError, match=says):
            collection.take_in(path, f"mine.{kind}", columns=named)
    taken = collection.take_in(path, f"mine.{kind}", columns={"prompt": "Q", "chosen": "B", "rejected": "A"})
    assert collection.entries(taken.name)[0].texts == ("Why?", "Not so.", "So.")


def test_the_pickers_are_filled_with_what_may_be_meant_and_what_is_picked_is_named():
    unclear = UnclearColumns("a.csv: unclear. Name them: …", columns=("Q", "Good", "Best"), guess={"chosen": "Good"})
    shown = column_pickers.asked("/place/a.csv", unclear)
    assert [pick["value"] for pick in shown[2:5]] == [None, "Good", None]
    assert [pick["choices"] for pick in shown[2:8:5]] == [["Q", "Good", "Best"], ["(none)", "Q", "Good", "Best"]]
    assert len(shown) == len(column_pickers.hidden())
    none = column_pickers.NONE
    assert column_pickers.picked(["Q", "Good", "Best", none, none, "Q2"]) == {
        "prompt": "Q",
        "chosen": "Good",
        "rejected": "Best",
        "system": "Q2",
    }
    with pytest.raises(DataError, match="No column is chosen for: Worse answer"):
        column_pickers.picked(["Q", "Good", None, none, none, none])


def test_a_second_upload_of_the_same_name_takes_another(collection, taken, tmp_path):
    again = collection.take_in(upload(tmp_path, json.dumps(ROWS[0])), "My pairs (1).jsonl")
    assert again.name == "My-pairs-1-2"


def test_an_upload_whose_name_differs_in_capitals_alone_takes_another(collection, taken, tmp_path):
    again = collection.take_in(upload(tmp_path, json.dumps(ROWS[0])), "MY pairs (1).jsonl")
    assert again.name == "MY-pairs-1-2"  # most disks of Windows and macOS would say that the file is there
    assert len(collection.names()) == 2


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("../../etc/passwd.jsonl", "passwd"),
        ("..\\..\\boot.json.gz", "boot"),
        ("<img src=x onerror=alert(1)>.jsonl", "img-src-x-onerror-alert-1"),
        ("votes.jsonl", "upload"),
        (".hidden.jsonl", "hidden"),
        ("日本語.jsonl", "upload"),
        ("a" * 300 + ".csv", "a" * 60),
        ("", "upload"),
        ("-rf.jsonl", "rf"),
    ],
)
def test_names_from_outside_become_words(name, clean):
    assert clean_name(name) == clean


def test_no_name_leads_out_of_the_folder(collection, taken, tmp_path):
    upload(tmp_path, json.dumps(ROWS[0]), "outside.jsonl")
    for name in ("../../outside", "../votes", "/etc/passwd", "", ".", "uploads/My-pairs-1"):
        with pytest.raises(DataError, match="no pairs called"):
            collection.path_of(name)


def test_uploads_are_held_to_kinds_and_sizes(collection, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"pairs\.exe is no file of a known kind: known are \.jsonl"):
        check_upload(upload(tmp_path, "x", "pairs.exe"), "pairs.exe", KINDS)
    monkeypatch.setattr("lora_dpo.demo.pair_store.MAX_UPLOAD", 10)
    with pytest.raises(DataError, match="has 0 MB; at most"):
        collection.take_in(upload(tmp_path, json.dumps(ROWS[0])), "pairs.jsonl")
    assert collection.names() == []


def test_a_file_without_pairs_leaves_nothing(collection, tmp_path):
    with pytest.raises(DataError, match="holds no usable pair"):
        collection.take_in(upload(tmp_path, json.dumps(ROWS[1])), "x.jsonl")
    assert collection.names() == []


def test_search_wants_all_words_in_any_part(collection, taken):
    found = collection.entries("My-pairs-1", "BRIEF three")
    assert [entry.line for entry in found] == [2]
    assert found[0].texts == ("Say three.", "Three.", "3")
    assert collection.entries("My-pairs-1", "one three") == []
    assert len(collection.entries("My-pairs-1")) == 2


def test_a_change_touches_the_last_turns_alone_and_says_so(collection, taken):
    entry = collection.entries("My-pairs-1")[1]
    collection.change("My-pairs-1", entry, prompt="Count to three.", chosen="One two three.", rejected="3")
    changed = collection.entries("My-pairs-1")[1]
    assert changed.texts == ("Count to three.", "One two three.", "3")
    assert changed.pair.prompt[0]["content"] == "Be brief."
    assert changed.pair.provenance == {"file": "My pairs (1).jsonl", "row": 3, "edited": True}
    with pytest.raises(DataError, match="With these words it would be no pair: chosen equals rejected"):
        collection.change("My-pairs-1", changed, prompt="A", chosen="B", rejected="B")


def test_what_was_changed_meanwhile_is_not_overwritten(collection, taken):
    first, second = collection.entries("My-pairs-1")
    collection.delete("My-pairs-1", [first])
    for stale in (first, second):  # the second moved up a line
        with pytest.raises(DataError, match="changed or removed meanwhile"):
            collection.delete("My-pairs-1", [stale])
    (left,) = collection.entries("My-pairs-1")
    assert left.texts == second.texts
    collection.delete("My-pairs-1", [left])
    assert collection.entries("My-pairs-1") == []
    assert collection.diagnose("My-pairs-1") is None


def test_votes_are_first_and_can_be_mended_like_uploads(collection, taken):
    a, b = ShownAnswer("One.", "base", {}), ShownAnswer("Two.", "mine", {})
    collection.book.add([{"role": "user", "content": "Q"}], a, b, "a", vote_id="1")
    assert collection.names() == ["votes", "My-pairs-1"]
    (entry,) = collection.entries("votes")
    collection.change("votes", entry, prompt="Q", chosen="One!", rejected="Two.")
    (entry,) = collection.entries("votes")
    assert (entry.texts[1], entry.pair.provenance["chosen"]) == ("One!", {"who": "base"})
    assert collection.book.records()[0].losses == 1  # who won does not change with the words
    assert collection.entry("votes", entry.line, entry.mark).pair == entry.pair
    with pytest.raises(DataError, match="meanwhile"):
        collection.entry("votes", entry.line, "other")


def test_an_export_holds_all_chosen_files_in_the_canonical_form(collection, taken, tmp_path):
    target = collection.export(["My-pairs-1"], tmp_path / "out.jsonl")
    assert target.read_text() == collection.path_of("My-pairs-1").read_text()
    with pytest.raises(DataError, match="no pair to take away"):
        collection.export([], tmp_path / "none.jsonl")


def repeated(text, rows):
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), [text])


def in_lists(values):
    return pyarrow.ListArray.from_arrays([0, len(values)], values)


LARGE = {
    "a long text in every row": lambda: {"prompt": repeated("x" * 100_000, 5000)},
    "a long text in one row": lambda: {"messages": in_lists(repeated("x" * 100_000, 5000))},
    "a long text in a message": lambda: {
        "messages": in_lists(pyarrow.StructArray.from_arrays([repeated("x" * 100_000, 5000)], ["content"]))
    },
    "many rows of nothing": lambda: {"prompt": pyarrow.nulls(3_000_000)},
    "one row of many": lambda: {"prompt": in_lists(pyarrow.nulls(20_000_000, pyarrow.int8()))},
    "a long text that is packed": lambda: {"prompt": pyarrow.array(["x" * 80_000_000])},
}


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("case", LARGE)
def test_a_small_parquet_file_that_holds_much_is_refused(case, packed, tmp_path):
    path = tmp_path / f"pairs.parquet{packed}"
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(LARGE[case]()), buffer, compression="zstd")
    path.write_bytes(gzip.compress(buffer.getvalue()) if packed else buffer.getvalue())
    assert path.stat().st_size < 100_000
    with within(2), pytest.raises(DataError, match="unpacks to more than that; at most 67 MB"):
        check_upload(path, path.name, KINDS)


def test_what_is_counted_of_parquet_is_about_its_values(tmp_path):
    rows = [{"prompt": "p" * 50, "chosen": [{"role": "user", "content": "c" * 100}], "n": 1.5} for _ in range(3000)]
    table = pyarrow.Table.from_pylist(rows).append_column(
        "map", pyarrow.array([[("key", "value")]] * 3000, pyarrow.map_(pyarrow.string(), pyarrow.string()))
    )
    pyarrow.parquet.write_table(table, tmp_path / "pairs.parquet")
    counted = unpacked_size(tmp_path / "pairs.parquet", 64 << 20)
    as_json = sum(len(json.dumps(row)) for row in table.to_pylist())
    assert 0.9 * as_json < counted < 1.6 * as_json
    (tmp_path / "broken.parquet").write_bytes((tmp_path / "pairs.parquet").read_bytes()[:-50])
    assert unpacked_size(tmp_path / "broken.parquet", 64 << 20) == 0  # the reader says what is wrong


@pytest.mark.parametrize("kind", [".xlsx", ".ods"])
def test_a_small_spreadsheet_that_holds_much_is_refused(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_dpo.demo.pair_store.MAX_UPLOAD", 1 << 20)
    rows = [("prompt", "chosen", "rejected"), *[("x" * 20_000, "a", "b")] * (200 if kind == ".xlsx" else 1)]
    cell = f"<table:table-cell><text:p>{'x' * 20_000}</text:p></table:table-cell>"
    many = f'<table:table-row table:number-rows-repeated="999999">{cell}</table:table-row>'
    path = tmp_path / f"pairs{kind}"
    as_xlsx(path, {"S": rows}) if kind == ".xlsx" else as_ods(path, {"S": rows}, tail=many)
    assert path.stat().st_size < 20_000
    with within(2), pytest.raises(DataError, match="unpacks to more than that; at most 1 MB"):
        check_upload(path, path.name, KINDS)


def test_a_small_file_that_unpacks_to_a_large_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_dpo.demo.pair_store.MAX_UPLOAD", 1 << 20)
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(gzip.compress(b" " * (3 << 20)))
    assert path.stat().st_size < 10_000
    with pytest.raises(DataError, match="unpacks to more than that; at most 1 MB"):
        check_upload(path, "pairs.jsonl.gz", KINDS)
    path.write_bytes(gzip.compress(b" " * 100))
    check_upload(path, "pairs.jsonl.gz", KINDS)


def test_the_doctor_looks_again_only_at_what_has_changed(collection, taken, monkeypatch):
    from lora_dpo.demo import pair_store as module

    looked, examine = [], module.examine
    monkeypatch.setattr(module, "examine", lambda *args, **more: looked.append(args) or examine(*args, **more))
    first = collection.diagnose(taken.name)
    assert collection.diagnose(taken.name) is first
    assert len(looked) == 1
    collection.delete(taken.name, collection.entries(taken.name)[:1])
    assert collection.diagnose(taken.name).prompts == first.prompts - 1
    assert len(looked) == 2


def test_what_no_run_uses_is_removed_after_a_while(collection):
    collection.runs.mkdir(parents=True)
    for name in ("used.train.jsonl", "old.train.jsonl", "new.train.jsonl"):
        (collection.runs / name).write_text("{}")
        if not name.startswith("new"):
            os.utime(collection.runs / name, (1e9, 1e9))
    collection.clean_runs("data: {train: collected/runs/used.train.jsonl}")
    assert {path.name for path in collection.runs.iterdir()} == {"used.train.jsonl", "new.train.jsonl"}


def test_votes_are_counted_again_only_after_a_vote(collection, monkeypatch):
    book, read = collection.book, []
    rows = book.rows
    monkeypatch.setattr(book, "rows", lambda: read.append(1) or rows())
    assert book.records() == book.records() == []
    for number in range(2):
        a, b = ShownAnswer("A.", "one", {}), ShownAnswer("B.", "two", {})
        book.add([{"role": "user", "content": "Say."}], a, b, "a", vote_id=str(number))
        assert book.records()[0].wins == book.records()[0].wins == number + 1
    assert len(read) == 3
