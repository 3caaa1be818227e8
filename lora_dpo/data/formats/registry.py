"""The table of forms: which rows each one fits, and the function that reads them. The first that fits is used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lora_dpo.config.recipe import nearest
from lora_dpo.data.formats import feedback as votes
from lora_dpo.data.formats import published as shapes
from lora_dpo.data.formats.trl import pair_from_row
from lora_dpo.data.messages import is_transcript
from lora_dpo.data.pairs import Origin, PreferencePair, Vote
from lora_dpo.data.rows import Row
from lora_dpo.errors import ConfigError
from lora_dpo.text import shown

Reading = PreferencePair | list[PreferencePair] | Vote


@dataclass(frozen=True)
class Form:
    """One way in which people write preferences."""

    name: str
    """What `--format` takes."""
    title: str
    """What reports say."""
    columns: str
    """The columns by which it is known."""
    fits: Callable[[Row], bool]
    """True for rows of this form; looks at columns and types only."""
    read: Callable[[Row, Origin], Reading]
    """Raises `BadRow`."""


def _has(row: Row, *columns: str) -> bool:
    return all(row.get(column) is not None for column in columns)


def _answers(row: Row) -> bool:
    return "chosen" in row or "rejected" in row


def _is_vote(row: Row) -> bool:
    answered = any(name in row for name in ("completion", "messages", "conversations", "output", "response"))
    return answered and not _answers(row) and any(name in row for name in votes.LABELS)


def _is_hh(row: Row) -> bool:
    if is_transcript(row.get("chosen")) and is_transcript(row.get("rejected")):
        return True
    prompt = row.get("prompt")
    ends = isinstance(prompt, str) and prompt.rstrip().endswith("Assistant:")
    return ends and is_transcript(prompt) and isinstance(row.get("chosen"), str)


FORMS = (
    Form(
        "openwebui",
        "Open WebUI feedback",
        "`data.rating`, `meta.message_id`, `snapshot.chat`",
        lambda row: isinstance(row.get("snapshot"), dict) and isinstance(row.get("data"), dict),
        votes.open_webui,
    ),
    Form(
        "shp",
        "SHP",
        "`history`, `human_ref_A`, `human_ref_B`, `labels`, `score_A`, `score_B`",
        lambda row: "human_ref_A" in row and "human_ref_B" in row,
        shapes.shp,
    ),
    Form(
        "nectar",
        "Nectar ranked answers",
        "`prompt`, `answers` of `{answer, rank}`",
        lambda row: "answers" in row and not _answers(row),
        shapes.nectar,
    ),
    Form(
        "stackexchange",
        "StackExchange paired",
        "`question`, `response_j`, `response_k`",
        lambda row: "response_j" in row and "response_k" in row,
        shapes.stackexchange,
    ),
    Form(
        "ratings",
        "distilabel rated generations",
        "`instruction` or `input`, `system`, `generations`, `ratings`",
        lambda row: "generations" in row and not _answers(row),
        shapes.ratings,
    ),
    Form(
        "sharegpt",
        "LLaMA-Factory ShareGPT ranking",
        "`conversations`, `chosen` and `rejected` of `{from, value}`, `system`, `tools`",
        lambda row: "conversations" in row and _answers(row) and not _has(row, "prompt"),
        shapes.sharegpt,
    ),
    Form(
        "llamafactory-v1",
        "LLaMA-Factory v1 messages",
        "`chosen_messages`, `rejected_messages` with typed content",
        lambda row: "chosen_messages" in row and "rejected_messages" in row,
        shapes.llamafactory_v1,
    ),
    Form(
        "alpaca",
        "Alpaca ranking",
        "`instruction`, `input`, `chosen`, `rejected`, `system`, `history`",
        lambda row: _has(row, "instruction") and _answers(row) and not _has(row, "prompt"),
        shapes.alpaca,
    ),
    Form(
        "orca",
        "Intel Orca pairs",
        "`system`, `question`, `chosen`, `rejected`",
        lambda row: _has(row, "question") and _answers(row) and not _has(row, "prompt"),
        shapes.orca,
    ),
    Form(
        "argilla",
        "Argilla and distilabel pairs",
        "`system`, `input` or `instruction`, `chosen`/`rejected` or `chosen_response`/`rejected_response`",
        lambda row: (_has(row, "input") and _answers(row) and not _has(row, "prompt")) or "chosen_response" in row,
        shapes.argilla,
    ),
    Form(
        "kto",
        "unpaired votes",
        "`prompt` and `completion`, or `messages`, or `instruction` and `output`; `label` or `kto_tag`",
        _is_vote,
        votes.kto,
    ),
    Form(
        "hh-rlhf",
        "HH-RLHF transcripts",
        "`chosen` and `rejected` as `Human:` … `Assistant:` …",
        _is_hh,
        shapes.hh_rlhf,
    ),
    Form(
        "trl",
        "TRL preference pairs",
        "`prompt`, `chosen`, `rejected`: text or messages; scores, `tools`, `origin`",
        _answers,
        pair_from_row,
    ),
)

_UNKNOWN = Form("", "no known form", "", lambda row: True, pair_from_row)
"""Reads as TRL's form does, to say what is missing."""


def form_named(name: str) -> Form:
    """The form of that name. Raises `ConfigError` for another one."""
    for form in FORMS:
        if form.name == name:
            return form
    names = [form.name for form in FORMS]
    raise ConfigError(
        f"{shown(name)} is not a form of preference data: known are {', '.join(names)}.{nearest(name, names)}"
    )


def form_of(row: Row) -> Form:
    """The first form that fits the row."""
    return next((form for form in FORMS if form.fits(row)), _UNKNOWN)
