"""Tables as people have them: whatever saved them, they become the right pairs, or a sentence that mends it."""

from __future__ import annotations

import datetime
import zipfile
from pathlib import Path

import pytest
from bounded import ends_well
from spreadsheets import Error, as_ods, as_xlsx

from lora_dpo.data import read_pairs, read_prompts
from lora_dpo.data.answers import read_answers
from lora_dpo.data.doctor.examination import examine
from lora_dpo.data.rows import files_of, read_rows, refuse_twice
from lora_dpo.data.unpacked import unpacked_size
from lora_dpo.errors import ConfigError, DataError, UnclearColumns

PERU = ("What is the capital of Peru?", "Lima.", "Peru has many cities.")
OAK = ("Name a tree.", "An oak.", "Trees are tall.")


def texts(source, **more):
    """Prompt, chosen and rejected of each pair; a system turn before them where there is one."""
    pairs, report = read_pairs(str(source), **more)
    return [
        (*(said["content"] for said in pair.prompt), pair.chosen[-1]["content"], pair.rejected[-1]["content"])
        for pair in pairs
    ], report


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def notes(report):
    return "; ".join(report.noted())


# --- as programs save them ------------------------------------------------------------------------


def test_a_german_csv_of_excel_has_semicolons_and_decimal_commas(tmp_path):
    text = (
        "Frage;Gute Antwort;Schlechte Antwort;Bewertung gut;Bewertung schlecht\r\n"
        "Wie heißt die Hauptstadt von Österreich?;Wien.;Das weiß ich nicht.;4,5;1,25\r\n"
        'Was ist ein Schläfer?;"Jemand, der schläft; ganz einfach.";Öhm.;4,125;3\r\n'
    )
    found, report = texts(write(tmp_path / "paare.csv", text))
    assert found == [
        ("Wie heißt die Hauptstadt von Österreich?", "Wien.", "Das weiß ich nicht."),
        ("Was ist ein Schläfer?", "Jemand, der schläft; ganz einfach.", "Öhm."),
    ]
    pairs, _ = read_pairs(str(tmp_path / "paare.csv"))
    assert [(pair.chosen_score, pair.rejected_score) for pair in pairs] == [(4.5, 1.25), (4.125, 3.0)]
    assert notes(report) == (
        "semicolons between its cells; decimal commas; read 'Frage' as prompt, 'Gute Antwort' as chosen, 'Schlechte "
        "Antwort' as rejected, 'Bewertung gut' as chosen_score, 'Bewertung schlecht' as rejected_score"
    )


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "utf-16-be"])
def test_the_unicode_text_of_excel_is_utf_16_with_tabs(tmp_path, codec):
    rows = [("Question", "Good answer", "Bad answer"), ("Où est né Molière ?", 'À Paris, dit-on "toujours".', "Non…")]
    text = "\r\n".join("\t".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows) + "\r\n"
    found, report = texts(write(tmp_path / "export.tsv", text, codec))
    assert found == [rows[1]]
    assert f"its text is {codec.upper()}" in notes(report)
    assert "tabs between its cells" in notes(report)


def test_a_windows_code_page_is_guessed_and_said(tmp_path):
    text = (
        "Frage,Gut,Schlecht\r\n"
        "Was heißt „schüchtern“?,“Ängstlich” – so sagt man’s.,Öl und Ähren…\r\n"
        "Größe?,Übergröße,Klein\r\n"
    )
    found, report = texts(write(tmp_path / "paare.csv", text, "cp1252"))
    assert found == [
        ("Was heißt „schüchtern“?", "“Ängstlich” – so sagt man’s.", "Öl und Ähren…"),
        ("Größe?", "Übergröße", "Klein"),
    ]
    assert (
        "its text is not UTF-8 but, by a guess, Windows-1252 (Western European): its letters make words such as "
        in (notes(report))
    )
    assert "heißt, schüchtern, Ängstlich" in notes(report)


