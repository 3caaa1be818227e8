"""Which column of a file is what: as somebody named them, as the file's format names them, or by the words in them.

A column is read for what its name says only where no format knows the header, and only where one reading is possible;
what was read as what is said. The file's reader knows nothing of this, and neither do the formats: a row goes from one
to the other through `Columns.meant`, with its columns under the names that formats know.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from lora_dpo.config.column_names import COLUMN_NAMES, as_option
from lora_dpo.config.reading import nearest
from lora_dpo.data.column_words import CERTAIN, PERHAPS, is_data, role_of, says_answer
from lora_dpo.data.formats.published import is_demonstration
from lora_dpo.data.formats.registry import Format, format_of
from lora_dpo.data.formats.trl import SCORES
from lora_dpo.data.formats.winner import Winners
from lora_dpo.data.messages import (
    BadRow,
    Messages,
    conversation,
    from_json,
    is_transcript,
    listed,
    message,
    prompt_of,
    transcript,
)
from lora_dpo.data.row_reading import FileFacts, Row
from lora_dpo.data.table import is_number, without_comma
from lora_dpo.errors import UnclearColumns
from lora_dpo.text import shown

Wanted = Literal["pairs", "prompts", "answers"]
"""What is read: pairs, prompts alone, or single answers, which a pair's are, too."""

OnNote = Callable[[str, str], None]
"""Told of a file and what a person should know of how it was read."""

SAMPLE = 64
"""Rows by which columns are told: JSON leaves out what a row has not, and marks show in a few."""
_SHOWN = 12
"""Columns that a message lists."""
_NEEDED: dict[Wanted, tuple[str, ...]] = {
    "pairs": ("prompt", "chosen", "rejected"),
    "prompts": ("prompt",),
    "answers": ("prompt", "completion"),
}
_TOO_FEW: dict[Wanted, str] = {
    "pairs": "A pair needs a prompt and two answers",
    "prompts": "A row needs a prompt",
    "answers": "An answer needs a prompt beside it",
}
_WITHOUT_A_SIDE = ("trl", "orca", "alpaca", "argilla", "sharegpt")
"""Formats that are known by one of both answers, or by their question: the other may be there under another name."""
_ASKED_ELSEWHERE = ("instruction", "input", "question", "conversations", "messages")
"""Columns in which formats look for a prompt; where another column is named as the prompt they mean nothing."""
_TEXTS = frozenset(
    (
        *("prompt", "chosen", "rejected", "completion", "system", "history", *_ASKED_ELSEWHERE),
        *("chosen_response", "rejected_response", "response_j", "response_k", "human_ref_A", "human_ref_B"),
        *("response_a", "response_b", "rejected_response", "query", "response"),
    )
)
"""Columns in which a spreadsheet's error is no text."""
_ERROR = re.compile(r"#(?:[¡¿]?[^\W\d_a-z]+(?:/0)?[!?]|N/[AD]|NV)|Err:\d{3}")
"""What a spreadsheet shows where a formula failed: #REF!, #DIV/0!, #NAME?, #N/A; Excel's German, French and so on."""
_SCORES = frozenset(name for two in SCORES for name in two)


