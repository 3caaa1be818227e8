"""Single answers, good or bad, for methods that need no pairs: votes, the two halves of pairs, demonstrations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_dpo.config.template_kwargs import NO_KWARGS, TemplateKwargs
from lora_dpo.data.columns import Columns, OnNote
from lora_dpo.data.formats.published import is_demonstration, prompt_and_answer
from lora_dpo.data.formats.registry import Format, format_named, format_of
from lora_dpo.data.formats.trl import check_answer, check_prompt
from lora_dpo.data.messages import BadRow, tools_of
from lora_dpo.data.pairs import Dropped, Origin, PreferencePair, ReadReport, UnpairedAnswer
from lora_dpo.data.read import Outcome, all_files, gather, left_out
from lora_dpo.data.row_reading import Row
from lora_dpo.data.rows import read_rows
from lora_dpo.data.tokenize import TokenPair, tokenize_row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEMONSTRATIONS = "demonstrations"
"""Name of the one format that only SFT can read: answers without any judgement."""


@dataclass(frozen=True)
class TokenAnswer:
    """One answer as ids; the model reads `prompt + answer` and is trained on the answer."""

    prompt: list[int]
    answer: list[int]
    up: bool
    origin: Origin
    truncated: bool
    """True if `max_length` cut the answer, so its end-of-turn token is gone."""
    left_out: bool = False
    other_start: bool = False
    """Both as in `TokenPair`."""


def read_answers(
    sources: str | Sequence[str],
    *,
    good_only: bool,
    on_bad_row: str = "drop",
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> tuple[list[UnpairedAnswer], ReadReport]:
    """Read single answers from files, folders or hub data sets, in order.

    A preference pair is two answers, the chosen one up and the rejected one down.

    Args:
        sources: one path or hub id, or several.
        good_only: keep what should be imitated alone: chosen answers, thumbs up, and demonstrations (rows with a
            prompt and an answer, or whole conversations, that nobody judged). Else demonstrations are no usable rows.
        on_bad_row: "drop" leaves unusable rows out and counts them by reason; "error" raises at the first.
        format: name of the format of all rows; None looks at each row.
        columns: names of columns by what they are, as for `read_pairs`; also `completion` and `label`.

    Raises:
        DataError: a source cannot be read, or no row of it is usable.
        UnclearColumns: what a table's columns are cannot be told, or one that is named is not there.
        ConfigError: there is no format of that name.
    """
    return gather(
        sources,
        lambda named, on_note: _outcomes(named, on_note, good_only=good_only, format=format, columns=columns),
        on_bad_row=on_bad_row,
        nothing="holds no usable answer: {why}. What is read: lora-dpo docs methods",
    )


def _outcomes(
    sources: Sequence[str],
    on_note: OnNote,
    *,
    good_only: bool,
    format: str | None,
    columns: Mapping[str, str] | None,
) -> Iterator[Outcome[UnpairedAnswer]]:
    """What each row of the sources became: its answers, or a reason."""
    forced = format_named(format) if format not in (None, DEMONSTRATIONS) else None
    for file in all_files(sources):
        told = Columns(file, columns, wanted="answers", recognise=forced is None)
        for number, row in told.over(read_rows(file, facts=told.facts)):
            origin, meant = Origin(file, number), row
            try:
                meant = told.meant(row)
                told.check(forced or format_of(meant), meant)
                answers = _answers_of(meant, origin, forced, format, good_only)
            except BadRow as bad:
                outcome = left_out(origin, bad, _title_of(meant, forced, format), row)
            else:
                outcome = Outcome(((origin, row),), tuple(answers), title=_title_of(meant, forced, format))
            told.tell(on_note)
            yield outcome


def _answers_of(
    row: Row, origin: Origin, forced: Format | None, format: str | None, good_only: bool
) -> list[UnpairedAnswer]:
    """The answers of a row. Raises `BadRow`."""
    if _title_of(row, forced, format) == DEMONSTRATIONS:
        return _shown(row, origin, good_only)
    return _judged(forced or format_of(row), row, origin, good_only)


def _title_of(row: Row, forced: Format | None, format: str | None) -> str:
    fits = forced or format_of(row)
    shown = format == DEMONSTRATIONS or (format is None and not fits.name and is_demonstration(row))
    return DEMONSTRATIONS if shown else fits.title


def _shown(row: Row, origin: Origin, good_only: bool) -> list[UnpairedAnswer]:
    """The answer of a demonstration. Raises `BadRow`."""
    if not good_only:
        raise BadRow("an answer that nobody judged, and this method needs good and bad ones", "vote")
    return [_demonstration(row, origin)]


def _judged(format: Format, row: Row, origin: Origin, good_only: bool) -> list[UnpairedAnswer]:
    """The answers of a pair or a vote. Raises `BadRow`."""
    made = format.read(row, origin)
    read = [made] if isinstance(made, UnpairedAnswer) else list(_halves(made if isinstance(made, list) else [made]))
    kept = [vote for vote in read if vote.up or not good_only]
    if not kept:
        raise BadRow("a thumb down, and this method learns from good answers alone", "vote")
    return kept


def _halves(pairs: Sequence[PreferencePair]) -> Iterator[UnpairedAnswer]:
    """Both answers of each pair; several pairs of one row share answers, and each is one answer only."""
    seen: list[tuple[Any, bool]] = []
    for pair in pairs:
        for answer, up in ((pair.chosen, True), (pair.rejected, False)):
            if (answer, up) not in seen:
                seen.append((answer, up))
                yield UnpairedAnswer(pair.prompt, answer, up, pair.origin, pair.tools)


def _demonstration(row: Row, origin: Origin) -> UnpairedAnswer:
    """`prompt` and `completion`; `instruction`, `input`, `output`; or a conversation, of which the last turn counts."""
    prompt, answer = prompt_and_answer(row)
    check_prompt(prompt)
    check_answer(answer, "shown")
    return UnpairedAnswer(prompt, answer, True, origin, tools_of(row))


def tokenize_answers(
    tokenizer: PreTrainedTokenizerBase,
    votes: Sequence[UnpairedAnswer],
    *,
    max_length: int | None,
    chat_template_kwargs: TemplateKwargs = NO_KWARGS,
    on_answer: Callable[[int], None] | None = None,
) -> tuple[list[TokenAnswer], list[Dropped]]:
    """Tokenise through the chat template, exactly as one side of a pair; drop what `max_length` leaves no answer of.

    Args:
        max_length: longest sequence (prompt and answer) in tokens; answers are cut at their end.
        chat_template_kwargs: keywords for the chat template.
        on_answer: called with the number of answers done so far.

    Raises:
        ModelError: the tokenizer has no chat template, or it refuses a row, which is named.
    """
    kept: list[TokenAnswer] = []
    dropped: list[Dropped] = []
    for done, vote in enumerate(votes, start=1):
        tokens = tokenize_row(
            tokenizer, vote.doubled(), max_length=max_length, chat_template_kwargs=chat_template_kwargs
        )
        if tokens.chosen:
            flags = tokens.truncated, tokens.left_out, tokens.other_start
            kept.append(TokenAnswer(tokens.prompt, tokens.chosen, vote.up, vote.origin, *flags))
        else:
            dropped.append(Dropped(vote.origin, f"prompt fills max_length ({max_length} tokens)"))
        if on_answer:
            on_answer(done)
    return kept, dropped


def crossed(answers: Sequence[TokenAnswer]) -> list[TokenPair]:
    """Pairs for an adapter to be checked with later: each good answer beside the next prompt's good one.

    Data without pairs has no rejected answers; an answer to another question is a worse one.
    """
    good = [one for one in answers if one.up]
    return [
        TokenPair(one.prompt, one.answer, other.answer, one.origin, one.truncated or other.truncated)
        for one, other in zip(good, [*good[1:], *good[:1]], strict=True)
    ]
