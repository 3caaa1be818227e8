"""What a column is: named, known, or told by its words, and never two things, nor one thing where it could be two."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_dpo.config.column_names import COLUMN_NAMES, as_option, checked_columns, parse_columns
from lora_dpo.config.reading import check_recipe
from lora_dpo.data import column_words, read_pairs, read_prompts
from lora_dpo.data.column_words import PERHAPS, role_of
from lora_dpo.data.columns import Columns
from lora_dpo.data.messages import BadRow
from lora_dpo.data.table import letters_of, without_comma
from lora_dpo.errors import ConfigError, DataError, UnclearColumns

FUZZ = settings(max_examples=150, deadline=3000, suppress_health_check=[HealthCheck.function_scoped_fixture])
ROW = ("What is the capital of Peru?", "It is Lima.", "It has cities.")


def table(path, header, *rows, separator=";"):
    lines = [separator.join('"' + str(cell).replace('"', '""') + '"' for cell in row) for row in (header, *rows)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def read(source, **more):
    pairs, report = read_pairs(source, **more)
    texts = [(one.prompt[-1]["content"], one.chosen[0]["content"], one.rejected[0]["content"]) for one in pairs]
    return texts, "; ".join(report.noted())


# --- by their words -------------------------------------------------------------------------------

HEADERS = [
    ("Question", "Good answer", "Bad answer"),
    ("question", "good", "bad"),
    ("Query", "Answer (better)", "Answer (worse)"),
    ("QUERY", "preferred_response", "dispreferred_response"),
    ("Instruction", "winning answer", "losing answer"),
    ("input", "win", "lose"),
    ("UserPrompt", "BestAnswer", "WorstAnswer"),
    ("prompt", "positive", "negative"),
    ("Frage", "Gute Antwort", "Schlechte Antwort"),
    ("Frage", "besser", "schlechter"),
    ("Anfrage", "Antwort (bevorzugt)", "Antwort (abgelehnt)"),
    ("Frage", "gewählte Antwort", "verworfene Antwort"),
    ("Question", "Bonne réponse", "Mauvaise réponse"),
    ("Requête", "MEILLEURE", "PIRE"),
    ("Question", "Réponse préférée", "Réponse rejetée"),
    ("Pregunta", "bien", "mal"),
    ("Pregunta", "Mejor respuesta", "Peor respuesta"),
    ("Domanda", "Migliore", "Peggiore"),
    ("Pergunta", "Melhor resposta", "Pior resposta"),
    ("Vraag", "Goed antwoord", "Slecht antwoord"),
    ("prompt_text", "chosen_text", "rejected_text"),
    ("Prompt", "Chosen", "Rejected"),
    ("Prompt", "Accepted", "Rejected"),
]


@pytest.mark.parametrize("header", HEADERS, ids=map("/".join, HEADERS))
def test_a_header_in_everyday_words_is_read_and_said(tmp_path, header):
    found, said = read(table(tmp_path / "a.csv", header, ROW))
    assert found == [ROW]
    for name, role in zip(header, ("prompt", "chosen", "rejected"), strict=True):
        assert f"'{name}' as {role}" in said or name == role


def test_accents_and_case_say_nothing_and_a_word_within_another_is_none():
    assert role_of("RÉPONSE PRÉFÉRÉE")[0] == role_of("reponse preferee")[0] == "chosen"
    for name in ("goodness", "badge", "winter", "questionable", "losers' table", "malus", "Bestand", "input_ids"):
        assert role_of(name)[0] is None, name


@pytest.mark.parametrize(
    "name",
    [
        *(
            "not preferred",
            "nicht bevorzugt",
            "less good",
            "weniger gut",
            "moins bon",
            "least preferred",
            "non-preferred",
        ),
        *("good or bad?", "Better/worse", "good prompt", "best question"),  # of two things
        *(
            "chosen_id",
            "prompt_id",
            "rejected_model",
            "better by",
            "why chosen",
            "Begründung gut",
            "win rate",
            "best rank",
        ),
        *("2.5", "17", "", "column C", "How good is this answer?", "The best answer is this one.", "good " * 20),
    ],
)
def test_what_turns_a_word_round_or_speaks_about_it_is_read_for_nothing(name):
    role, how = role_of(name)
    assert role is None or how == PERHAPS


AMBIGUOUS = [
    (("Question", "Good", "Better", "Bad"), "'Good' and 'Better' could both be chosen."),
    (("Question", "Best", "Bad", "Worst"), "'Bad' and 'Worst' could both be rejected."),
    (("Question", "Query", "Good", "Bad"), "'Question' and 'Query' could both be prompt."),
    (("Frage", "Gute Antwort", "Bessere Antwort", "Beste"), "'Gute Antwort' and 'Bessere Antwort' and 'Beste' could"),
    # a word that is not known may mean anything
    (
        ("Question", "Good answer", "Best rewrite", "Bad answer"),
        "'Good answer' and 'Best rewrite' could both be chosen.",
    ),
    (("Question", "Good answer", "Less good answer", "Bad"), "'Less good answer' and 'Bad' could both be rejected."),
    (("Prompt short", "Question", "Good", "Bad"), "'Prompt short' and 'Question' could both be prompt."),
]


@pytest.mark.parametrize(("header", "says"), AMBIGUOUS)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_two_readings_are_none_and_the_line_that_mends_it_is_shown(tmp_path, header, says, kind):
    row = dict(zip(header, ("a long text", "b long text", "c long text", "d long text"), strict=True))
    path = tmp_path / f"a.{kind}"
    if kind == "csv":
        table(path, header, row.values())
    else:
        path.write_text(json.dumps(row))
    with pytest.raises(DataError) as caught:
        read(str(path))
    assert says in str(caught.value)
    assert "Name them: --columns " in str(caught.value)
    assert "(in a recipe data.columns: {prompt: " in str(caught.value)


def test_the_line_that_is_shown_is_one_that_can_be_given(tmp_path):
    source = table(
        tmp_path / "a.csv", ("Question", "Good answer", "Better, really", "Bad"), (*ROW[:2], "x y z", ROW[2])
    )
    with pytest.raises(UnclearColumns) as caught:
        read(source)
    assert caught.value.columns == ("Question", "Good answer", "Better, really", "Bad")
    assert caught.value.guess == {"prompt": "Question", "rejected": "Bad"}
    option = str(caught.value).partition('--columns "')[2].partition('"')[0]
    assert read(source, columns=parse_columns(option))[0] == [ROW]
    recipe = str(caught.value).partition("data.columns: ")[2].partition(")")[0]
    assert recipe == "{prompt: Question, chosen: Good answer, rejected: Bad}"


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (
            ("Question", "Answer A", "Answer B"),
            "no column says that it is chosen or rejected. Its columns are 'Question'",
        ),
        (("Question", "Better answer", "Answer"), "no column says that it is rejected."),
        (("Topic", "Good", "Bad"), "no column says that it is prompt."),
        (("prompt", "chosen", "Answer"), "no column says that it is rejected."),
        (
            ("Question", "Answer"),
            "it is chosen or rejected. Its columns are 'Question', 'Answer'. A pair needs a prompt",
        ),
    ],
)
def test_what_is_not_there_is_named_with_what_is(tmp_path, header, says):
    with pytest.raises(UnclearColumns) as caught:
        read(table(tmp_path / "a.csv", header, ROW[: len(header)]))
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'a.csv'}: ")


@pytest.mark.parametrize(
    "first",
    [
        ("What is the capital of Chile?", "It is Santiago.", "It has cities."),
        ("Santiago", "12", "7"),
        ("Pairs of 2024", "", ""),
        ("Name a good tree.", "A good tree is an oak.", "Bad trees are bad."),
        ("x" * 70, "y" * 70, "z"),
    ],
)
def test_a_header_that_is_missing_is_seen(tmp_path, first):
    with pytest.raises(UnclearColumns) as caught:
        read(table(tmp_path / "a.csv", first, ROW, ROW))
    assert "its first row seems to be data or a title, not names of columns: '" in str(caught.value)
    assert "Put a row above it that names them, such as prompt, chosen, rejected." in str(caught.value)


def test_a_long_header_beside_clear_ones_is_no_missing_header(tmp_path):
    header = (
        "Question",
        "Good",
        "Bad",
        "How sure are you about that?",
        "Any comments on this pair?",
        "Who are you then?",
    )
    assert read(table(tmp_path / "a.csv", header, (*ROW, "very", "no", "me")))[0] == [ROW]


@pytest.mark.parametrize(
    "header",
    [
        ("Question", "Answer", "Good", "Bad"),
        ("Question", "Model output", "Good", "Bad"),
        ("Frage", "Antwort", "gut", "schlecht"),
    ],
)
def test_good_and_bad_beside_an_answer_may_be_what_is_said_of_it(tmp_path, header):
    with pytest.raises(UnclearColumns, match=r"may say something about the answer in '.*' and be none\. Name them: "):
        read(table(tmp_path / "a.csv", header, (ROW[0], "Some text.", *ROW[1:])))


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (("Question", "Positive feedback", "Negative feedback", "Text"), "it is chosen or rejected"),
        (("Question", "good because", "bad because", "Text"), "it is chosen or rejected"),
        (("Question", "Best feature", "Worst feature", "Text"), "it is chosen or rejected"),
        (("Question about it", "good", "bad", "Text"), "it is prompt"),
    ],
)
def test_what_is_said_with_words_that_are_not_known_is_not_sure_enough(tmp_path, header, says):
    with pytest.raises(UnclearColumns, match=says):
        read(table(tmp_path / "a.csv", header, (*ROW, "More text.")))


def test_another_answer_beside_two_that_say_they_are_answers_is_left(tmp_path):
    source = table(tmp_path / "a.csv", ("Question", "Answer", "Good answer", "Bad answer"), (ROW[0], "x y", *ROW[1:]))
    found, said = read(source)
    assert found == [ROW]
    assert "not read: 'Answer'" in said


MARKS = [
    (("Question", "Text one", "Text two", "Winner", "Loser"), ("Text one", "Text two"), ("Text two", "Text one")),
    (("Question", "Text one", "Text two", "Winner", "Loser"), ("A", "B"), ("B", "A")),
    (("Question", "Text one", "Text two", "good", "bad"), ("12", "3"), ("4,5", "100%")),
    (("Question", "Text one", "Text two", "good", "bad"), ("yes", "no"), ("true", "false")),
]


@pytest.mark.parametrize(("header", "first", "second"), MARKS)
def test_votes_and_counts_are_never_taken_for_answers(tmp_path, header, first, second):
    source = table(tmp_path / "a.csv", header, (*ROW, *first), (*ROW, *second))
    with pytest.raises(UnclearColumns, match=r"there are numbers or marks in it, and text in 'Text one"):
        read(source)


@pytest.mark.parametrize("names", [("Answer A", "Answer B"), ("A", "B"), ("the answer B", "answer A.")])
def test_a_winner_beside_two_lettered_answers_says_which_is_better(tmp_path, names):
    header = ("Question", "Answer A", "Answer B", "Winner", "Loser")
    better, worse = names if names[0].endswith("A") or names == ("A", "B") else names[::-1]
    source = table(tmp_path / "a.csv", header, (*ROW, better, worse), (*ROW, worse, better), (*ROW, "tie", "tie"))
    found, _ = read_pairs(source)
    swapped = ROW[0], ROW[2], ROW[1]
    texts = [tuple(part[-1]["content"] for part in (pair.prompt, pair.chosen, pair.rejected)) for pair in found]
    assert texts == [ROW, swapped]


def test_a_winner_that_is_said_in_a_sentence_each_time_is_a_mark_too(tmp_path):
    header = ("Question", "First", "Second", "Winner", "Loser")
    rows = [(*ROW, "the first one", "the second one")] * 5 + [(*ROW, "the second one", "the first one")] * 5
    with pytest.raises(UnclearColumns, match="'Winner' and 'Loser' may not be meant"):
        read(table(tmp_path / "a.csv", header, *rows))


def test_short_answers_are_answers_where_nothing_else_could_be(tmp_path):
    assert read(table(tmp_path / "a.csv", ("question", "good", "bad"), ("2+3?", "5", "6")))[0] == [("2+3?", "5", "6")]


def test_scores_beside_both_answers_are_read_and_a_single_one_is_not(tmp_path):
    header = ("Frage", "gut", "schlecht", "Punkte gut", "Punkte schlecht")
    pairs, _ = read_pairs(
        table(tmp_path / "a.csv", header, (*ROW, "4,5", "1.250,75"), (*ROW[:2], "x y z", "0,5", "0,25"))
    )
    assert [(pair.chosen_score, pair.rejected_score) for pair in pairs] == [(0.5, 0.25)]  # the first says the contrary
    source = table(tmp_path / "b.csv", header[:4], (*ROW, "4,5"))
    pairs, report = read_pairs(source)
    assert pairs[0].gap is None
    assert "not read: 'Punkte gut'" in "; ".join(report.noted())


@pytest.mark.parametrize(
    ("cell", "decimal", "other"),
    [
        ("4,5", "4.5", "4.5"),
        ("1,234", "1.234", "1,234"),  # a thousand and more, or a little more than one
        ("0,875", "0.875", "0.875"),
        ("1.234,5", "1234.5", "1.234,5"),
        ("-0,5", "-0.5", "-0.5"),
        ("4.5", "4.5", "4.5"),
        ("12", "12", "12"),
        ("a,b", "a,b", "a,b"),
        ("1,2,3", "1,2,3", "1,2,3"),
    ],
)
def test_a_decimal_comma_is_read_where_it_can_be_nothing_else(cell, decimal, other):
    assert without_comma(cell, decimal_comma=True) == decimal
    assert without_comma(cell, decimal_comma=False) == other


# --- known formats --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "title"),
    [
        (("prompt", "chosen", "rejected", "good", "question"), "TRL preference pairs"),
        (("question", "chosen", "rejected", "best"), "Intel Orca pairs"),
        (("instruction", "input", "chosen", "rejected", "better"), "Alpaca ranking"),
        (("question", "response_j", "response_k", "good"), "StackExchange paired"),
    ],
)
def test_a_format_that_is_known_comes_first(tmp_path, columns, title):
    row = {name: f"a text of {name}" for name in columns}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    _, report = read_pairs(str(tmp_path / "a.jsonl"))
    assert report.read_as == title
    assert report.noted() == []


def test_what_a_known_format_lacks_is_read_by_its_words(tmp_path):
    for header, role in (
        (("Frage", "chosen", "rejected"), "prompt"),
        (("prompt", "Bessere Antwort", "rejected"), "chosen"),
        (("question", "chosen", "schlecht"), "rejected"),
        (("query", "chosen_response", "rejected_response"), "prompt"),
    ):
        found, said = read(table(tmp_path / "a.csv", header, ROW))
        assert found == [ROW]
        assert said.endswith(f"as {role}")


def test_an_instruction_with_its_input_stays_in_two_parts(tmp_path):
    source = table(tmp_path / "a.csv", ("instruction", "input", "good", "bad"), ("Translate.", "Hund", "dog", "cat"))
    assert read(source)[0] == [("Translate.\nHund", "dog", "cat")]


def test_answers_that_hold_their_prompt_need_no_other_column(tmp_path):
    transcripts = [f"\n\nHuman: Why?\n\nAssistant: {answer}" for answer in ("So.", "Not so.")]
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"chosen": transcripts[0], "rejected": transcripts[1], "question": "x"})
    )
    with pytest.raises(DataError):  # as before: a question beside transcripts is one that Orca has
        read_pairs(str(tmp_path / "a.jsonl"), format="trl")
    row = {"chosen": transcripts[0], "rejected": transcripts[1], "query": "x"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    pairs, report = read_pairs(str(tmp_path / "a.jsonl"))
    assert (report.read_as, pairs[0].prompt[0]["content"], report.noted()) == ("HH-RLHF transcripts", "Why?", [])


def test_a_format_that_is_forced_is_not_mended(tmp_path):
    source = table(tmp_path / "a.csv", ("Question", "Good", "Bad"), ROW)
    with pytest.raises(DataError, match="without 'chosen'"):
        read_pairs(source, format="trl")


def test_rows_of_json_are_read_by_their_words_each_by_its_own(tmp_path):
    rows = [
        {"question": "Why?", "good": "It is so.", "bad": "It is not."},
        {"prompt": "How?", "chosen": "By foot.", "rejected": "By car."},
        {"frage": "Wo?", "gut": "Hier ist es.", "schlecht": "Dort ist es."},
        {"text": "nothing"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, said = read(str(tmp_path / "a.jsonl"))
    assert [texts[0] for texts in found] == ["Why?", "How?", "Wo?"]
    assert said == (
        "read 'question' as prompt, 'good' as chosen, 'bad' as rejected; read 'frage' as prompt, 'gut' as chosen, "
        "'schlecht' as rejected"
    )


def test_prompts_are_read_by_their_words(tmp_path):
    source = table(tmp_path / "a.csv", ("Frage", "Thema", "accepted"), ("Wie viel?", "x", "4"))
    (prompt,) = read_prompts(source)
    assert (prompt.text, prompt.accepted, prompt.row) == ("Wie viel?", ("4",), 2)
    source = table(tmp_path / "b.csv", ("Text", "Lösung"), ("Wie viel?", '["4", "vier"]'))
    with pytest.raises(UnclearColumns, match=r"no column says that it is prompt\. .*Name them: --columns \"prompt=…\""):
        read_prompts(source)
    (prompt,) = read_prompts(source, columns={"prompt": "Text", "accepted": "Lösung"})
    assert (prompt.text, prompt.accepted) == ("Wie viel?", ("4", "vier"))


# --- named ----------------------------------------------------------------------------------------

NAMED = {"prompt": "Q", "chosen": "A", "rejected": "B"}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_columns_that_are_named_are_read_from_every_kind_of_file(tmp_path, kind):
    row = dict(zip("QABS", (*ROW, "Be brief."), strict=True))
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    elif kind == "csv":
        table(path, row, row.values())
    else:
        path.write_text(json.dumps(row))
    found, said = read(str(path), columns=NAMED)
    assert found == [ROW]
    assert said.endswith("read 'Q' as prompt, 'A' as chosen, 'B' as rejected; not read: 'S'")
    pairs, _ = read_pairs(str(path), columns={**NAMED, "system": "S"})
    assert pairs[0].prompt[0] == {"role": "system", "content": "Be brief."}


def test_what_is_not_named_is_read_by_its_words(tmp_path):
    source = table(tmp_path / "a.csv", ("Question", "Better answer", "Answer"), ROW)
    found, said = read(source, columns={"rejected": "Answer"})
    assert found == [ROW]
    assert said.endswith("read 'Answer' as rejected, 'Question' as prompt, 'Better answer' as chosen")
    with pytest.raises(UnclearColumns, match="'Good' and 'Better' could both be chosen"):
        read(table(tmp_path / "b.csv", ("Q", "Good", "Better", "Bad"), (*ROW, "x y")), columns={"prompt": "Q"})


def test_a_name_that_is_there_under_another_is_not_read_twice(tmp_path):
    source = table(tmp_path / "a.csv", ("prompt", "chosen", "rejected", "question"), ("id 7", "a b", "c d", "Why?"))
    assert read(source, columns={"prompt": "question"})[0] == [("Why?", "a b", "c d")]
    assert read(source, columns={"chosen": "rejected", "rejected": "chosen"})[0] == [("id 7", "c d", "a b")]
    rows = [
        {"q": None, "instruction": "Not this.", "chosen": "a", "rejected": "b"},
        {"q": "This.", "chosen": "a", "rejected": "b"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read(str(tmp_path / "a.jsonl"), columns={"prompt": "q"})[0] == [("This.", "a", "b")]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_column_that_is_not_there_is_an_error_with_the_nearest_and_all(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    row = dict(zip(("Question", "Good answer", "Bad answer"), ROW, strict=True))
    table(path, row, row.values()) if kind == "csv" else path.write_text(json.dumps(row))
    with pytest.raises(UnclearColumns) as caught:
        read(str(path), columns={"chosen": "Good anser"})
    assert str(caught.value) == (
        f"{path}: there is no column 'Good anser', which is to be chosen. Did you mean Good answer? Its columns are "
        "'Question', 'Good answer', 'Bad answer'."
    )


def test_json_may_leave_out_a_named_column_in_some_rows(tmp_path):
    rows = [{"Q": "a?", "A": "b", "B": "c"}, {"Q": "d?", "A": "e", "B": "f", "S": "Be kind."}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs, _ = read_pairs(str(tmp_path / "a.jsonl"), columns={**NAMED, "system": "S"})
    assert [len(pair.prompt) for pair in pairs] == [1, 2]


@pytest.mark.parametrize(
    "history",
    [
        json.dumps([["Hi", "Hello."], ["Who?", "Me."]]),
        json.dumps(
            [
                {"role": role, "content": said}
                for role, said in zip(["user", "assistant"] * 2, ["Hi", "Hello.", "Who?", "Me."], strict=True)
            ]
        ),
        "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Who?\n\nAssistant: Me.",
    ],
)
def test_earlier_turns_stand_before_the_prompt(tmp_path, history):
    (tmp_path / "a.csv").write_text(
        "".join(
            ",".join('"' + cell.replace('"', '""') + '"' for cell in row) + "\n"
            for row in [("Q", "A", "B", "H"), ("And?", "So.", "No.", history), ("Alone?", "a", "b", "")]
        ),
        encoding="utf-8",
    )
    pairs, _ = read_pairs(str(tmp_path / "a.csv"), columns={**NAMED, "history": "H"})
    assert [said["content"] for said in pairs[0].prompt] == ["Hi", "Hello.", "Who?", "Me.", "And?"]
    assert [said["role"] for said in pairs[0].prompt] == ["user", "assistant"] * 2 + ["user"]
    assert len(pairs[1].prompt) == 1


def test_turns_that_are_none_drop_the_row(tmp_path):
    source = table(tmp_path / "a.csv", ("Q", "A", "B", "H"), (*ROW, "[1, 2]"), (*ROW, "just words"), (*ROW, ""))
    pairs, report = read_pairs(source, columns={**NAMED, "history": "H"})
    assert len(pairs) == 1
    assert [bad.reason for bad in report.dropped] == [
        "history has a message without text content",
        "history is neither text nor a list of messages",
    ]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("prompt=Question,chosen=Good answer,rejected=Bad answer", ("Question", "Good answer", "Bad answer")),
        ("prompt = Question , chosen = Good, really , rejected = b", ("Question", "Good, really", "b")),
        ("prompt='Q, long',chosen=\"A=1\",rejected=B", ("Q, long", "A=1", "B")),
    ],
)
def test_the_option_names_columns_with_commas_and_spaces(text, named):
    assert tuple(parse_columns(text).values()) == named
    assert list(parse_columns(text)) == ["prompt", "chosen", "rejected"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Question", "write WHAT=COLUMN with commas between, such as prompt=Question,chosen=Good"),
        ("", "write WHAT=COLUMN"),
        (
            "promt=Q",
            "'promt' is nothing that a column can be: known are prompt, chosen, rejected, .*Did you mean prompt?",
        ),
        ("prompt=Q,chosen=Q", "'Q' cannot be both prompt and chosen"),
        ("prompt=Q,prompt=R", "something is named twice"),
        ("turns=Q,history=R", "history is named twice"),
        ("prompt=", "the column of prompt has no name"),
    ],
)
def test_an_option_that_names_nothing_says_how_to(text, says):
    with pytest.raises(ConfigError, match=says):
        parse_columns(text)


def test_a_recipe_names_columns_and_refuses_what_none_can_be():
    settings_ = {"model": {"name": "x"}, "data": {"train": "a.csv", "columns": {"prompt": "Q", "score_chosen": "S"}}}
    assert check_recipe(settings_).data.columns == {"prompt": "Q", "chosen_score": "S"}
    settings_["data"]["columns"] = {"promt": "Q"}
    with pytest.raises(
        ConfigError, match=r"data\.columns is .*: 'promt' is nothing that a column can be: .*mean prompt"
    ):
        check_recipe(settings_)


def test_every_name_that_a_column_can_be_has_its_other_spellings():
    assert checked_columns({"turns": "a", "score_chosen": "b", "score_rejected": "c"}) == {
        "history": "a",
        "chosen_score": "b",
        "rejected_score": "c",
    }
    assert [letters_of(place) for place in (0, 25, 26, 701, 702)] == ["A", "Z", "AA", "ZZ", "AAA"]


# --- whatever stands in a header ------------------------------------------------------------------

words = st.sampled_from(
    sorted(
        {
            word
            for name in ("_ASKED", "_GOOD", "_BAD", "_SCORE", "_ANSWER", "_BESIDE", "_ASIDE", "_NOT")
            for word in getattr(column_words, name).split()
        }
    )
)
names = st.lists(words | st.text(max_size=5), min_size=1, max_size=3).map(" ".join).map(str.strip).filter(bool)
headers = st.lists(names, min_size=1, max_size=6, unique=True)


def roles_of(header, row, *, is_table):
    told = Columns("f", named=None)
    told.facts.table = is_table
    list(told.over(iter([(1, row)])))
    return told.meant(row)


@pytest.mark.parametrize("is_table", [True, False])
def test_random_words_never_give_two_columns_one_part_nor_one_column_two(is_table):
    @FUZZ
    @given(header=headers)
    def run(header):
        row = {name: f"the text of {number}" for number, name in enumerate(header)}
        try:
            meant = roles_of(header, row, is_table=is_table)
        except (UnclearColumns, BadRow):
            return
        used = [meant[role] for role in COLUMN_NAMES if role in meant]
        assert len(set(used)) == len(used)
        assert set(used) <= set(row.values())

    run()


def test_the_order_of_columns_never_changes_what_they_are():
    @FUZZ
    @given(header=st.lists(names, min_size=3, max_size=5, unique=True))
    def run(header):
        found = set()
        for order in itertools.islice(itertools.permutations(header), 24):
            row = {name: f"the text of {header.index(name)}" for name in order}
            try:
                meant = roles_of(order, row, is_table=True)
                found.add(json.dumps(meant, sort_keys=True))
            except (UnclearColumns, BadRow):
                found.add("refused")
        assert len(found) == 1

    run()


def test_any_names_can_be_given_as_the_option_that_is_shown():
    @FUZZ
    @given(
        header=st.lists(
            st.text("abc äß,;.()-", min_size=1, max_size=9).map(str.strip).filter(bool),
            min_size=3,
            max_size=3,
            unique=True,
        )
    )
    def run(header):
        named = dict(zip(("prompt", "chosen", "rejected"), header, strict=True))
        option = as_option(named).partition("--columns ")[2].partition(" (in a recipe")[0]
        assert parse_columns(option.strip('"')) == named

    run()