class Columns:
    """What the columns of one file mean.

    Args:
        source: the file, for messages.
        named: columns by what they are to be, as a recipe's `data.columns` has them.
        wanted: what is read of the rows.
        recognise: whether words in a header say what it is; not where a format is forced.
    """

    def __init__(
        self,
        source: str,
        named: Mapping[str, str] | None = None,
        *,
        wanted: Wanted = "pairs",
        recognise: bool = True,
    ) -> None:
        self.source, self.named, self.wanted, self.recognise = source, dict(named or {}), wanted, recognise
        self.facts = FileFacts()
        """To be given to the reader, which fills it in."""
        self._roles: dict[tuple[Any, ...], dict[str, str]] = {}
        self._sample: list[Row] = []
        self._said: tuple[Any, ...] = ()
        self._notes: set[str] = set()
        self._winners = Winners(source, self.facts.notes.append)

    def over(self, rows: Iterator[tuple[int, Row]]) -> Iterator[tuple[int, Row]]:
        """The rows of the file, some of them looked at ahead where columns have to be told.

        Raises:
            UnclearColumns: a column that was named is not there, or that of a table cannot be told.
        """
        first = next(rows, None)
        if first is None:
            return
        ahead = [first]
        if self.named or self._lacks(first[1]):
            ahead += itertools.islice(rows, SAMPLE - 1)
        self._check_named([row for _, row in ahead])
        self._sample = [_renamed(row, self.named) for _, row in ahead]
        yield from ahead
        yield from rows

    def meant(self, row: Row) -> Row:
        """A row with its columns under the names that formats know. Raises `BadRow` for one that has no such text."""
        meant = _renamed(row, self.named)
        told = self._told(meant)
        if (self.named or told) and self._said != (said := (tuple(row), tuple(told))):
            self._said = said
            self._say({**self.named, **told, **self.named}, row)
        meant = _renamed(meant, told)
        if self.facts.table:
            meant = self._cells(meant)
        return _with_history(meant) if "history" in self.named else meant

    def check(self, fits: Format, row: Row) -> None:
        """Hold a row, as it is meant, against the others of the file. Raises `DataError` if they cannot be told."""
        if fits.name == "winner":
            self._winners.see(row)

    def tell(self, on_note: OnNote | None) -> None:
        """Pass on what was seen of the file since this was asked last."""
        if on_note:
            for text in self.facts.notes:
                on_note(self.source, text)
        self.facts.notes.clear()

    # --- named ------------------------------------------------------------------------------------

    def _check_named(self, sample: Sequence[Row]) -> None:
        header = list(dict.fromkeys(str(name) for row in sample for name in row))
        for role, name in self.named.items():
            if name not in header:
                text = f"there is no column {shown(name)}, which is to be {role}.{nearest(name, header)}"
                known = format_of(sample[0])
                alone = f" Its rows are {known.title} and need no names: convert the other files first."
                raise self._unclear(f"{text} {_listed(header)}{alone if known.name else ''}", header)

    # --- by their words ---------------------------------------------------------------------------

    def _lacks(self, row: Row) -> tuple[str, ...]:
        """What the format that fits a row needs and does not find in its columns."""
        if not self.recognise:
            return ()
        if "prompt" in row and "chosen" in row and "rejected" in row:
            return ()
        fits = format_of(row)
        if self.wanted == "prompts":
            asked = any(row.get(name) is not None for name in ("prompt", "messages"))
            return () if fits.name or asked else ("prompt",)
        if not fits.name:
            if self.wanted == "answers" and is_demonstration(row):
                return ()
            return _NEEDED["pairs"]
        if fits.name not in _WITHOUT_A_SIDE:
            return ()
        if "chosen_response" in row:
            return () if any(name in row for name in ("prompt", "input", "instruction")) else ("prompt",)
        lacking = tuple(side for side in ("chosen", "rejected") if side not in row)
        plain = all(isinstance(row.get(side), str) and not _holds_turns(row[side]) for side in ("chosen", "rejected"))
        without = fits.name == "trl" and row.get("prompt") is None and (plain or bool(lacking))
        return (("prompt",) if without and "prompt" not in row else ()) + lacking

    def _told(self, row: Row) -> dict[str, str]:
        """The columns of a row by what their words say they are; nothing where a format knows them."""
        lacking = self._lacks(row)
        if not lacking:
            return {}
        key = (lacking, *row)
        if key not in self._roles:
            sample = [one for one in self._sample if one.keys() == row.keys()] or [row]
            self._roles[key] = self._by_words(lacking, list(map(str, row)), sample)
        return self._roles[key]

    def _by_words(self, lacking: Sequence[str], header: Sequence[str], sample: Sequence[Row]) -> dict[str, str]:
        """What each column is by its words.

        Raises:
            UnclearColumns: of a table, if that cannot be told, since then it is true of every row.
            BadRow: of other rows, if two readings are possible; one without any is left for its format to refuse.
        """
        goals = (*lacking, "completion") if self.wanted == "answers" else lacking
        said = _candidates(header, (*goals, "system"))
        roles = _sure(said)
        missing = [role for role in self._needed(lacking, roles, header) if role not in roles]
        if missing and self.facts.table and _heads_nothing(header):
            first = ", ".join(shown(name, 40) for name in header[:3])
            raise self._unclear(
                f"its first row seems to be data or a title, not names of columns: {first}. Put a row above it that "
                f"names them, such as {', '.join(_NEEDED[self.wanted])}.",
                header,
            )
        two = next((role for role in goals if len(said.get(role, ())) > 1), None)
        if two in missing:
            named = " and ".join(shown(name, 60) for name in said[str(two)][:3])
            self._refuse(f"{named} could both be {two}.", header, said)
        if missing:
            if not self.facts.table or (lacking == ("prompt",) and self.wanted != "prompts"):
                return {}  # the format says what it misses; answers may hold their prompt, too
            self._refuse(f"no column says that it is {' or '.join(missing)}. {_listed(header)}", header, said)
        doubt = _marked(roles, header, sample) or _about_another(roles, header, sample)
        if doubt:
            self._refuse(doubt, header, said)
        if "chosen" in roles and self.wanted == "answers":
            roles.pop("completion", None)
        return {**roles, **_scores_beside(header, roles)}

    def _needed(self, lacking: Sequence[str], roles: Mapping[str, str], header: Sequence[str]) -> Sequence[str]:
        """What must be there: for answers a pair's or one alone; a prompt in two parts is known to a format."""
        if self.wanted == "answers" and not {"chosen", "rejected"} & roles.keys():
            return _NEEDED["answers"]
        if {"instruction", "input"} <= set(header) or "conversations" in header:
            return [role for role in lacking if role != "prompt"]
        return lacking

    def _refuse(self, problem: str, header: Sequence[str], said: Mapping[str, Sequence[str]]) -> None:
        """Refuse columns that cannot be told, with the line that mends it: what is known of them, and a guess."""
        if len(header) < len(_NEEDED[self.wanted]):
            error = self._unclear(f"{problem} {_TOO_FEW[self.wanted]}, each in its column.", header)
        else:
            line = {role: said.get(role, ["…"])[0] for role in _NEEDED[self.wanted] if role not in header}
            error = self._unclear(f"{problem} Name them: {as_option(line)}.", header, said)
        if self.facts.table:
            raise error
        raise BadRow(str(error).removeprefix(f"{self.source}: ").removesuffix("."), "missing")

    def _unclear(
        self, text: str, header: Sequence[str], said: Mapping[str, Sequence[str]] | None = None
    ) -> UnclearColumns:
        known = _sure(said or {})
        return UnclearColumns(f"{self.source}: {text}", columns=tuple(header), guess=known)

    def _say(self, roles: Mapping[str, str], row: Row) -> None:
        """Note what is read as what, once, and what is not read."""
        told = [f"{shown(name, 60)} as {role}" for role, name in roles.items() if name != role]
        known = {*roles.values(), *COLUMN_NAMES, *_SCORES, *_TEXTS, "tools", "origin", "agreement", "accepted"}
        beside = [shown(name, 60) for name in row if name not in known]
        unread = f"; not read: {', '.join(beside[:_SHOWN])}" if beside else ""
        note = f"read {', '.join(told)}{unread}"
        if told and note not in self._notes:
            self._notes.add(note)
            self.facts.notes.append(note)

    # --- cells ------------------------------------------------------------------------------------

    def _cells(self, row: Row) -> Row:
        """A table's row with its numbers as Python reads them, if no text of it is a spreadsheet's error."""
        changed = {}
        for name, cell in row.items():
            if not isinstance(cell, str):
                continue
            if name in _SCORES:
                changed[name] = without_comma(cell, decimal_comma=self.facts.decimal_comma)
            elif name in _TEXTS and len(cell) < 32 and _ERROR.fullmatch(cell.strip()):
                raise BadRow(f"{name} is an error of the spreadsheet ({cell.strip()})")
        return {**row, **changed}