LANGUAGES = {
    "cp1250": ("Proč je nebe modré?", "Protože vzduch rozptyluje světlo, hlavně modré.", "Nevím, řekni ty."),
    "cp1251": ("Какая столица России?", "Столица — Москва, крупнейший город.", "Не знаю, может быть, Казань."),
    "cp1252": (
        "Où est né Molière ?",
        "Il est né à Paris, évidemment : c’est là.",
        "Je ne sais pas, peut-être à Nîmes.",
    ),
    "cp1253": ("Ποια είναι η πρωτεύουσα;", "Είναι η Αθήνα, στην Αττική.", "Δεν ξέρω τίποτα."),
    "cp1254": ("Başkent neresidir?", "Ankara, İç Anadolu'dadır.", "Bilmiyorum, belki de İstanbul'dur."),
    "cp1257": ("Kokia Lietuvos sostinė?", "Tai Vilnius, didžiausias miestas.", "Nežinau, gal Šiauliai ąžuolų."),
    "cp932": ("日本の首都はどこですか。", "東京です。", "わかりません。"),
    "gb18030": ("中国的首都是哪里？", "北京是中国的首都。", "我不知道你说的是什么。"),
    "cp949": ("한국의 수도는 어디입니까?", "서울입니다.", "모르겠습니다."),
    "mac_roman": ("Wie heißt die Hauptstadt?", "Sie heißt Wien, in Österreich.", "Für schöne Städte."),
    "cp850": ("Wie heißt die Hauptstadt?", "Sie heißt Wien, in Österreich.", "Für schöne Städte."),
}


@pytest.mark.parametrize("page", LANGUAGES)
def test_code_pages_of_other_languages_are_told_apart(tmp_path, page):
    row = LANGUAGES[page]
    path = write(tmp_path / "a.csv", "prompt\tchosen\trejected\r\n" + "\t".join(row) + "\r\n", page)
    assert texts(path)[0] == [row]


@pytest.mark.parametrize(
    ("page", "word", "says"),
    [
        ("cp1250", "Győr", "it could be Windows-1252 (Western European) ('Gyõr') or Windows-1250 (Central European)"),
        ("mac_roman", "für", "it could be Windows-1250 (Central European) ('fźr') or Mac Roman ('für'). Save it as"),
        ("koi8_r", "Столица", "no code page that is known here makes words of it. Save it as UTF-8 (in Excel: 'CSV"),
        ("cp852", "żółw", "a.csv is not UTF-8, and it could be"),
    ],
)
def test_letters_that_could_be_others_are_not_guessed(tmp_path, page, word, says):
    path = write(tmp_path / "a.csv", f"prompt,chosen,rejected\r\nHi,{word},No\r\n", page)
    with pytest.raises(DataError) as caught:
        read_pairs(str(path))
    assert says in str(caught.value)


def test_one_letter_alone_is_not_told_without_its_language(tmp_path):
    path = write(tmp_path / "a.csv", "prompt,chosen,rejected\r\nQ à?,A,B\r\n", "cp1252")
    with pytest.raises(DataError, match=r"it could be Windows-1252 \(Western European\) \('à'\) or"):
        read_pairs(str(path))


def test_an_english_text_with_curly_quotes_needs_no_letters_to_be_told(tmp_path):
    row = ("What’s a “quote”?", "It’s a mark – that’s all.", "I don’t know…")
    path = write(tmp_path / "a.csv", "Question,Good,Bad\r\n" + ",".join(row) + "\r\n", "cp1252")
    assert texts(path)[0] == [row]


