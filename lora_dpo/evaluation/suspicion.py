"""Which pairs disagree with the rest: those that a policy trained on all of them does not order as their labels say.

A few wrong labels cannot teach their rule against many right ones, so a policy that learnt from all of them orders the
wrong ones the other way round. DPO's own model of a preference (Rafailov et al. 2023, arXiv 2305.18290, section 4)
says how sure it is: p(chosen is better) = σ(β · margin), margin = h(chosen) - h(rejected), h = log π_θ - log π_ref.
To look first at labels that a model gives little probability is confident learning's order (Northcutt et al. 2021,
arXiv 1911.00068: "self-confidence"), to take the mean over the passes of a training that of dataset cartography
(Swayamdipta et al. 2020, arXiv 2009.10795).

A hard pair, a rare kind of question and a wrong label look alike from here: this is a list to look through.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dpo.adapters.adapter import open_adapter
from lora_dpo.adapters.loading import LoadedModel, attach_reference, beta_of, load_policy
from lora_dpo.adapters.stored_margins import PairMargin, read_margins
from lora_dpo.config.reading import read_recipe
from lora_dpo.data import Dropped, PreferencePair, TokenPair, read_pairs, tokenize_pairs
from lora_dpo.data.pairs import pair_mark
from lora_dpo.data.row_reading import Row
from lora_dpo.data.write import canonical_row
from lora_dpo.engine.scoring import score_pairs
from lora_dpo.evaluation.verify_adapter import pad_of
from lora_dpo.events import OnEvent, Progress
from lora_dpo.model.lora import reference
from lora_dpo.quiet import quiet_libraries

MAX_LENGTH = 1024
"""Tokens of a sequence where an adapter's recipe does not say it: TRL's default."""


@dataclass(frozen=True)
class Suspect:
    """A pair, and what a trained policy says of its label."""

    pair: PreferencePair
    margin: float
    """What pairs are ordered by, in nats: below 0 the policy orders the two answers the other way round."""
    doubt: float
    """σ(-β · margin): the probability, by the policy's own model of preferences, that the rejected answer is better."""
    before: float | None = None
    """The margin before the run had learnt from the pair, where the run's own are known."""
    after: float | None = None
    """The margin at the pair's last time in the run, or as it was scored now."""

    def numbers(self) -> dict[str, float | None]:
        """The doubt, and the margins in nats."""
        nats = {"margin": self.margin, "before": self.before, "after": self.after}
        return {"doubt": round(self.doubt, 4), **{k: None if v is None else round(v, 3) for k, v in nats.items()}}


@dataclass(frozen=True)
class Suspects:
    """The pairs of some data, those first that disagree most with the rest."""

    pairs: tuple[Suspect, ...]
    scored: bool
    """True if the pairs were scored now with the adapter; False if the margins are those that its run kept."""
    dropped: tuple[Dropped, ...] = ()
    """Pairs without a margin: too long, or the same once written for the model."""

    @property
    def against(self) -> int:
        """Pairs that the policy orders the other way round."""
        return sum(one.margin < 0 for one in self.pairs)

    def reasons(self) -> list[tuple[str, int]]:
        """Why pairs have no margin, with counts, the most frequent first."""
        return Counter(one.reason for one in self.dropped).most_common()

    def as_json(self) -> dict[str, Any]:
        """Everything but the texts, as plain values."""
        return {
            "margins": "scored now" if self.scored else "kept by the run",
            "against": self.against,
            "without_margin": [{"row": str(one.origin), "reason": one.reason} for one in self.dropped],
            "pairs": [{"row": str(one.pair.origin), **one.numbers()} for one in self.pairs],
        }


def doubt_of(margin: float, beta: float) -> float:
    """σ(-β · margin), the probability that the rejected answer is the better one; `margin` in nats."""
    return 0.5 * (1 - math.tanh(beta * margin / 2))


def loss_of(margin: float, beta: float) -> float:
    """-log σ(β · margin) in nats, DPO's sigmoid loss of one pair (Rafailov et al. 2023, equation 7)."""
    return max(0.0, -beta * margin) + math.log1p(math.exp(-abs(beta * margin)))


def by_suspicion(margins: Sequence[PairMargin]) -> list[PairMargin]:
    """The pairs of a run that have a margin, the most suspicious first; ties stay in the order of the data."""
    return sorted((one for one in margins if one.mean is not None), key=lambda one: one.mean or 0.0)


