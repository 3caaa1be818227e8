"""Adapters on one model put together, and what a mixture keeps of each parent: their held-out pairs, scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from lora_dpo.adapters.stored_pairs import MAX_PAIRS, Sides, StoredPairs, read_stored_pairs
from lora_dpo.data import TokenPair
from lora_dpo.data.pairs import evenly_spaced
from lora_dpo.engine.scoring import score_pairs
from lora_dpo.errors import AdapterError
from lora_dpo.evaluation.verify_adapter import accuracy, pad_of
from lora_dpo.model.base import Base
from lora_dpo.text import plain

MIX = "mix"
OnStage = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Score:
    """Over one parent's stored pairs: reward accuracy, and the mean of h(chosen) - h(rejected) in nats."""

    accuracy: float
    margin: float


def pairs_of_parents(folders: Sequence[Path]) -> dict[str, list[TokenPair]]:
    """Each parent's stored pairs by its name; parents of one name count up."""
    found: dict[str, list[TokenPair]] = {}
    for folder in folders:
        stored = read_stored_pairs(folder)
        if stored:
            found[free_key(folder.name, found)] = stored.pairs
    return found


def score_mixture(
    policy: Any,
    base: Base,
    pairs: dict[str, list[TokenPair]],
    names: list[str],
    folders: Sequence[Path],
    tick: OnStage,
) -> tuple[dict[str, dict[str, Score]], StoredPairs | None]:
    """Every parent and the mix on every parent's pairs; the mix's scores become its own stored pairs."""
    scores: dict[str, dict[str, Score]] = {}
    labels: dict[str, Any] = {}
    for name, folder in zip(names, folders, strict=True):
        labels[free_key(folder.name, labels)] = name
    labels[MIX] = MIX
    kept: list[tuple[TokenPair, list[float], list[float]]] = []
    steps, done = len(pairs) * (len(labels) + 1), 0
    for of, some in pairs.items():
        with policy.disable_adapter():
            ref = _sides(policy, base, some)
        scores[of] = {}
        for label, name in labels.items():
            policy.set_adapter(name)
            sides = _sides(policy, base, some)
            scores[of][label] = _of(sides, ref)
            done += 1
            tick("scoring", done + len(scores), steps)
        kept += [(p, [sides[0][i], sides[1][i]], [ref[0][i], ref[1][i]]) for i, p in enumerate(some)]
    if not kept:
        return scores, None
    kept = [kept[index] for index in evenly_spaced(len(kept), MAX_PAIRS)]
    policy_sides = [row[1] for row in kept], [row[2] for row in kept]
    own, reference = (([row[0] for row in part], [row[1] for row in part]) for part in policy_sides)
    return scores, StoredPairs([row[0] for row in kept], own, reference)


def sweep_weights(
    policy: Any,
    base: Base,
    pairs: dict[str, list[TokenPair]],
    names: list[str],
    count: int,
    tick: OnStage,
    options: dict[str, Any],
) -> dict[float, dict[str, Score]]:
    """The scores of mixtures with other shares of the first adapter."""
    found: dict[float, dict[str, Score]] = {}
    refs = {}
    with policy.disable_adapter():
        refs = {of: _sides(policy, base, some) for of, some in pairs.items()}
    final = {name: parameter.detach().clone() for name, parameter in policy.named_parameters() if f".{MIX}." in name}
    for number in range(count):
        weight = number / (count - 1)
        combine(policy, names, [weight, 1 - weight], **options)
        found[weight] = {of: _of(_sides(policy, base, some), refs[of]) for of, some in pairs.items()}
        tick("sweep", number + 1, count)
    for name, parameter in policy.named_parameters():
        if name in final:
            parameter.data = final[name]
    return found


def _sides(policy: Any, base: Base, pairs: Sequence[TokenPair]) -> Sides:
    return score_pairs(policy, pairs, pad_id=pad_of(base.tokenizer))


def _of(policy: Sides, ref: Sides) -> Score:
    margins = [pc - rc - (pr - rr) for pc, pr, rc, rr in zip(*policy, *ref, strict=True)]
    return Score(accuracy(policy, ref), fmean(margins))


def combine(
    policy: Any,
    names: list[str],
    weights: list[float],
    *,
    method: str,
    rank: int | None,
    density: float | None,
    seed: int,
) -> None:
    """Put the mixture of adapters that are on the model beside them."""
    import torch

    if MIX in policy.peft_config:
        policy.delete_adapter(MIX)
    if len(names) == 1 and method == "svd":
        # peft takes one adapter for linear, whatever the method: twice, with half the weight each, it is the same sum
        names, weights = names * 2, [weights[0] / 2] * 2
    torch.manual_seed(seed)
    more = {"density": density} if density is not None else {}
    policy.add_weighted_adapter(
        names, weights, MIX, combination_type=method, svd_rank=rank, svd_full_matrices=False, **more
    )
    policy.set_adapter(MIX)


@contextmanager
def mix_errors(method: str) -> Iterator[None]:
    """What peft does not put together, such as targets by name and by pattern, as one `AdapterError`."""
    try:
        yield
    except (ValueError, IndexError, KeyError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise AdapterError(
            f"These adapters cannot be mixed with --method {method}: {plain(reason, 300)} Merge one of them into the "
            "base instead."
        ) from error


def free_key(name: str, taken: dict[str, Any]) -> str:
    """A name that is not taken: of two parents with one name, the second is numbered."""
    return name if name not in taken else f"{name} ({sum(key.startswith(name) for key in taken) + 1})"