@pytest.mark.parametrize(
    "row",
    [
        ("Où va-t-il ?", "Il est à Paris avec les autres et il ne va pas dans le sud.", "Il ne sait pas."),
        ("What is 12÷3 and 3×4 in the end?", "It is 4 for the first and 12 for the other of the two.", "No."),
        ("Is it the 1st of the two?", "It is the 1º of the two, and not the 2ª, for you and for me.", "No."),
    ],
)
def test_a_letter_that_stands_alone_is_none_of_another_script(tmp_path, row):
    path = write(tmp_path / "a.csv", "prompt\tchosen\trejected\r\n" + "\t".join(row) + "\r\n", "cp1252")
    found, report = texts(path)
    assert found == [row]
    assert "Windows-1252 (Western European)" in notes(report)


def test_an_apostrophe_alone_is_no_letter_of_a_mac(tmp_path):
    path = write(tmp_path / "a.csv", "Question,Good,Bad\r\nWhat’s up?,Yes,No\r\n", "cp1252")
    found, report = texts(path)
    assert found == [("What’s up?", "Yes", "No")]  # in Mac Roman Whatís, in which no language is told
    assert "Windows-1252 (Western European)" in notes(report)


def test_a_foreign_word_in_a_known_language_is_of_its_page(tmp_path):
    row = ("What is a naïve person?", "It is one that is easy to fool and that does not see it.", "I know not.")
    path = write(tmp_path / "a.csv", "Question,Good,Bad\r\n" + ",".join(row) + "\r\n", "cp1252")
    assert texts(path)[0] == [row]