def suspicious_pairs(
    sources: str | Sequence[str],
    adapter: str | Path,
    *,
    format: str | None = None,
    min_gap: float | None = None,
    columns: Mapping[str, str] | None = None,
    load: Callable[[], LoadedModel] | None = None,
    on_event: OnEvent | None = None,
) -> Suspects:
    """Order preference pairs by how much they disagree with what an adapter has learnt.

    Where the adapter's run kept a margin of every pair, which is told by what the pairs say and not by their places,
    nothing is loaded. Otherwise all of them are scored with the adapter and with its reference: margins of a run that
    has only begun to learn and margins of its end cannot be compared.

    Args:
        sources: files, folders or hub data sets, with `format`, `min_gap` and `columns` as for `read_pairs`.
        adapter: its folder.
        load: gives the adapter on its base, and is called where pairs must be scored; by default `load_policy`.
        on_event: receives the progress of scoring.

    Raises:
        DataError: no usable pair in a source.
        AdapterError: no adapter there, or its base or reference is not what it was.
        ModelError: the base cannot be loaded.
    """
    folder = Path(adapter)
    open_adapter(folder)
    pairs, _ = read_pairs(sources, format=format, min_gap=min_gap, columns=columns)
    kept = {one.mark: one for one in read_margins(folder)}
    beta = beta_of(folder)
    known = [kept.get(pair_mark(pair)) for pair in pairs]
    if all(one is not None and one.mean is not None for one in known):
        found = [_suspect(pair, one, beta) for pair, one in zip(pairs, known, strict=True) if one is not None]
        return Suspects(tuple(sorted(found, key=lambda one: one.margin)), scored=False)
    loaded = load() if load is not None else load_policy(adapter=folder)
    return _scored(loaded, folder, pairs, kept, beta, on_event or (lambda event: None))


def _suspect(pair: PreferencePair, margin: PairMargin, beta: float) -> Suspect:
    value = margin.mean or 0.0
    return Suspect(pair, value, doubt_of(value, beta), margin.before, margin.after)


def _scored(
    loaded: LoadedModel,
    folder: Path,
    pairs: Sequence[PreferencePair],
    kept: Mapping[str, PairMargin],
    beta: float,
    emit: OnEvent,
) -> Suspects:
    def tick(stage: str, total: int) -> Callable[[int], None]:
        emit(Progress(stage, 0, total))
        return lambda done: emit(Progress(stage, min(done, total), total))

    tokenizer = loaded.base.tokenizer
    with quiet_libraries():
        attach_reference(loaded)
        tokens, dropped = tokenize_pairs(
            tokenizer, pairs, max_length=_max_length(folder), chat_template_kwargs=loaded.chat_template_kwargs
        )
        pad = pad_of(tokenizer)
        ours = score_pairs(loaded.model, tokens, pad_id=pad, on_pair=tick("pairs, adapter", len(tokens)))
        with reference(loaded.model):
            theirs = score_pairs(loaded.model, tokens, pad_id=pad, on_pair=tick("pairs, reference", len(tokens)))
    found = []
    for pair, one, c, r, rc, rr in zip(_of_tokens(pairs, tokens), tokens, *ours, *theirs, strict=True):
        margin = c - rc - (r - rr)
        before = kept[one.mark].before if one.mark in kept else None
        found.append(Suspect(pair, margin, doubt_of(margin, beta), before, margin))
    return Suspects(tuple(sorted(found, key=lambda one: one.margin)), scored=True, dropped=tuple(dropped))


def _of_tokens(pairs: Sequence[PreferencePair], tokens: Sequence[TokenPair]) -> Iterator[PreferencePair]:
    """The pairs that were not dropped: one row of a file may hold several, and some of them may stay."""
    rest = iter(pairs)
    for one in tokens:
        yield next(pair for pair in rest if (pair.origin, pair_mark(pair)) == (one.origin, one.mark))


def _max_length(folder: Path) -> int:
    """Tokens of a sequence, as the run of an adapter cut them."""
    path = folder / "recipe.yaml"
    found = read_recipe(path).trainer.get("max_length") if path.is_file() else None
    return found if isinstance(found, int) else MAX_LENGTH


def ordered_rows(found: Suspects) -> Iterator[Row]:
    """The pairs as rows in the canonical format, the most suspicious first, with a column `learned` about each.

    The column says where the pair stands in the data (`file` and `row`), its `margin`, `before` and `after` in nats,
    and the `doubt` about its label; whatever reads the rows as pairs takes no notice of it.
    """
    for one in found.pairs:
        place = {"file": one.pair.origin.source, "row": one.pair.origin.row}
        yield {**canonical_row(one.pair), "learned": {**place, **one.numbers()}}