def _listed(header: Sequence[str]) -> str:
    names = ", ".join(shown(name, 60) for name in header[:_SHOWN])
    more = f" and {len(header) - _SHOWN} more" if len(header) > _SHOWN else ""
    return f"Its columns are {names}{more}."


def _heads_nothing(header: Sequence[str]) -> bool:
    """True for a first row that is data, or a title above a table: half of it or more names nothing."""
    named = [name for name in header if not re.fullmatch(r"column [A-Z]+", name)]
    return len(named) <= len(header) / 2 or sum(map(is_data, named)) >= len(named) / 2


def _candidates(header: Sequence[str], goals: Sequence[str]) -> dict[str, list[str]]:
    """The columns that may be each of some things by their words; one with the very name of it leaves no others."""
    found: dict[str, list[str]] = {}
    certain: dict[str, list[str]] = {}
    for name in header:
        role, how = role_of(name)
        if role in goals:
            (certain if how == CERTAIN else found).setdefault(str(role), []).append(name)
    return {role: certain.get(role) or found[role] for role in goals if role in certain or role in found}


def _sure(said: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Those of them that one column alone may be, and surely is."""
    return {role: names[0] for role, names in said.items() if len(names) == 1 and role_of(names[0])[1] != PERHAPS}


def _scores_beside(header: Sequence[str], roles: Mapping[str, str]) -> dict[str, str]:
    """Columns of scores for both answers, where each side has one."""
    found = _candidates([name for name in header if name not in roles.values()], ("chosen_score", "rejected_score"))
    sure = _sure(found)
    return sure if len(sure) == 2 else {}


def _marked(roles: Mapping[str, str], header: Sequence[str], sample: Sequence[Row]) -> str:
    """Why columns that say they are texts may be none: they hold numbers or marks, and another column holds text."""
    texts = {role: [str(row.get(name) or "").strip() for row in sample] for role, name in roles.items()}
    marks = [role for role, cells in texts.items() if role != "system" and _are_marks(cells, header)]
    beside = _texts_beside(roles, header, sample)
    if not marks or not beside:
        return ""
    named = " and ".join(shown(roles[role], 60) for role in marks)
    texts_in = ", ".join(shown(name, 60) for name in beside[:4])
    return f"{named} may not be meant: there are numbers or marks in it, and text in {texts_in}."


def _about_another(roles: Mapping[str, str], header: Sequence[str], sample: Sequence[Row]) -> str:
    """Why columns that say good and bad alone may be about an answer: another column says that it is one."""
    sides = [roles[side] for side in ("chosen", "rejected") if side in roles]
    others = [name for name in _texts_beside(roles, header, sample) if says_answer(name)]
    if not others or all(map(says_answer, sides)):
        return ""
    named, other = " and ".join(shown(name, 60) for name in sides), shown(others[0], 60)
    return f"{named} may say something about the answer in {other} and be none."


def _texts_beside(roles: Mapping[str, str], header: Sequence[str], sample: Sequence[Row]) -> list[str]:
    """The columns that are not read and hold text."""
    cells = {name: [str(row.get(name) or "").strip() for row in sample] for name in header}
    left = [name for name in header if name not in roles.values()]
    return [name for name in left if any(" " in cell and not is_number(cell) for cell in cells[name])]


def _are_marks(cells: Sequence[str], header: Sequence[str]) -> bool:
    """True if no cell says anything by itself: numbers, single letters, yes and no, or the names of other columns."""
    said = [cell for cell in cells if cell]
    names = {name.casefold() for name in header}
    few = len(said) >= 8 and len(set(said)) <= 3
    return bool(said) and (
        few or all(is_number(cell) or len(cell) <= 3 or cell.casefold() in {*names, "true", "false"} for cell in said)
    )


def _holds_turns(text: str) -> bool:
    try:
        return is_transcript(text) or listed(text) is not None
    except BadRow:
        return True


def _renamed(row: Row, roles: Mapping[str, str]) -> Row:
    """A row with some of its columns under other names; what had such a name before is not read."""
    if not roles:
        return row
    hidden = {*roles, *roles.values()}
    if "prompt" in roles:
        hidden.update(_ASKED_ELSEWHERE)
    return {
        **{name: cell for name, cell in row.items() if name not in hidden},
        **{role: row.get(name) for role, name in roles.items()},
    }


def _with_history(row: Row) -> Row:
    """A row whose prompt begins with the turns of its column `history`."""
    turns = _turns(row.get("history"))
    rest = {name: cell for name, cell in row.items() if name != "history"}
    return {**rest, "prompt": [*turns, *prompt_of(row.get("prompt"))]} if turns else rest


def _turns(value: Any) -> Messages:
    """Earlier turns: messages, a transcript, or `[question, answer]`s as Alpaca writes them."""
    if value is None or value == "":
        return ()
    if is_transcript(value):
        return transcript(value, "history")
    parsed = from_json(value)
    if isinstance(parsed, list) and all(isinstance(two, list) and len(two) == 2 for two in parsed):
        said = [text for two in parsed for text in two]
        if not all(isinstance(text, str) for text in said):
            raise BadRow("history is not a list of [question, answer]")
        roles = itertools.cycle(("user", "assistant"))
        return tuple(message(role, text, "history") for role, text in zip(roles, said, strict=False))
    return conversation(value if parsed is None else parsed, "history")
