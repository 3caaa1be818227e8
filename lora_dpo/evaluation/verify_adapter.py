"""Rescore the pairs that an adapter carries (`adapters/stored_pairs.py`): does it still compute what its maker
measured?
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from lora_dpo.adapters.folder import attach_adapter
from lora_dpo.adapters.loading import load_base_of
from lora_dpo.adapters.passport import read_passport
from lora_dpo.adapters.stored_pairs import STORED_PAIRS, Sides, StoredPairs, read_stored_pairs, save_stored_pairs
from lora_dpo.data import TokenPair
from lora_dpo.data.pairs import evenly_spaced
from lora_dpo.engine.scoring import score_pairs
from lora_dpo.errors import AdapterError
from lora_dpo.model.base import Base
from lora_dpo.quiet import quiet_libraries

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

PAIRS = 8
DRIFT = 0.02
"""Largest accepted mean change in nats a token: bf16 arithmetic on another machine stays below it."""


@dataclass(frozen=True)
class Verification:
    """What rescoring the stored pairs gave; means of |Δ log-probability| in nats a token."""

    pairs: int
    adapter_drift: float
    """Between the adapter's scores then and now."""
    base_drift: float
    """Between the base's scores then and now."""
    effect: float
    """Between base and adapter, then: what the adapter does at all."""
    accuracy: float
    """Share of the stored pairs in which the adapter raises the chosen answer more, now."""
    stored_accuracy: float

    @property
    def ok(self) -> bool:
        """True if the adapter scores as it did: the change is small, and small beside the adapter's effect."""
        return self.adapter_drift <= 1e-4 or self.adapter_drift <= min(DRIFT, self.effect / 5)

    @property
    def reason(self) -> str:
        """One sentence."""
        if self.ok:
            return f"It scores its {self.pairs} stored pairs as it did when it was made."
        if self.base_drift > self.adapter_drift / 2:
            return "The base alone already scores otherwise: another revision, quantisation, dtype or template."
        return "The base scores as it did, the adapter does not: its weights are not the ones that were measured."


def write_stored_pairs(
    folder: Path, model: PeftModel, pairs: Sequence[TokenPair], *, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Score a few of `pairs`, evenly spaced, with the adapter on and off, and store them in the adapter folder."""
    chosen = [pairs[index] for index in evenly_spaced(len(pairs), PAIRS)]
    pad = pad_of(tokenizer)
    policy = score_pairs(model, chosen, pad_id=pad)
    with model.disable_adapter():  # not a reference adapter: who gets the folder may not have that one
        base = score_pairs(model, chosen, pad_id=pad)
    save_stored_pairs(folder, StoredPairs(chosen, policy, base))


def verify(
    adapter: str | Path,
    *,
    model: str | None = None,
    base: Base | None = None,
    on_pair: Callable[[int], None] | None = None,
) -> Verification:
    """Rescore an adapter's stored pairs and compare with the scores that it came with.

    Args:
        model: another place of the same base; by default the one that the passport names.
        base: a base model that is loaded already.

    Raises:
        AdapterError: no adapter there, no stored pairs, or made for another base.
    """
    folder = Path(adapter)
    passport, stored = read_passport(folder), read_stored_pairs(folder)
    if passport is None or stored is None:
        missing = "passport.json" if passport is None else STORED_PAIRS
        raise AdapterError(f"{folder} has no {missing}, so there is nothing to compare with: it stays unverified.")
    if base is None:
        base = load_base_of(folder, model=model)
    check_ids(folder, stored, base)
    policy_model = attach_adapter(base, folder)
    pad = pad_of(base.tokenizer)
    with quiet_libraries():
        policy = score_pairs(policy_model, stored.pairs, pad_id=pad, on_pair=on_pair)
        with policy_model.disable_adapter():
            ref = score_pairs(policy_model, stored.pairs, pad_id=pad)
    return compare(stored, policy, ref)


def check_ids(folder: Path, stored: StoredPairs, base: Base) -> None:
    """Raise `AdapterError` if a stored pair has tokens that the base does not know."""
    size = base.model.get_input_embeddings().weight.shape[0]
    highest = max(max(*pair.prompt, *pair.chosen, *pair.rejected) for pair in stored.pairs)
    if highest >= size:
        raise AdapterError(
            f"{folder / STORED_PAIRS} has the token {highest}; {base.name} knows {size}. Load it on its own base."
        )


def compare(stored: StoredPairs, policy: Sides, ref: Sides) -> Verification:
    """Scores then and now, as means a token."""
    return Verification(
        pairs=len(stored.pairs),
        adapter_drift=_per_token(stored.pairs, stored.policy, policy),
        base_drift=_per_token(stored.pairs, stored.reference, ref),
        effect=_per_token(stored.pairs, stored.policy, stored.reference),
        accuracy=accuracy(policy, ref),
        stored_accuracy=accuracy(stored.policy, stored.reference),
    )


def accuracy(policy: Sides, ref: Sides) -> float:
    """Share of pairs with h(chosen) > h(rejected), h = log π_θ - log π_ref; a tie counts half."""
    margins = [pc - rc - (pr - rr) for pc, pr, rc, rr in zip(*policy, *ref, strict=True)]
    return fmean(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins)


def pad_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills a batch; no score depends on it."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


def _per_token(pairs: Sequence[TokenPair], then: Sides, now: Sides) -> float:
    changes = [abs(a - b) for side in (0, 1) for a, b in zip(then[side], now[side], strict=True)]
    return sum(changes) / sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