def test_one_damaged_byte_does_not_make_a_code_page_of_utf_8(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("prompt,chosen,rejected\nÖl?,Größe,naïve\n".encode() + b"x,\xff,z\n")
    with pytest.raises(DataError, match=r"a\.csv is not UTF-8 text \(byte 45\)"):
        read_pairs(str(path))


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_any_separator_is_seen_and_a_mark_is_no_part_of_the_text(tmp_path, separator, mark):
    rows = [("prompt", "chosen", "rejected"), PERU, ("Which is longer; a, or b?", "a | b", "a,b")]
    text = "\r\n".join(separator.join(f'"{cell}"' for cell in row) for row in rows)
    assert texts(write(tmp_path / "a.csv", mark + text))[0] == rows[1:]


def test_the_separator_may_be_said_in_the_first_line(tmp_path):
    path = write(tmp_path / "a.csv", "sep=;\r\nprompt, in words;chosen;rejected\r\nHi, you;a, b;c, d\r\n")
    named = {"prompt": "prompt, in words"}
    assert texts(path, columns=named)[0] == [("Hi, you", "a, b", "c, d")]
    assert [number for number, _ in read_rows(str(path))] == [2]  # Excel shows that line nowhere


def test_line_breaks_within_quotes_and_blank_lines_keep_the_numbers_of_a_spreadsheet(tmp_path):
    text = '\r\nprompt;chosen;rejected\r\n"Two\r\nlines?";"Yes:\n\n- one";No\r\n;;\r\n\r\nHi;;No\r\nHo;Hey;No\r\n'
    found, report = texts(write(tmp_path / "a.csv", text))
    assert found == [("Two\r\nlines?", "Yes:\n\n- one", "No"), ("Ho", "Hey", "No")]
    pairs, _ = read_pairs(str(tmp_path / "a.csv"))
    assert [pair.origin.row for pair in pairs] == [3, 7]
    assert [(bad.origin.row, bad.reason) for bad in report.dropped] == [(6, "empty chosen answer")]


def test_quotes_of_a_tsv_that_close_nothing_are_its_text(tmp_path):
    rows = [
        ("prompt", "chosen", "rejected"),
        ("Say hi.", '"Hi", he said.', 'He said "hi".'),
        ("Go on.", '"Hi there', "So."),
        ("And then?", 'They left"', "No."),
    ]
    found, report = texts(write(tmp_path / "a.tsv", "\n".join("\t".join(row) for row in rows) + "\n"))
    assert found == rows[1:]
    assert "quotes are part of its texts" in notes(report)


def test_a_separator_that_stands_in_the_texts_alone_divides_nothing(tmp_path):
    text = "prompt,chosen,rejected\na;b;c?,x;y;z,u;v;w\n" + '"d|e",f|g,h|i\n'
    assert texts(write(tmp_path / "a.csv", text))[0] == [("a;b;c?", "x;y;z", "u;v;w"), ("d|e", "f|g", "h|i")]


def test_duplicate_names_of_columns_are_refused(tmp_path):
    path = write(tmp_path / "a.csv", "Frage;Antwort;Antwort\nWas?;Das.;Dies.\n")
    with pytest.raises(DataError, match=r"a\.csv has two columns named 'Antwort'\. Rename or remove one of them\."):
        read_pairs(str(path))


# --- .xlsx and .ods -------------------------------------------------------------------------------

WRITERS = {".xlsx": as_xlsx, ".ods": as_ods}


@pytest.mark.parametrize("kind", WRITERS)
def test_the_first_sheet_is_read_and_another_by_its_name(tmp_path, kind):
    sheets = {
        "Pairs": [("Question", "Better", "Worse"), PERU],
        "More 2": [("prompt", "chosen", "rejected"), OAK],
    }
    source = WRITERS[kind](tmp_path / f"pairs{kind}", sheets)
    found, report = texts(source)
    assert found == [PERU]
    assert notes(report).startswith("its sheet 'Pairs', and not 'More 2'; read 'Question' as prompt")
    found, report = texts(f"{source}:More 2")
    assert found == [OAK]
    assert notes(report) == "its sheet 'More 2', and not 'Pairs'"
    assert len(read_pairs([f"{source}:Pairs", f"{source}:More 2"])[0]) == 2
    with pytest.raises(DataError) as caught:
        read_pairs(f"{source}:pairs")
    assert str(caught.value) == (
        f"{source} has no sheet 'pairs'. Did you mean Pairs? Its sheets are 'Pairs', 'More 2'."
    )


@pytest.mark.parametrize("kind", WRITERS)
def test_cells_are_read_as_a_person_sees_them(tmp_path, kind):
    day = datetime.date(2024, 5, 1)
    rows = [
        ("Frage", "gut", "schlecht", "Score gut", "Score schlecht"),
        ("2 + 3?", 5, 6.0, 4.5, 1),
        ("A third?", 0.1 + 0.2, 1e-7, None, None),
        ("Is it so?", True, False, None, None),
        ("When?", day, "Later", 1, 0),
        ("Lines?", "one\ntwo  spaces\tand a tab", "one", None, None),
    ]
    source = WRITERS[kind](tmp_path / f"a{kind}", {"S": rows})
    pairs, _ = read_pairs(source)
    assert texts(source)[0] == [
        ("2 + 3?", "5", "6"),
        ("A third?", "0.3", "1e-07"),
        ("Is it so?", "TRUE", "FALSE"),
        ("When?", "2024-05-01", "Later"),
        ("Lines?", "one\ntwo  spaces\tand a tab", "one"),
    ]
    assert [pair.gap for pair in pairs] == [3.5, None, None, 1.0, None]
    assert [pair.origin.row for pair in pairs] == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_failed_formula_is_no_answer(tmp_path, kind):
    rows = [
        ("Question", "good", "bad", "comment"),
        ("a?", Error("#REF!"), "no", ""),
        ("b?", "yes", Error("#NAME?"), ""),
        ("c?", "yes", "no", Error("#N/A")),
        ("d?", "#1", "#!", ""),
    ]
    found, report = texts(WRITERS[kind](tmp_path / f"a{kind}", {"S": rows}))
    assert found == [("c?", "yes", "no"), ("d?", "#1", "#!")]
    assert [(bad.origin.row, bad.reason) for bad in report.dropped] == [
        (2, "chosen is an error of the spreadsheet (#REF!)"),
        (3, "rejected is an error of the spreadsheet (#NAME?)"),
    ]
    assert (
        report.summary() == "2 pairs read, 2 dropped (1 chosen is an error of the spreadsheet, 1 rejected is an "
        "error of the spreadsheet)"
    )


@pytest.mark.parametrize(
    "cell", ["#BEZUG!", "#WERT!", "#DIV/0!", "#NV", "#¿NOMBRE?", "#¡VALOR!", "#VALEUR!", "Err:502"]
)
def test_errors_of_other_languages_are_known_in_a_csv(tmp_path, cell):
    path = write(tmp_path / "a.csv", f"prompt;chosen;rejected\nHi;{cell};b\nHi;a;b\n")
    found, report = texts(path)
    assert found == [("Hi", "a", "b")]
    assert report.dropped[0].reason == f"chosen is an error of the spreadsheet ({cell})"


@pytest.mark.parametrize("kind", WRITERS)
def test_blank_rows_and_columns_are_none(tmp_path, kind):
    rows = [(), (), (None, "Question", "good", "bad", None, "note"), (), (None, *PERU), (), (None, *OAK, None, "ok")]
    source = WRITERS[kind](tmp_path / f"a{kind}", {"S": rows})
    found, report = texts(source)
    assert found == [PERU, OAK]
    assert [number for number, _ in read_rows(source)] == [5, 7]
    assert "not read: 'column A', 'column E', 'note'" in notes(report)


@pytest.mark.parametrize("kind", WRITERS)
def test_an_empty_sheet_names_the_others(tmp_path, kind):
    source = WRITERS[kind](tmp_path / f"a{kind}", {"Cover": [], "Pairs": [("prompt",), ("Hi",)]})
    with pytest.raises(DataError) as caught:
        read_pairs(source)
    assert str(caught.value) == (
        f"{source}: its sheet 'Cover' is empty. Name one of 'Pairs' behind a colon: {source}:SHEET."
    )


def test_a_hidden_sheet_is_not_the_first(tmp_path):
    sheets = {"old": [("prompt", "chosen", "rejected"), OAK], "new": [("prompt", "chosen", "rejected"), PERU]}
    assert texts(as_ods(tmp_path / "a.ods", sheets, hidden=["old"]))[0] == [PERU]
    import openpyxl

    book = openpyxl.load_workbook(as_xlsx(tmp_path / "a.xlsx", sheets))
    book["old"].sheet_state = "hidden"
    book.active = 1
    book.save(tmp_path / "a.xlsx")
    assert texts(tmp_path / "a.xlsx")[0] == [PERU]
    assert texts(f"{tmp_path / 'a.xlsx'}:old")[0] == [OAK]


def test_carriage_returns_that_excel_escapes_are_line_breaks(tmp_path):
    rows = [("prompt", "chosen", "rejected"), ("Hi", "one_x000D_\ntwo", "a_b_x0041_")]
    assert texts(as_xlsx(tmp_path / "a.xlsx", {"S": rows}))[0] == [("Hi", "one\ntwo", "a_bA")]


def test_what_a_workbook_says_of_its_own_size_is_not_believed(tmp_path):
    path = tmp_path / "a.xlsx"
    as_xlsx(path, {"S": [("prompt", "chosen", "rejected"), PERU, OAK]})
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    sheet = next(name for name in parts if name.endswith("sheet1.xml"))
    assert b'ref="A1:C3"' in parts[sheet]
    parts[sheet] = parts[sheet].replace(b'ref="A1:C3"', b'ref="A1:A1"')
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    assert texts(path)[0] == [PERU, OAK]


def test_an_annotation_is_no_part_of_a_cell(tmp_path):
    tail = (
        "<table:table-row><table:table-cell office:value-type='string'><office:annotation><text:p>by me</text:p>"
        "</office:annotation><text:p>Hi</text:p></table:table-cell><table:table-cell office:value-type='string'>"
        "<text:p>a<text:span>b</text:span>c<office:annotation><text:p>no</text:p></office:annotation><text:line-break/>d"
        "</text:p></table:table-cell>"
        "<table:table-cell office:value-type='string'><text:p>no</text:p></table:table-cell></table:table-row>"
    )
    source = as_ods(tmp_path / "a.ods", {"S": [("prompt", "chosen", "rejected")]}, tail=tail)
    assert texts(source)[0] == [("Hi", "abc\nd", "no")]


def test_a_missing_library_is_one_sentence_with_the_command(tmp_path, monkeypatch):
    source = as_xlsx(tmp_path / "a.xlsx", {"S": [("prompt", "chosen", "rejected"), PERU]})
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    with pytest.raises(DataError, match=r"pip install 'lora-dpo\[data\]', or save the sheet as \.csv"):
        read_pairs(source)
    assert texts(as_ods(tmp_path / "a.ods", {"S": [("prompt", "chosen", "rejected"), PERU]}))[0] == [PERU]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.xlsx", b"\xd0\xcf\x11\xe0" + bytes(600), "a.xlsx is locked by a password, or is an old Excel file (.xls)"),
        ("a.xlsx", b"prompt,chosen,rejected\n", "a.xlsx: broken spreadsheet (File is not a zip file). Save it once"),
        ("a.ods", b"PK\x05\x06" + bytes(18), "a.ods: broken spreadsheet ("),
        ("a.xlsx", b"PK\x05\x06" + bytes(18), "a.xlsx: broken spreadsheet ("),
        ("a.xlsx", b"", "a.xlsx is empty."),
    ],
)
def test_a_file_that_is_no_spreadsheet_says_so(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_pairs(str(tmp_path / name))
    assert says in str(caught.value)


def test_a_locked_ods_says_so(tmp_path):
    source = as_ods(tmp_path / "a.ods", {"S": [PERU]}, more="<manifest:encryption-data/>")
    with pytest.raises(DataError, match="locked by a password"):
        read_pairs(source)


def test_a_folder_holds_spreadsheets_too_but_not_what_excel_puts_beside_an_open_one(tmp_path):
    as_xlsx(tmp_path / "a.xlsx", {"S": [("prompt", "chosen", "rejected"), PERU]})
    as_ods(tmp_path / "b.ods", {"S": [("Frage", "gut", "schlecht"), OAK]})
    write(tmp_path / "c.tsv", "prompt\tchosen\trejected\na\tb\tc\n")
    (tmp_path / "~$a.xlsx").write_bytes(b"owner")
    assert [Path(file).name for file in files_of(str(tmp_path))] == ["a.xlsx", "b.ods", "c.tsv"]
    found, report = texts(tmp_path)
    assert found == [PERU, OAK, ("a", "b", "c")]
    assert report.noted() == [
        f"{tmp_path / 'b.ods'}: read 'Frage' as prompt, 'gut' as chosen, 'schlecht' as rejected",
        f"{tmp_path / 'c.tsv'}: tabs between its cells",
    ]


def test_a_sheet_named_twice_is_a_file_named_twice(tmp_path):
    source = as_xlsx(tmp_path / "a.xlsx", {"S": [PERU], "T": [OAK]})
    refuse_twice([f"{source}:S", f"{source}:T"])
    with pytest.raises(ConfigError, match="named twice"):
        refuse_twice([f"{source}:S", f"{source}:S"])


# --- small files that hold much -------------------------------------------------------------------

LIMIT = 1 << 20


def far_away(path):
    """One cell in the last corner of a sheet, which is not filled up to there."""
    as_xlsx(path, {"S": [("prompt", "chosen", "rejected"), PERU]})
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    sheet = next(name for name in parts if name.endswith("sheet1.xml"))
    row = b'<row r="9999999999"><c r="XFD9999999999" t="inlineStr"><is><t>x</t></is></c></row>'
    parts[sheet] = parts[sheet].replace(b"</sheetData>", row + b"</sheetData>")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def repeated(path):
    """One text in every cell of a sheet."""
    cell = f'<table:table-cell table:number-columns-repeated="16384"><text:p>{"x" * 999}</text:p></table:table-cell>'
    tail = f'<table:table-row table:number-rows-repeated="1048576">{cell}</table:table-row>'
    as_ods(path, {"S": [("prompt", "chosen", "rejected")]}, tail=tail)


def shared(path):
    """A long text that a workbook stores once, in every row."""
    as_xlsx(path, {"S": [("prompt", "chosen", "rejected"), *[("x" * 20_000, "a", "b")] * 200]})


def test_a_cell_far_away_costs_nothing_and_says_nothing(tmp_path):
    far_away(tmp_path / "a.xlsx")
    with ends_well(2.0) as said:
        assert texts(tmp_path / "a.xlsx")[0] == [PERU]
    assert not said


@pytest.mark.parametrize("make", [repeated, shared])
def test_what_a_small_spreadsheet_holds_is_counted_where_it_stands(tmp_path, make):
    path = tmp_path / f"a{'.ods' if make is repeated else '.xlsx'}"
    make(path)
    assert path.stat().st_size < 20_000
    with ends_well(2.0):
        assert unpacked_size(path, LIMIT) > LIMIT


def test_what_is_counted_of_a_spreadsheet_is_about_its_texts(tmp_path):
    rows = [("prompt", "chosen", "rejected"), *[(f"{number} ä?" * 9, "yes" * 9, "no" * 9) for number in range(300)]]
    sizes = {sum(len(cell.encode()) for cell in row) for row in rows}
    for kind, writer in WRITERS.items():
        writer(tmp_path / f"a{kind}", {"S": rows})
        counted = unpacked_size(tmp_path / f"a{kind}", LIMIT)
        assert len(rows) * (64 + min(sizes)) < counted < len(rows) * (64 + max(sizes))
    (tmp_path / "b.xlsx").write_bytes((tmp_path / "a.xlsx").read_bytes()[:-50])
    assert unpacked_size(tmp_path / "b.xlsx", LIMIT) == 0  # the reader says what is wrong


# --- everything that reads, reads these -----------------------------------------------------------


def test_prompts_single_answers_and_the_doctor_read_them_too(tmp_path):
    source = as_xlsx(tmp_path / "a.xlsx", {"S": [("Frage", "Besser", "Schlechter"), PERU, OAK, ("", "a", "b")]})
    assert [prompt.text for prompt in read_prompts(source)] == [PERU[0], OAK[0]]
    answers, report = read_answers(source, good_only=True)
    assert [one.answer[0]["content"] for one in answers] == [PERU[1], OAK[1]]
    assert report.noted() == ["read 'Frage' as prompt, 'Besser' as chosen, 'Schlechter' as rejected"]
    found = examine([source])
    assert (found.report.rows, found.pairs, set(found.findings)) == (3, 2, {"empty"})
    assert found.as_json()["notes"] == {source: report.noted()}
    assert found.findings["empty"].rows[0].row == 4


def test_a_table_of_answers_alone_is_for_sft(tmp_path):
    path = write(tmp_path / "a.csv", "Frage;Antwort\nWie?;So.\n")
    answers, report = read_answers(str(path), good_only=True)
    assert [(one.prompt[0]["content"], one.answer[0]["content"]) for one in answers] == [("Wie?", "So.")]
    assert "read 'Frage' as prompt, 'Antwort' as completion" in notes(report)
    with pytest.raises(UnclearColumns, match="A pair needs a prompt and two answers, each in its column"):
        read_pairs(str(path))


def test_votes_of_a_table_are_named(tmp_path):
    path = write(tmp_path / "a.csv", "Q,A,thumb\nWhy?,So.,TRUE\nWhy?,Don't know.,FALSE\n")
    found, report = texts(path, columns={"prompt": "Q", "completion": "A", "label": "thumb"})
    assert found == [("Why?", "So.", "Don't know.")]
    assert notes(report) == "read 'Q' as prompt, 'A' as completion, 'thumb' as label"
