"""The part of a run's page about its own training pairs: which stay wrong, cost most, and disagree with the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_dpo.adapters.stored_margins import PairMargin, read_margins
from lora_dpo.adapters.stored_run import StoredRun
from lora_dpo.data import PreferencePair
from lora_dpo.data.pairs import pair_mark
from lora_dpo.data.read import outcomes
from lora_dpo.data.rows import file_of
from lora_dpo.errors import LoraDPOError
from lora_dpo.evaluation.report import parts
from lora_dpo.evaluation.suspicion import by_suspicion, doubt_of, loss_of
from lora_dpo.text import counted

SHOWN = 20
"""Pairs that are shown side by side."""
LISTED = 40
"""Rows that are named."""
CUT = 1200
"""Characters of a text on the page."""


def disagreeing(run: StoredRun) -> Iterator[str]:
    """What the run made of its training pairs; nothing where it kept no margins.

    Raises:
        AdapterError: the file of margins cannot be read.
    """
    margins = read_margins(run.folder)
    seen = [one for one in margins if one.after is not None]
    if not seen:
        return
    costs = _costs(seen, run.beta)
    yield parts.paragraph(_in_words(margins, seen, costs))
    yield parts.table(
        ("costs most", "margin before (nats)", "margin after (nats)", "share of the loss"),
        [(str(one.origin), _nats(one.before), _nats(one.after), f"{share:.1%}") for one, share in costs[:LISTED]],
    )
    if len(costs) > LISTED:
        yield parts.paragraph(f"{len(costs) - LISTED:,} more are not listed.")
    wanted = by_suspicion(seen)[:SHOWN]
    texts = _texts(run.recipe, wanted)
    yield parts.paragraph(
        f"The {len(wanted)} most suspicious pairs: those that the policy orders against their label by most. A hard or "
        "rare pair looks like a wrong label from here; lora-dpo data check FILE --learned ADAPTER lists all."
    )
    shown = [(one, texts[one.mark]) for one in wanted if one.mark in texts]
    yield parts.answers(("pair", "chosen", "rejected"), [_row(one, pair, run.beta) for one, pair in shown])
    if hidden := len(wanted) - len(shown):
        yield parts.paragraph(
            f"The texts of {counted(hidden, 'pair')} are not shown: the data is not here any more as it was trained on."
        )


def _costs(seen: Sequence[PairMargin], beta: float) -> list[tuple[PairMargin, float]]:
    """Pairs with their shares of the loss, the largest first: those that are wrong, and those above twice the mean."""
    losses = [loss_of(one.after or 0.0, beta) for one in seen]
    total = sum(losses)
    ordered = sorted(zip(seen, losses, strict=True), key=lambda each: -each[1])
    costly = [each for each in ordered if (each[0].after or 0.0) < 0 or each[1] * len(seen) > 2 * total]
    return [(one, loss / (total or 1.0)) for one, loss in costly]


def _in_words(
    margins: Sequence[PairMargin], seen: Sequence[PairMargin], costs: Sequence[tuple[PairMargin, float]]
) -> str:
    wrong = sum((one.after or 0.0) < 0 for one in seen)
    which = f"{wrong:,} of {counted(len(seen), 'training pair')}"
    text = f"When they were seen last, {which} were ordered against their label"
    if costs:
        share = sum(share for _, share in costs)
        text += f"; the {len(costs):,} that are wrong or cost most had {share:.0%} of the loss"
    if missing := len(margins) - len(seen):
        text += f". {counted(missing, 'other')} had no margin: not seen, or only before the first update"
    return f"{text}."


def _nats(value: float | None) -> str:
    return "" if value is None else f"{value:+.1f}"


def _row(one: PairMargin, pair: PreferencePair, beta: float) -> tuple[str, str, str]:
    about = f"{pair.origin} · {doubt_of(one.mean or 0.0, beta):.0%} against its label"
    return f"{about}\n{_said(pair.prompt[-1:])}", _said(pair.chosen), _said(pair.rejected)


def _said(messages: Sequence[Mapping[str, Any]]) -> str:
    text = "\n".join(said["content"] for said in messages)
    return text if len(text) <= CUT else f"{text[: CUT - 1]}…"


def _texts(recipe: Mapping[str, Any], wanted: Sequence[PairMargin]) -> dict[str, PreferencePair]:
    """The pairs of some margins by their marks, as far as files of this machine still hold them."""
    files = [file for file in dict.fromkeys(one.origin.source for one in wanted) if file_of(file).is_file()]
    left = {one.mark for one in wanted}
    found: dict[str, PreferencePair] = {}
    try:
        for outcome in outcomes(files, tolerant=True, **_how_read(recipe)) if files else ():
            for pair in outcome.pairs:
                if (mark := pair_mark(pair)) in left:
                    found.setdefault(mark, pair)
            if len(found) == len(left):
                break
    except (LoraDPOError, OSError):
        pass  # a file that is none any more: what was found before it is shown
    return found


def _how_read(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """How a recipe reads its data; what is none of that, in a recipe from elsewhere, is left out."""
    data = recipe.get("data")
    data = data if isinstance(data, Mapping) else {}
    columns = data.get("columns")
    named = isinstance(columns, Mapping) and all(isinstance(text, str) for pair in columns.items() for text in pair)
    return {
        "format": data.get("format") if isinstance(data.get("format"), str) else None,
        "columns": dict(columns) if named and columns else None,
    }
