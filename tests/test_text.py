"""How counts, reasons and foreign text are written."""

from __future__ import annotations

import json

import pytest

from lora_dpo.text import counted, harmless, json_text, reasons_text

PAINTS = [*map(chr, range(0x7F, 0xA0)), *"\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\x00\x1b\r"]


def test_one_is_singular():
    assert [counted(number, "pair") for number in (0, 1, 2, 1200)] == ["0 pairs", "1 pair", "2 pairs", "1,200 pairs"]


@pytest.mark.parametrize("mark", PAINTS, ids=ascii)
def test_what_could_repaint_or_reorder_a_terminal_is_spelled_out(mark):
    assert harmless(f"a{mark}b") == f"a{ascii(mark)[1:-1]}b"
    written = json_text({f"a{mark}": [f"{mark}b\\"]})
    assert mark not in written
    assert json.loads(written) == {f"a{mark}": [f"{mark}b\\"]}


def test_letters_and_layout_stay():
    assert harmless("Grüße, 你好 🙂\n\ttab") == "Grüße, 你好 🙂\n\ttab"
    assert json_text({"said": "Grüße 🙂"}) == '{\n  "said": "Grüße 🙂"\n}'


def test_reasons_that_differ_in_detail_are_one_and_the_rest_is_counted():
    many = [(f"unreadable: broken JSON (Expecting value, column {column})", 1) for column in range(300)]
    assert reasons_text([("empty prompt", 2), *many]) == "300 unreadable: broken JSON, 2 empty prompt"
    kinds = [(f"kind {number}", 10 - number) for number in range(8)]
    assert reasons_text(kinds).endswith("5 kind 5, … 2 more reasons")
    assert reasons_text(kinds[:7]).endswith("5 kind 5, … 1 more reason")
    assert reasons_text([]) == ""
