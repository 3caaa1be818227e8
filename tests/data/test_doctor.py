"""Rows without a fault beside rows with planted faults: the doctor must find all of these and blame none of those."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from rich.console import Console
from templates import THINKING, with_template

from lora_dpo.cli.data_views import stats_view
from lora_dpo.data import Message, Origin, PreferencePair, read_pairs
from lora_dpo.data.doctor import checks
from lora_dpo.data.doctor.catalogue import CHECKS
from lora_dpo.data.doctor.checks import Texts, text_findings
from lora_dpo.data.doctor.examination import _OF_KIND, examine
from lora_dpo.data.doctor.near_duplicates import HASHES, NearDuplicates, signature_of
from lora_dpo.data.doctor.statistics import LengthBias, Noise, length_bias, percentiles
from lora_dpo.data.language import differ, language_of, named_language, script_of
from lora_dpo.data.messages import Kind
from lora_dpo.data.write import write_fixed
from lora_dpo.errors import ConfigError, DataError, OutputError

Row = dict[str, Any]

SYLLABLES = (
    "ba",
    "ce",
    "di",
    "fo",
    "gu",
    "ha",
    "je",
    "ki",
    "lo",
    "mu",
    "na",
    "pe",
    "qui",
    "ro",
    "su",
    "ta",
    "ve",
    "za",
)


def word(draw: random.Random) -> str:
    return "".join(draw.choices(SYLLABLES, k=draw.randint(1, 3)))


def sentence(draw: random.Random, words: int) -> str:
    return " ".join(word(draw) for _ in range(words)).capitalize() + "."


def clean(draw: random.Random) -> Row:
    """A pair without a fault; either answer may be the longer one."""
    chosen, rejected = (" ".join(sentence(draw, 9) for _ in range(draw.randint(3, 7))) for _ in range(2))
    return {"prompt": sentence(draw, draw.randint(5, 20)), "chosen": chosen, "rejected": rejected}


def chat(row: Row) -> Row:
    turns = [("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")]
    return {part: [{"role": role, "content": row[part]}] for part, role in turns}


def without(row: Row, column: str) -> Row:
    return {key: value for key, value in row.items() if key != column}


def changed_a_little(row: Row) -> Row:
    words = row["chosen"].split()
    return {**row, "chosen": " ".join([*words[:4], "Instead", *words[5:]]), "prompt": row["prompt"].upper()}


def other_order(row: Row) -> Row:
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


def apart(row: Row) -> Row:
    sides = {"chosen": "Once. ", "rejected": "Twice. "}
    return {
        side: [{"role": "user", "content": start + row["prompt"]}, {"role": "assistant", "content": row[side]}]
        for side, start in sides.items()
    }


def two_users(row: Row) -> Row:
    made = chat(row)
    return {**made, "prompt": made["prompt"] * 2}


# What is planted, by the check that must find it: rows made from one or two clean ones, and which of them are faulty.
FAULTS: dict[str, Callable[[Row], tuple[list[Any], list[int]]]] = {
    "unreadable": lambda row: ([json.dumps(row)[:-9]], [0]),
    "malformed": lambda row: ([without(row, "rejected")], [0]),
    "empty": lambda row: ([{**row, "chosen": " \n"}], [0]),
    "equal": lambda row: ([{**row, "rejected": row["chosen"]}], [0]),
    "prefix": lambda row: ([apart(row)], [0]),
    "roles": lambda row: ([two_users(row)], [0]),
    "contradiction": lambda row: ([row, other_order(row)], [0, 1]),
    "duplicate": lambda row: ([row, row], [1]),
    "near-duplicate": lambda row: ([row, changed_a_little(row)], [1]),
    "leak": lambda row: ([row], [0]),
    "double-bos": lambda row: ([{**row, "prompt": "<s>" + row["prompt"]}], [0]),
    "leftover": lambda row: ([{**row, "chosen": row["chosen"] + "<|im_end|>\n<|im_start|>user\nGo on."}], [0]),
    "lost-end": lambda row: ([{**row, "chosen": row["chosen"] + " " + row["chosen"][:-3]}], [0]),
    "refusal": lambda row: ([{**row, "chosen": "I'm sorry, but I can't help with that. " + row["chosen"]}], [0]),
    "mojibake": lambda row: ([{**row, "rejected": row["rejected"] + " CafÃ© del mar."}], [0]),
    "language": lambda row: ([{**row, "chosen": "Это совсем другой язык, и его никто не просил. " * 3}], [0]),
}


def planted(path: Path, held_out: Path, rows: int, every: int, seed: int = 0) -> dict[str, list[int]]:
    """Write about `rows` rows with a fault in each `every`th place; returns the faulty lines by check."""
    draw = random.Random(seed)
    expected: dict[str, list[int]] = {name: [] for name in FAULTS}
    leaked = [clean(draw)]
    line = 0
    with path.open("w", encoding="utf-8") as file:
        for place in range(rows):
            row = clean(draw)
            made, faulty = [row], []
            if place % every == every - 1:
                name = list(FAULTS)[place // every % len(FAULTS)]
                made, faulty = FAULTS[name](row)
                expected[name] += [line + 1 + index for index in faulty]
                if name == "leak":
                    leaked.append({**row, "prompt": row["prompt"].lower() + " "})
            for item in made:
                file.write((item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)) + "\n")
                line += 1
    held_out.write_text("".join(json.dumps(row) + "\n" for row in leaked), encoding="utf-8")
    return expected


def test_every_planted_fault_is_found_and_nothing_else(tmp_path):
    path, held_out = tmp_path / "pairs.jsonl", tmp_path / "eval.jsonl"
    expected = planted(path, held_out, rows=3200, every=5)
    assert min(map(len, expected.values())) >= 30
    found = examine([str(path)], held_out=[str(held_out)])
    assert {name: sorted(origin.row for origin in finding.rows) for name, finding in found.findings.items()} == expected
    assert found.report.rows == len(path.read_text().splitlines())
    assert all(finding.examples for finding in found.findings.values())


@pytest.mark.slow
@pytest.mark.long
def test_a_hundred_thousand_rows_in_a_minute_and_a_gigabyte(tmp_path):
    path, held_out, said = tmp_path / "pairs.jsonl", tmp_path / "eval.jsonl", tmp_path / "said.json"
    expected = planted(path, held_out, rows=100_000, every=25)
    command = [sys.executable, "-m", "lora_dpo", "data", "check", str(path), "--eval", str(held_out), "--json"]
    # Through a process in between: a child's peak begins with the size of what it was forked from, and tests are large.
    # Its own time, not the clock's: other tests run beside it.
    between = (
        "import resource, subprocess, sys\n"
        "status = subprocess.run(sys.argv[2:], stdout=open(sys.argv[1], 'wb')).returncode\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(status, used.ru_maxrss, used.ru_utime + used.ru_stime)\n"
    )
    told = subprocess.run([sys.executable, "-c", between, said, *command], stdout=subprocess.PIPE, check=True).stdout
    status, kilobytes, seconds = map(float, told.split())
    megabytes = kilobytes / 1024
    print(f"\n{seconds:.1f} s, {megabytes:.0f} MB, {path.stat().st_size / 2**20:.0f} MB of JSONL")
    assert status == 0
    findings = json.loads(said.read_text(encoding="utf-8"))["findings"]
    rows = {each["check"]: [int(place.rpartition(":")[2]) for place in each["rows"]] for each in findings}
    assert {name: sorted(found) for name, found in rows.items()} == expected
    assert seconds < 60
    assert megabytes < 1024


# --- single checks, by example --------------------------------------------------------------------


def pair(prompt: Any = "Why?", chosen: Any = "Yes.", rejected: Any = "No.", row: int = 1) -> PreferencePair:
    parts = []
    for value, role in ((prompt, "user"), (chosen, "assistant"), (rejected, "assistant")):
        parts.append((Message(role=role, content=value),) if isinstance(value, str) else tuple(value))
    return PreferencePair(*parts, Origin("pairs.jsonl", row))


def turns(*roles: str) -> list[Message]:
    return [Message(role=role, content=role) for role in roles]


def said(*given: tuple[str, str]) -> list[Message]:
    return [Message(role=role, content=content) for role, content in given]


def named(given: PreferencePair) -> list[str]:
    return [name for name, _ in text_findings(given, Texts.of(given))]


SENTENCE = "The river bends twice before it reaches the town and then it widens. "


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (pair(), []),
        (pair(turns("system", "user", "assistant", "user")), []),
        (pair(chosen=turns("assistant", "tool", "assistant", "user", "assistant")), []),
        (pair(turns("user", "system")), ["roles"]),
        (pair(turns("assistant", "user")), ["roles"]),
        (pair(turns("system", "system", "user")), ["roles"]),
        (pair(turns("user", "tool")), ["roles"]),
        (pair(rejected=turns("assistant", "assistant")), ["roles"]),
        (pair("<s>Why?"), ["double-bos"]),
        (pair(chosen=" <|begin_of_text|>Yes."), ["double-bos", "leftover"]),
        (pair("In HTML <s>this</s> is struck out."), []),
        (pair(chosen="<s>5 €</s> 3 €"), []),
        (pair(chosen="<s>Yes.</s>"), ["double-bos", "leftover"]),  # around all of it: a template's
        (pair(rejected="<s>No."), ["double-bos"]),
        (pair(said(("system", "Be brief."), ("user", "<s>Why?"))), ["double-bos"]),
        (pair(chosen=said(("assistant", "Yes."), ("user", "And?"), ("assistant", "<s>No."))), ["double-bos"]),
        (pair(said(("system", "You know <|user|>."), ("user", "Why?"))), ["leftover"]),
        (pair(said(("user", "Hi</s>hello"))), ["leftover"]),
        (pair(rejected="No.</s>"), ["leftover"]),
        (pair(rejected="No. [/INST]"), ["leftover"]),
        (pair("### Instruction:\nWhy?"), ["leftover"]),
        (pair("## Instructions\n### Steps\nWhy?"), []),
        (pair(chosen="Yes.\n\nHuman: And?"), ["leftover"]),
        (pair(chosen="ok\n\nHuman:\nfoo"), ["leftover"]),
        (pair(chosen="ok\n\nHuman:foo"), ["leftover"]),
        (pair(chosen="ok\n\nHuman:"), ["leftover"]),
        (pair(chosen="ok\n\nAssistant:\nfoo"), ["leftover"]),
        (pair("Assistant: ok"), ["leftover"]),
        (pair(chosen="The list:\nHuman: 3 legs"), []),
        (pair("USER: Hi\nASSISTANT:"), ["leftover"]),
        (pair(chosen="Yes. USER: And? ASSISTANT: No."), ["leftover"]),
        (pair("USER: is a heading"), []),
        (pair("ASSISTANT: then USER:"), []),
        (pair(chosen="Yes.### Human: And?"), ["leftover"]),
        (pair(chosen="</s>hello"), ["leftover"]),
        (pair(rejected="No <eos>"), ["leftover"]),
        (pair("What does </s> mean, and `<eos>`?", "The </s> token ends it, as (<eos>) does."), []),
        (pair("<|start|>user<|message|>Why?"), ["leftover"]),
        (pair("<|start|>assistant"), ["leftover"]),
        (pair("From <|start|> to <|stop|>."), []),
        (pair("<｜User｜>Why?"), ["leftover"]),
        (pair("Is Human: a good title?"), []),
        (pair(chosen="Yes.<end_of_turn>"), ["leftover"]),
        (pair(chosen="Use a <|pipe|> here."), []),
        (pair(chosen=SENTENCE * 3 + "And then it widens and slows until one day it"), ["lost-end"]),
        (pair(chosen="And then it widens until one day it"), []),  # short answers end as they like
        (pair(chosen=SENTENCE * 3 + "\n- one two three four five six seven eight nine"), []),
        (pair(chosen=SENTENCE * 3 + "```\nprint of a long line of words that is code and ends so"), []),
        (pair(chosen=SENTENCE * 3 + "\n\n12. one two three four five six seven eight nine"), []),
        (pair(chosen=SENTENCE * 3 + "\n (b) one two three four five six seven eight nine"), []),
        (pair(rejected=SENTENCE * 3 + "And then it widens and slows until one day it"), ["lost-end"]),
        (pair(chosen="I'm sorry, but I can't help with that."), ["refusal"]),
        (pair(chosen="I am sorry, I am unable to help with that."), ["refusal"]),
        (pair(chosen="As a language model, I cannot know that."), ["refusal"]),
        (pair(chosen="As a large language model, I can't."), ["refusal"]),
        (pair(chosen="My apologies, but I can't do that."), ["refusal"]),
        (pair(chosen="I must respectfully decline."), ["refusal"]),
        (pair(chosen="I must decline."), ["refusal"]),
        (pair(chosen="I must say that I like it."), []),
        (pair(chosen="My apologies for the delay. Here it is."), []),
        (pair(chosen="As an AI, I don’t have opinions."), ["refusal"]),
        (pair(chosen="I cannot do that.", rejected="Sorry, I won't."), []),  # both refuse
        (pair(chosen="Sorry for the wait! Here it is."), []),
        (pair(chosen="As an AI, I suggest three things."), []),
        (pair(rejected="I cannot do that."), []),
        (pair(rejected="Itâ€™s here."), ["mojibake"]),
        (pair("ï»¿Why?"), ["mojibake"]),
        (pair("He said \ufffd."), ["mojibake"]),
        (pair("Ãngulo, São Tomé, café, Âge, “quoted” – dashes…", "Olá."), []),
        (pair("Что это?", "Это кот."), []),
        (pair("Что это?", "A cat."), ["language"]),
        (pair("Why?", "これは猫です。"), ["language"]),
        (pair("2 + 2?", "四"), []),  # no letters, no script
    ],
)
def test_what_a_pair_shows_by_itself(given, names):
    assert named(given) == names


BOS = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>", "[CLS]", "<BOS_TOKEN>")


@pytest.mark.parametrize("part", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize("token", [*BOS, "<｜begin▁of▁sentence｜>"])
def test_every_beginning_of_text_is_known_on_every_side(token, part):
    assert "double-bos" in named(pair(**{part: f" {token}Well."}))
    assert "double-bos" not in named(pair(**{part: f"Well, {token} it is."}))
    assert token in checks._BOS
    assert len(checks._BOS) == len(BOS) + 1  # another one belongs above


TOKENS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|im_sep|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|endoftext|>",
    "<|startoftext|>",
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<|python_tag|>",
    "<|start_of_role|>",
    "<|end_of_role|>",
    "<|end_of_turn|>",
    "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
    "<|channel|>",
    "<|message|>",
    "<|return|>",
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "<</SYS>>",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "<start_of_turn>",
    "<end_of_turn>",
]
OTHERS = ["<｜Assistant｜>", "\n### Instruction:", "\n### Response:", "\n### Input:", "### Human:", "### Assistant:"]


@pytest.mark.parametrize("part", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize("token", [*TOKENS, *OTHERS])
def test_every_piece_of_a_template_is_known_on_every_side(token, part):
    assert named(pair(**{part: f"Well, {token} it is."})) == ["leftover"]
    assert sorted(checks._TOKENS) == sorted(TOKENS)  # another one belongs above


@pytest.mark.parametrize(
    "token",
    [
        "<|im_end|>",
        "<|eot_id|>",
        "<|eot|>",
        "<|eom_id|>",
        "<|end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|end_of_turn|>",
        "<|END_OF_TURN_TOKEN|>",
        "<|return|>",
        "<end_of_turn>",
        "<｜end▁of▁sentence｜>",
        "<eos>",
        "</s>",
    ],
)
def test_every_end_of_turn_is_known(token):
    assert checks.ends_with_marker(f"Yes.{token}\n")
    assert named(pair(rejected=f"No.{token}")) == ["leftover"]
    assert not checks.ends_with_marker(f"{token} ends it.")
    assert len(checks._END) == 14


def damaged(text: str, encoding: str) -> str:
    """UTF-8 read byte by byte in another encoding; what it has no character for stays a control character."""
    return "".join(bytes([byte]).decode(encoding, "ignore") or chr(byte) for byte in text.encode())


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
def test_damaged_text_of_many_languages_is_found(encoding):
    texts = (
        "über, größer, Österreich|España, mañana|coração, você, manhã|à la carte, garçon, île|Łódź, więcej, święto|"
        "Škoda, člověk, dům|şimdi, İstanbul, ığdır|őrült fűz|žena, ćma|Ελλάδα|привет|שלום|مرحبا|你好 世界|こんにちは|"
        "안녕 한국어|สวัสดี|नमस्ते|😀|👍🏽|5 €|Brand™|“quoted”|so – or so|wait… now|→ ✓ █|người được"
    )
    assert [text for text in texts.split("|") if named(pair(chosen=damaged(text, encoding))) != ["mojibake"]] == []


def test_mojibake_is_found_where_a_plain_space_took_the_place_of_another():
    for text in ("ðŸ˜€", "ä½ å¥½", "â‚¬5", "Å¡koda", "CafÃ© del mar", "voilÃ\xa0 tout", "Ð¿Ñ€Ð¸Ð²ÐµÑ‚"):
        assert named(pair(chosen=text)) == ["mojibake"]


WHOLE = [
    "CAFÉ…",
    "“CAFÉ”",
    "«CAFÉ»",
    "CAFÉ™",
    "CAFÉ®",
    "„Ü“",
    "Spaß“",
    "Spaß…",
    "Spaß»",
    "„Übergröße“",
    "MANHû",
    "MANHÃ…",
    "MAÇÔ",
    "IRMÃ–TIA",
    "«Â»",
    "“Â”",
    "Úžasný",
    "ÚŽASNÝ",
    "ÍŽ",
    "café¹²",
    "société¹²",
    "café…”",
    "«café…»",
    "ÉTÉ!",
    "é–è",
    "“Ñ”",
    "Ñ…",
    "Ø…",
    "“Å”",
    "„Ä“",
    "Ä…",
    "Å…",
    "ROMÂN…",
    "limbâ”",
    "â…”",
    "ê”",
    "3×½×¼",
    "2×²³",
    "það…",
    "Æ…",
    "Åland…",
    "Ålesund–Ängelholm",
    "»Ärger«",
    "›Ü‹",
    "l·l",
    "POKÉMON™",
    "café•thé",
    "crème–brûlée",
    "résumé—long",
    "“naïve”…",
    "5é€",
    "CAFÉ’S",
    "«É»…",
]


def test_whole_text_of_many_languages_is_no_mojibake():
    spaced = ["déjà\xa0»", "à\xa0«", "CAFÉ\xa0:", "ÉTÉ\xa0!", "renvoie à\xa0§\xa03"]  # French puts such spaces
    languages = [*LANGUAGES.values(), "Người Việt được", "Ελλάδα", "привет", "你好", "안녕", "สวัสดี", "नमस्ते", "مرحبا"]
    for text in [*WHOLE, *spaced, *languages]:
        assert "mojibake" not in named(pair(chosen=f"x {text} y"))


def test_scripts_are_told_by_most_of_the_letters():
    assert [script_of(text) for text in ("Hello", "Привет, Bob", "猫とは何ですか", "한국어", "12 + 3 = ?", "")] == [
        "Latin",
        "Cyrillic",
        "Han",
        "Hangul",
        "",
        "",
    ]


LANGUAGES = {
    "English": "It is not clear that the plan was good for all of the people in this town, and you have to wait.",
    "German": "Es ist nicht klar, wie die Leute mit der Sache leben, und das ist für den Ort ein Problem.",
    "French": "Il est dans une ville que vous ne voyez pas sur la carte, et les gens sont là pour le vin.",
    "Spanish": "El plan es más grande que la casa, y los niños se van con una amiga por las calles del pueblo.",
    "Portuguese": "O plano não é mais que uma ideia, e os filhos da casa vão com a mãe para o rio.",
    "Italian": "Il piano non è una cosa che si fa per gioco, e gli amici della casa sono con il gatto.",
    "Dutch": "Het is niet zo dat de man van het dorp een boot voor zijn zoon op het water heeft.",
    "Swedish": "Det är inte så att jag har en båt på sjön, och den som är med av oss får vänta till kvällen.",
    "Polish": "To nie jest tak, że się idzie do domu i w nocy śpi na ławce, ale co dla nich to znaczy.",
}


def test_languages_are_told_by_their_small_words():
    assert {name: language_of(text) for name, text in LANGUAGES.items()} == {name: name for name in LANGUAGES}
    assert language_of("Oak, elm, ash.") == "Latin"
    assert differ(LANGUAGES["English"], LANGUAGES["German"]) == "English prompt, German answer"
    assert differ(LANGUAGES["English"], "Oak, elm, ash.") is None  # cannot be told
    assert differ(LANGUAGES["English"], LANGUAGES["English"]) is None


def test_a_report_names_a_language_or_says_why_not(tmp_path):
    long = "lorem ipsum dolor sit amet consectetur adipiscing elit " * 4
    answers = [LANGUAGES["English"], "Oak, elm, ash.", long, "Привет, как дела?", "猫です。", "12 + 3 = 15"]
    assert list(map(named_language, answers)) == [
        "English",
        "too short to tell",
        "Latin script, language not told",
        "Cyrillic script",
        "Han script",
        "no letters",
    ]
    rows = [{"prompt": f"Say {number}.", "chosen": text, "rejected": "x"} for number, text in enumerate(answers * 2)]
    found = examine([write(tmp_path / "a.jsonl", *rows)])
    assert found.as_json()["languages"] == dict.fromkeys(map(named_language, answers), 2)


def write(path: Path, *rows: Any) -> str:
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def rows_of(source: str, **options: Any) -> dict[str, list[int]]:
    found = examine([source], **options)
    return {name: [origin.row for origin in finding.rows] for name, finding in found.findings.items()}


BASE = {"prompt": "Name a tree.", "chosen": "Oak.", "rejected": "Moss."}


def test_answers_without_the_end_that_most_have(tmp_path):
    draw = random.Random(1)
    marked = [{**row, "chosen": row["chosen"] + "</s>"} for row in (clean(draw) for _ in range(4))]
    found = rows_of(write(tmp_path / "a.jsonl", *marked, clean(draw)))
    assert found == {"leftover": [1, 2, 3, 4], "lost-end": [5]}
    assert "lost-end" not in rows_of(write(tmp_path / "b.jsonl", marked[0], clean(draw), clean(draw)))


def test_every_row_of_a_contradiction_is_named_and_duplicates_count_from_the_second(tmp_path):
    source = write(tmp_path / "a.jsonl", BASE, BASE, other_order(BASE), {**BASE, "prompt": "Again?"}, BASE)
    assert rows_of(source) == {"contradiction": [1, 2, 3, 5]}
    assert rows_of(write(tmp_path / "b.jsonl", BASE, BASE, BASE)) == {"duplicate": [2, 3]}


def calling(day: str, **more: Any) -> list[dict[str, Any]]:
    call = {"function": {"name": "rain", "arguments": {"day": day}}}
    return [{"role": "assistant", "content": "", "tool_calls": [call], **more}]


def test_calls_and_tools_are_part_of_what_is_compared(tmp_path):
    tool = [{"name": "rain", "parameters": {}}]
    first = {"prompt": "Rain?", "chosen": calling("Monday"), "rejected": calling("Sunday"), "tools": tool}
    others = [
        {**first, "chosen": calling("Friday")},
        {**first, "rejected": calling("Monday", content="One moment.")},
        {**first, "tools": [{"name": "rain", "parameters": {"type": "object"}}]},
    ]
    found = rows_of(write(tmp_path / "a.jsonl", first, *others, first))
    assert found["duplicate"] == [5]
    assert "contradiction" not in found
    flipped = {**first, "chosen": first["rejected"], "rejected": first["chosen"]}
    assert rows_of(write(tmp_path / "b.jsonl", first, flipped))["contradiction"] == [1, 2]


@pytest.mark.parametrize("max_length", [None, 30, 1024])
def test_answers_that_the_template_makes_equal_are_equal_and_not_cut(tokenizer, tmp_path, max_length):
    import copy

    trims = copy.deepcopy(tokenizer)
    trims.chat_template = trims.chat_template.replace("message['content']", "message['content'] | trim")
    source = write(tmp_path / "a.jsonl", {**BASE, "rejected": "Oak. "}, {**BASE, "prompt": "Hi"})
    assert rows_of(source, tokenizer=trims, max_length=max_length) in (
        {"equal": [1]},
        {"equal": [1], "prompt-fills": [1]},
    )


def test_broken_rows_of_every_kind_of_file_are_findings(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([BASE, None, BASE]))
    (tmp_path / "b.json").write_text(json.dumps(BASE) + "\n{\n" + json.dumps(BASE))
    (tmp_path / "c.csv").write_text("prompt,chosen,rejected\nHi,a,b\nHi,a, or c,b\n")
    (tmp_path / "d.jsonl").write_bytes(json.dumps(BASE).encode() + b"\n\xff\n")
    for name in ("a.json", "b.json", "c.csv", "d.jsonl"):
        assert rows_of(str(tmp_path / name))["unreadable"] == [3 if name == "c.csv" else 2]  # the header is a row, too


def test_a_leak_is_found_whatever_the_case_and_space(tmp_path):
    held_out = write(tmp_path / "eval.jsonl", {**BASE, "prompt": " name  a TREE."})
    other = {**BASE, "prompt": "Name a fish.", "chosen": "Pike."}
    assert rows_of(write(tmp_path / "a.jsonl", other, BASE), held_out=[held_out]) == {"leak": [2]}


def test_a_leak_is_found_across_a_system_turn(tmp_path):
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a tree."}]
    plain, framed = write(tmp_path / "a.jsonl", BASE), write(tmp_path / "b.jsonl", {**BASE, "prompt": asked})
    assert rows_of(framed, held_out=[plain]) == {"leak": [1]}
    assert rows_of(plain, held_out=[framed]) == {"leak": [1]}
    assert examine([plain, framed]).prompts == 1


def test_a_vote_alone_can_be_leaked_from(tmp_path):
    source = write(tmp_path / "a.jsonl", BASE, {**BASE, "prompt": "Name a fish."})
    held_out = write(tmp_path / "eval.jsonl", {"prompt": "Name a fish.", "completion": "Pike.", "label": True})
    assert rows_of(source, held_out=[held_out])["leak"] == [2]
    assert rows_of(source, held_out=[held_out, held_out])["leak"] == [2]


def test_held_out_data_that_cannot_be_read_is_no_clean_bill(tmp_path):
    source = write(tmp_path / "a.jsonl", BASE)
    with pytest.raises(DataError, match="no prompt can leak"):
        examine([source], held_out=[source, write(tmp_path / "eval.jsonl", {"text": "Hi"})])


def test_length_bias_is_a_finding_only_with_enough_pairs(tmp_path):
    draw = random.Random(2)
    pairs = [{**clean(draw), "chosen": "Yes.", "rejected": sentence(draw, 9)} for _ in range(40)]
    assert "length-bias" in rows_of(write(tmp_path / "a.jsonl", *pairs))
    assert "length-bias" not in rows_of(write(tmp_path / "b.jsonl", *pairs[:20]))


@pytest.mark.parametrize("kind", ["in the content", "beside it", "special"])
def test_thoughts_are_no_part_of_lengths(tokenizer, tmp_path, kind):
    def bot(thought, said):
        if kind == "beside it":
            return [{"role": "assistant", "content": said, "reasoning_content": thought}]
        begin, end = ("[THINK]", "[/THINK]") if kind == "special" else ("<think>\n", "\n</think>\n\n")
        return [{"role": "assistant", "content": f"{begin}{thought}{end}{said}"}]

    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {n}?"}],
            "chosen": bot("Hm, hm. " * 9, f"It is {n}." if n % 2 else f"It is {n}, I think."),
            "rejected": bot("Hm.", f"It is {n}, I think." if n % 2 else f"It is {n}."),
        }
        for n in range(10, 50)
    ]
    source = write(tmp_path / "a.jsonl", *rows)
    think = with_template(tokenizer, THINKING)
    if kind == "special":
        think = with_template(tokenizer, tokenizer.chat_template, tokens=("[THINK]", "[/THINK]"))
    for found in (examine([source]), examine([source], tokenizer=think)):
        assert found.bias == LengthBias(0.5, 0.0, 0.5)
        assert "length-bias" not in found.findings
        tokens = found.unit == "tokens"
        between = 2 if tokens and kind != "special" else 0  # the line breaks after the thought
        assert set(found.said["chosen"]) == {between + tokens + count for count in (9, 18)}
        assert min(found.lengths["chosen"]) > 70
        assert found.note_of_thoughts.startswith("in 40 of 40 pairs an answer begins with a thought: lengths and")
        assert found.as_json()["length"]["chosen"]["100"] == between + tokens + 18
        assert found.as_json()["pairs_with_thoughts"] == 40
        console = Console(file=io.StringIO(), width=200)
        stats_view(found, console)
        assert "in 40 of 40 pairs an answer begins with a thought" in console.file.getvalue()
        table = console.file.getvalue().splitlines()
        [chosen] = [line.split() for line in table if line.startswith("chosen ")]
        assert chosen[-1] == str(between + tokens + 18)
        assert ("max_length cuts them, too" in console.file.getvalue()) == tokens
    assert examine([write(tmp_path / "b.jsonl", {**rows[0], "chosen": "a", "rejected": "b"})]).note_of_thoughts is None


def test_length_bias_by_hand():
    assert length_bias([3, 5, 2, 2], [1, 1, 2, 9]) == LengthBias(chosen_longer=0.5, same=0.25, predicts=0.625)
    assert length_bias([], []) == LengthBias()
    assert length_bias([1, 1], [2, 2]).predicts == 1.0


def test_percentiles_are_by_nearest_rank():
    assert percentiles(range(1, 101)) == {"5": 5, "25": 25, "50": 50, "75": 75, "95": 95, "99": 99, "100": 100}
    assert percentiles([7]) == dict.fromkeys(("5", "25", "50", "75", "95", "99", "100"), 7)
    assert percentiles([]) == {}


def test_the_flip_rate_is_what_disagreement_implies():
    noise = Noise()
    noise.add(1, 2)  # disagree
    noise.add(0, 2)
    noise.add(2, 2)
    noise.add(2, 3)  # three pairs of judgements, of which two disagree
    assert (noise.comparisons, noise.judged_twice, noise.disagreed) == (4, 6, 3)
    assert noise.flip_rate == 0.5
    draw, flips = random.Random(0), Noise()
    for _ in range(20_000):
        flips.add(sum(draw.random() < 0.1 for _ in range(2)), 2)
    assert flips.flip_rate == pytest.approx(0.1, abs=0.01)
    assert Noise().flip_rate is None


# --- near duplicates ------------------------------------------------------------------------------


def test_the_signature_estimates_the_share_of_common_word_pairs():
    draw = random.Random(3)
    errors = []
    for _ in range(40):
        words = [draw.randrange(1 << 32) for _ in range(200)]
        other = [*words[:100], *(draw.randrange(1 << 32) for _ in range(100))]
        shared, union = 99, 2 * 199 - 99
        errors.append(float((signature_of(words) == signature_of(other)).mean()) - shared / union)
    assert abs(sum(errors) / len(errors)) < 0.05
    assert len(signature_of([])) == HASHES


def test_short_answers_to_different_prompts_are_no_near_duplicates():
    near = NearDuplicates()
    draw = random.Random(4)
    assert [near.add(Texts(sentence(draw, 12), "Yes.", "No.")) for _ in range(3000)] == [None] * 3000
    first = sentence(draw, 12)
    near.add(Texts(first, "Yes.", "No."))
    assert near.add(Texts(first.upper() + "?", "yes", "no")) == 3000


def test_the_same_long_prompt_with_other_answers_is_no_near_duplicate():
    near, draw = NearDuplicates(), random.Random(5)
    prompt = sentence(draw, 300)
    assert [near.add(Texts(prompt, sentence(draw, 30), sentence(draw, 30))) for _ in range(50)] == [None] * 50


# --- through the tokenizer ------------------------------------------------------------------------


def test_what_the_tokenizer_shows(tokenizer, tmp_path):
    frame = 21 - 2  # tokens of the template around the user's text; ids are bytes
    source = write(
        tmp_path / "a.jsonl",
        {"prompt": "Hi", "chosen": "Yes", "rejected": "Nope"},
        {"prompt": "Go", "chosen": "Same start, this", "rejected": "Same start, that"},
        {"prompt": "x" * 40, "chosen": "Yes", "rejected": "No"},
        {"prompt": "Ok", "chosen": "short", "rejected": "a longer answer"},
    )
    found = examine([source], tokenizer=tokenizer, max_length=frame + 2 + 10)
    assert {name: [origin.row for origin in finding.rows] for name, finding in found.findings.items()} == {
        "same-after-cut": [2],
        "prompt-fills": [3],
        "cut": [4],
    }
    assert found.unit == "tokens"
    assert list(found.lengths["prompt"]) == [frame + 2, frame + 2, frame + 40, frame + 2]
    assert list(found.lengths["chosen"]) == [4, 17, 4, 6]
    assert found.share_cut(frame + 2 + 10) == 0.75
    assert found.as_json()["length"]["share_cut"][str(frame + 12)] == 0.75


def test_a_conversation_that_the_template_refuses_is_a_finding(tokenizer, tmp_path):
    import copy

    strict = copy.deepcopy(tokenizer)
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    strict.chat_template = refusal + strict.chat_template
    source = write(tmp_path / "a.jsonl", BASE, {**BASE, "prompt": turns("system", "user")})
    found = examine([source], tokenizer=strict)
    assert [origin.row for origin in found.findings["template"].rows] == [2]
    assert "no system turn" in found.findings["template"].examples[0][1]


def test_a_template_that_writes_the_bos_twice_is_found(tokenizer, tmp_path):
    import copy

    doubled = copy.deepcopy(tokenizer)
    doubled.chat_template = "{{ bos_token }}{{ bos_token }}" + doubled.chat_template
    assert rows_of(write(tmp_path / "a.jsonl", BASE), tokenizer=doubled) == {"double-bos": [1]}


def test_special_tokens_of_the_model_in_a_text_are_leftovers(tokenizer, tmp_path):
    import copy

    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"bos_token": "<<go>>", "additional_special_tokens": ["<file>"]})
    other.add_tokens(["<think>"])
    other.chat_template = "{{ bos_token }}" + other.chat_template
    framed = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<<go>>Why?"}]
    source = write(
        tmp_path / "a.jsonl",
        {**BASE, "chosen": "Run it on <file>."},
        {**BASE, "chosen": "<think>An oak?</think> Oak."},
        {**BASE, "prompt": framed},
        {**BASE, "rejected": "Then <<go>>."},
        {**BASE, "rejected": "<<go>> <file>"},
    )
    assert rows_of(source) == {}
    assert rows_of(source, tokenizer=other) == {"double-bos": [3, 5], "leftover": [1, 4]}
    assert rows_of(write(tmp_path / "b.jsonl", {**BASE, "chosen": "Oak.<|im_end|>"}), tokenizer=tokenizer) == {
        "leftover": [1]  # once, though both the text and the tokenizer show it
    }


# --- cleaning -------------------------------------------------------------------------------------


def lines(path: Path) -> Iterator[Row]:
    return map(json.loads, path.read_text(encoding="utf-8").splitlines())


def test_cleaning_loses_nothing_and_leaves_no_errors(tmp_path):
    path, held_out, out = tmp_path / "pairs.jsonl", tmp_path / "eval.jsonl", tmp_path / "clean.jsonl"
    planted(path, held_out, rows=640, every=4)
    found = examine([str(path)], held_out=[str(held_out)])
    fixed = write_fixed([str(path)], found, out)
    kept, dropped = list(lines(out)), list(lines(fixed.dropped))
    before = path.read_text(encoding="utf-8").splitlines()
    assert (fixed.rows, fixed.pairs, fixed.removed) == (len(before), len(kept), len(dropped))
    assert sorted([row["origin"]["row"] for row in kept] + [row["row"] for row in dropped]) == [
        *range(1, len(before) + 1)
    ]
    for row in dropped:  # each with its reason, and whole
        line = before[row["row"] - 1]
        assert row["content"] == line or row["content"] == json.loads(line)
        assert row["reason"]
        assert row["file"] == str(path)
    again = examine([str(out)], held_out=[str(held_out)])
    assert again.errors == 0
    assert set(again.findings) <= {"near-duplicate", "lost-end", "refusal", "mojibake", "language"}


def test_votes_that_were_not_paired_are_kept_as_votes(tmp_path):
    votes = [{"prompt": "Hi", "completion": text, "label": up} for text, up in (("a", True), ("b", False), ("c", True))]
    source, out = write(tmp_path / "a.jsonl", *votes), tmp_path / "clean.jsonl"
    fixed = write_fixed([source], examine([source]), out)
    [row] = lines(fixed.dropped)
    assert row["row"] == 3
    assert row["content"]["label"] is True
    again, _ = read_pairs(write(tmp_path / "b.jsonl", row["content"], {**votes[1], "prompt": "Hi"}))
    assert again[0].chosen[0]["content"] == "c"


def test_both_votes_of_a_removed_pair_are_accounted_for(tmp_path):
    votes = [
        {"prompt": prompt, "completion": text, "label": up}
        for prompt in ("Hi", "<s>Hi")
        for text, up in (("a", True), ("b", False))
    ]
    source, out = write(tmp_path / "a.jsonl", *votes), tmp_path / "clean.jsonl"
    fixed = write_fixed([source], examine([source]), out)
    assert (fixed.rows, fixed.pairs, fixed.removed) == (4, 1, 2)
    assert [(row["row"], row["content"]["completion"][0]["content"]) for row in lines(fixed.dropped)] == [
        (3, "a"),
        (4, "b"),
    ]


def test_a_row_of_several_pairs_is_removed_as_one(tmp_path):
    from test_formats import TEA, feedback

    tree = [*TEA[:3], {**TEA[2], "id": "x", "content": "Water."}]
    bad = [{**TEA[0], "content": "<s>Tea?"}, *tree[1:]]
    source = write(tmp_path / "a.jsonl", feedback(1, "b", tree, ["m"]), feedback(1, "b", bad, ["m"]))
    fixed = write_fixed([source], examine([source]), tmp_path / "clean.jsonl")
    assert (fixed.rows, fixed.pairs, fixed.removed) == (2, 2, 1)
    assert [row["row"] for row in lines(fixed.dropped)] == [2]


def test_cleaning_a_file_twice_at_once_is_refused(tmp_path):
    source = write(tmp_path / "a.jsonl", BASE)
    for twice in ([source, source], [source, str(tmp_path)]):
        with pytest.raises(ConfigError, match=r"a\.jsonl is named twice, by itself or through a folder"):
            write_fixed(twice, examine(twice), tmp_path / "clean.jsonl")
    assert not (tmp_path / "clean.jsonl").exists()


def test_nothing_is_written_if_nothing_would_be_left(tmp_path):
    source = write(tmp_path / "a.jsonl", {**BASE, "chosen": ""})
    with pytest.raises(DataError, match="No pair is left after cleaning"):
        write_fixed([source], examine([source]), tmp_path / "clean.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("taken", ["clean.jsonl", "clean.jsonl.dropped.jsonl"])
def test_cleaning_overwrites_nothing(tmp_path, taken):
    source = write(tmp_path / "a.jsonl", BASE)
    (tmp_path / taken).write_text("mine")
    with pytest.raises(OutputError, match="already exists"):
        write_fixed([source], examine([source]), tmp_path / "clean.jsonl")
    assert (tmp_path / taken).read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["a.jsonl", taken])


def test_another_suffix_is_refused_before_any_work(tmp_path):
    source = write(tmp_path / "a.jsonl", BASE)
    with pytest.raises(ConfigError, match=r"should end in \.jsonl"):
        write_fixed([source], examine([source]), tmp_path / "clean.csv")


def test_half_a_character_survives_cleaning(tmp_path):
    source = write(tmp_path / "a.jsonl", BASE, json.dumps({**BASE, "chosen": "cut \ud83d"}))
    fixed = write_fixed([source], examine([source]), tmp_path / "clean.jsonl")
    [row] = lines(fixed.dropped)
    assert row["content"]["chosen"] == "cut \ud83d"
    assert "half of a character" in row["reason"]


def test_every_reason_for_a_drop_is_a_check():
    for kind in get_args(Kind):
        assert _OF_KIND.get(kind, kind) in CHECKS


def test_every_check_says_what_it_does_and_what_to_do():
    for check in CHECKS.values():
        assert check.meaning.endswith(".")
        assert check.advice.endswith(".")
    assert all(check.removes for check in CHECKS.values() if check.severity == "error")
    page = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    rows = [f"| `{check.name}` | {check.severity} | {check.title} |" for check in CHECKS.values()]
    assert [row for row in rows if row not in page] == []
