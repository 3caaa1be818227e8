"""Prompts to sample answers to: text, JSONL, or the prompts of preference data."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_dpo.data import Message, Origin
from lora_dpo.data.columns import Columns
from lora_dpo.data.formats.registry import Format, format_named, format_of
from lora_dpo.data.formats.trl import check_prompt
from lora_dpo.data.messages import BadRow, asked_in_transcript, is_transcript, prompt_of, tools_of, with_system
from lora_dpo.data.pairs import evenly_spaced
from lora_dpo.data.row_reading import Row
from lora_dpo.data.rows import files_of, near_file, read_rows
from lora_dpo.errors import ConfigError, DataError
from lora_dpo.text import counted, reasons_text, shown


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends where the assistant is to write."""

    messages: tuple[Message, ...]
    source: str
    """File or hub id."""
    row: int
    """Row in the source, from 1 (the line, in text and JSONL)."""
    accepted: tuple[str, ...] = ()
    """Known answers, for judges that compare with them."""

    @property
    def text(self) -> str:
        """The last message's text: what is asked."""
        return self.messages[-1]["content"]


@dataclass
class PromptReport:
    """The account of one reading of prompts: `kept = rows - sum(left_out)`."""

    rows: int = 0
    """Rows, or lines of a text that are not empty."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Rows that gave no prompt of their own, by reason."""
    notes: list[str] = field(default_factory=list)
    """What a person should know of how files were read."""

    @property
    def kept(self) -> int:
        """Prompts that are left."""
        return self.rows - self.left_out.total()

    def summary(self, source: str) -> str:
        """`2 of 4 rows of p.jsonl; left out: 1 without 'prompt', 1 a repeated prompt`."""
        why = reasons_text(self.left_out.items())
        said = "".join(f"; {note}" for note in self.notes)
        left_out = f"; left out: {why}" if why else ""
        return f"{self.kept:,} of {counted(self.rows, 'row')} of {source}{left_out}{said}"


def read_prompts(
    source: str, *, limit: int | None = None, format: str | None = None, columns: Mapping[str, str] | None = None
) -> list[Prompt]:
    """Read prompts in order, each once.

    - `.txt`: one prompt a line; empty lines are skipped.
    - preference data and votes in any format that training reads: their prompts, also where the answers are unusable.
    - other rows with `prompt` (text or messages) or `messages`, and perhaps `system`.

    Rows come from any file that preference data may have, a folder, or a hub data set. They may have `accepted` (a text
    or a list of them; in a table a list is JSON); rows with the same prompt add theirs up. Rows without a prompt that
    can be asked are left out: `prompts_with_report` says how many.

    Args:
        limit: keep this many prompts, spread evenly over the source.
        format: name of the format of all rows; None looks at each row.
        columns: names of columns by what they are: `{"prompt": "Question", "accepted": "Solution"}`.

    Raises:
        DataError: the source cannot be read or has no prompt, or an `accepted` is no text.
        UnclearColumns: what a table's columns are cannot be told, or one that is named is not there.
        ConfigError: there is no format of that name, or it would change nothing.
    """
    return prompts_with_report(source, limit=limit, format=format, columns=columns)[0]


def prompts_with_report(
    source: str, *, limit: int | None = None, format: str | None = None, columns: Mapping[str, str] | None = None
) -> tuple[list[Prompt], PromptReport]:
    """As `read_prompts`, with an account of every row."""
    report = PromptReport()
    if source.lower().endswith(".txt"):
        if format is not None:
            raise ConfigError(
                f"A format ({format}) changes nothing with {source}: a .txt holds one prompt a line. Remove it."
            )
        if columns:
            raise ConfigError(f"{source} has no columns: a .txt holds one prompt a line. Remove --columns.")
        found = _text_prompts(Path(source))
        report.rows = len(found)
    else:
        found = _row_prompts(source, format_named(format) if format is not None else None, columns, report)
    first: dict[str, Prompt] = {}
    for prompt in found:
        same = first.setdefault(json.dumps(prompt.messages), prompt)
        if same is not prompt:
            known = tuple(dict.fromkeys((*same.accepted, *prompt.accepted)))
            first[json.dumps(prompt.messages)] = replace(same, accepted=known)
            report.left_out["a repeated prompt"] += 1
    unique = list(first.values())
    if not unique:
        raise DataError(f"{source} holds no prompt. Write one prompt a line, or rows with 'prompt'.")
    kept = [unique[index] for index in evenly_spaced(len(unique), limit)] if limit else unique
    if len(kept) < len(unique):
        report.left_out["beyond the limit"] = len(unique) - len(kept)
    return kept, report


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """A hash of what is asked, in order."""
    return hashlib.sha256(json.dumps([prompt.messages for prompt in prompts]).encode()).hexdigest()


