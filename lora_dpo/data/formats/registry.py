"""The table of formats: which rows each one fits, and the function that reads them. The first that fits is used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lora_dpo.config.reading import nearest
from lora_dpo.data.formats import feedback, published
from lora_dpo.data.formats.trl import pair_from_row
from lora_dpo.data.formats.winner import names_a_winner, winner
from lora_dpo.data.messages import is_transcript
from lora_dpo.data.pairs import Origin, PreferencePair, UnpairedAnswer
from lora_dpo.data.row_reading import Row
from lora_dpo.errors import ConfigError
from lora_dpo.text import shown

Reading = PreferencePair | list[PreferencePair] | UnpairedAnswer


@dataclass(frozen=True)
class Format:
    """One way in which people write preferences."""

    name: str
    """What `--format` takes."""
    title: str
    """What reports say."""
    columns: str
    """The columns by which it is known."""
    fits: Callable[[Row], bool]
    """True for rows of this format; looks at columns and types only."""
    read: Callable[[Row, Origin], Reading]
    """Raises `BadRow`."""


def _has(row: Row, *columns: str) -> bool:
    return all(row.get(column) is not None for column in columns)


def _answers(row: Row) -> bool:
    return "chosen" in row or "rejected" in row


def _is_vote(row: Row) -> bool:
    answered = any(name in row for name in ("completion", "messages", "conversations", "output", "response"))
    return answered and not _answers(row) and any(name in row for name in feedback.LABELS)


def _is_swift(row: Row) -> bool:
    if _answers(row) or not (_has(row, "messages") or _has(row, "response")):
        return False
    ours = "rejected_response" in row and "chosen_response" not in row
    return ours or ("rejected_messages" in row and "chosen_messages" not in row)


def _is_hh(row: Row) -> bool:
    if is_transcript(row.get("chosen")) and is_transcript(row.get("rejected")):
        return True
    prompt = row.get("prompt")
    ends = isinstance(prompt, str) and prompt.rstrip().endswith("Assistant:")
    return ends and is_transcript(prompt) and isinstance(row.get("chosen"), str)


FORMATS = (
    Format(
        "openwebui",
        "Open WebUI feedback",
        "`data.rating`, `meta.message_id`, `snapshot.chat`",
        lambda row: isinstance(row.get("snapshot"), dict) and isinstance(row.get("data"), dict),
        feedback.open_webui,
    ),
    Format(
        "shp",
        "SHP",
        "`history`, `human_ref_A`, `human_ref_B`, `labels`, `score_A`, `score_B`",
        lambda row: "human_ref_A" in row and "human_ref_B" in row,
        published.shp,
    ),
    Format(
        "nectar",
        "Nectar ranked answers",
        "`prompt`, `answers` of `{answer, rank}`",
        lambda row: "answers" in row and not _answers(row),
        published.nectar,
    ),
    Format(
        "stackexchange",
        "StackExchange paired",
        "`question`, `response_j`, `response_k`",
        lambda row: "response_j" in row and "response_k" in row,
        published.stackexchange,
    ),
    Format(
        "ratings",
        "distilabel rated generations",
        "`instruction` or `input`, `system`, `generations`, `ratings`",
        lambda row: "generations" in row and not _answers(row),
        published.ratings,
    ),
    Format(
        "openai",
        "OpenAI preference pairs",
        "`input` of `messages` and `tools`, `preferred_output`, `non_preferred_output`",
        lambda row: "preferred_output" in row or "non_preferred_output" in row,
        published.openai,
    ),
    Format(
        "swift",
        "ms-swift pairs",
        "`messages`, or `query` and `response`; `rejected_response` or `rejected_messages`",
        _is_swift,
        published.swift,
    ),
    Format(
        "axolotl",
        "Axolotl chat pairs",
        "`messages`, `chosen` and `rejected` of a message each",
        lambda row: _has(row, "messages") and _answers(row) and not _has(row, "prompt"),
        published.axolotl,
    ),
    Format(
        "winner",
        "two answers and a winner",
        "`prompt`, `response_a` and `response_b` (also `answer_1`, `conversation_a`, …), `winner` or `preferred`",
        names_a_winner,
        winner,
    ),
    Format(
        "sharegpt",
        "LLaMA-Factory ShareGPT ranking",
        "`conversations`, `chosen` and `rejected` of `{from, value}`, `system`, `tools`",
        lambda row: "conversations" in row and _answers(row) and not _has(row, "prompt"),
        published.sharegpt,
    ),
    Format(
        "llamafactory-v1",
        "LLaMA-Factory v1 messages",
        "`chosen_messages`, `rejected_messages` with typed content",
        lambda row: "chosen_messages" in row and "rejected_messages" in row,
        published.llamafactory_v1,
    ),
    Format(
        "alpaca",
        "Alpaca ranking",
        "`instruction`, `input`, `chosen`, `rejected`, `system`, `history`",
        lambda row: _has(row, "instruction") and _answers(row) and not _has(row, "prompt"),
        published.alpaca,
    ),
    Format(
        "orca",
        "Intel Orca pairs",
        "`system`, `question`, `chosen`, `rejected`",
        lambda row: _has(row, "question") and _answers(row) and not _has(row, "prompt"),
        published.orca,
    ),
    Format(
        "argilla",
        "Argilla and distilabel pairs",
        "`system`, `input` or `instruction`, `chosen`/`rejected` or `chosen_response`/`rejected_response`",
        lambda row: (_has(row, "input") and _answers(row) and not _has(row, "prompt")) or "chosen_response" in row,
        published.argilla,
    ),
    Format(
        "kto",
        "unpaired votes",
        "`prompt` and `completion`, or `messages`, or `instruction` and `output`; `label` or `kto_tag`",
        _is_vote,
        feedback.kto,
    ),
    Format(
        "hh-rlhf",
        "HH-RLHF transcripts",
        "`chosen` and `rejected` as `Human:` … `Assistant:` …",
        _is_hh,
        published.hh_rlhf,
    ),
    Format(
        "trl",
        "TRL preference pairs",
        "`prompt`, `chosen`, `rejected`: text or messages; scores, `tools`, `origin`",
        _answers,
        pair_from_row,
    ),
)

_UNKNOWN = Format("", "no known format", "", lambda row: True, pair_from_row)
"""Reads as TRL's format does, to say what is missing."""


def format_named(name: str) -> Format:
    """The format of that name. Raises `ConfigError` for another one."""
    for format in FORMATS:
        if format.name == name:
            return format
    names = [format.name for format in FORMATS]
    raise ConfigError(
        f"{shown(name)} is not a format of preference data: known are {', '.join(names)}.{nearest(name, names)}"
    )


def format_of(row: Row) -> Format:
    """The first format that fits the row."""
    return next((format for format in FORMATS if format.fits(row)), _UNKNOWN)