def accepted_hash(prompts: Sequence[Prompt]) -> str:
    """A hash of the known answers, in order."""
    return hashlib.sha256(json.dumps([prompt.accepted for prompt in prompts]).encode()).hexdigest()


def _text_prompts(path: Path) -> list[Prompt]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.{near_file(path) or ' Give a file of prompts.'}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    return [
        Prompt((Message(role="user", content=line.strip()),), str(path), number)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def _row_prompts(
    source: str, forced: Format | None, columns: Mapping[str, str] | None, report: PromptReport
) -> list[Prompt]:
    found: list[Prompt] = []
    problem = ""
    for file in files_of(source):
        told = Columns(file, columns, wanted="prompts", recognise=forced is None)
        for number, row in told.over(read_rows(file, facts=told.facts)):
            report.rows += 1
            try:
                meant = told.meant(row)
                messages = _prompt_of(meant, Origin(file, number), forced or format_of(meant))
            except BadRow as bad:
                report.left_out[str(bad)] += 1
                problem = problem or f"{file}, row {number}: {bad}"
            else:
                known = _accepted(meant.get("accepted"), file, number, in_table=told.facts.table)
                found.append(Prompt(messages, file, number, known))
            told.tell(lambda _, text: report.notes.append(text))
    if not found and problem:
        raise DataError(
            f"{source} holds no prompt: {problem}. A prompt is text, or messages that end where an answer is to follow."
        )
    return found


ASKED = ("system", "system_prompt", "instruction", "input", "question", "history", "conversations")
"""Columns in which formats with a column of their own for the question keep what is asked."""
ASKED_APART = ("alpaca", "argilla", "orca", "sharegpt")
"""The formats whose prompt does not depend on the answers."""


_TOOLS = "it has tools, which are not offered to the model while sampling: remove the column 'tools'"


def _prompt_of(row: Row, origin: Origin, format: Format) -> tuple[Message, ...]:
    """The prompt of a row, as the reader of its format makes it; else of its column `prompt` or `messages`.

    Raises:
        BadRow: there is none, or it cannot be asked.
    """
    if tools_of(row):
        raise BadRow(_TOOLS)
    value = row.get("prompt") if row.get("prompt") is not None else row.get("messages")
    if format.name:
        try:
            return _prompt_of_format(format, row, origin)
        except BadRow:
            if format.name in ASKED_APART:  # answers that are missing, empty or the same do not matter here
                asked = {name: row[name] for name in ASKED if name in row}
                return _prompt_of_format(format, {**asked, "chosen": "1", "rejected": "2"}, origin)
            if value is None:
                raise
    if value is None:
        raise BadRow("without 'prompt'", "missing")
    messages = asked_in_transcript(value) if is_transcript(value) else prompt_of(value)
    messages = with_system(row, messages, "system", "system_prompt")
    check_prompt(messages)
    return messages


def _prompt_of_format(format: Format, row: Row, origin: Origin) -> tuple[Message, ...]:
    made = format.read(row, origin)
    first = made[0] if isinstance(made, list) else made  # several pairs of one row follow one prompt
    if first.tools:
        raise BadRow(_TOOLS)
    return first.prompt


def _accepted(value: Any, source: str, number: int, *, in_table: bool) -> tuple[str, ...]:
    """Known answers of a row. The cell of a table is always text, so one that stands in brackets is a list as JSON."""
    where = f"{source}, row {number}: 'accepted' must be a text or a list of texts"
    if isinstance(value, str) and in_table:
        cell = value.strip()
        if cell.startswith("[") and cell.endswith("]"):
            try:
                value = json.loads(cell)
            except ValueError:
                raise DataError(
                    f'{where}, in a table a list as JSON, such as ["4", "four"]; it is {shown(cell[:60])}.'
                ) from None
        elif not cell:
            value = None
    listed = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, str | int | float) and not isinstance(item, bool) for item in listed):
        raise DataError(f"{where}; it is {shown(value)}.")
    return tuple(map(str, listed))
