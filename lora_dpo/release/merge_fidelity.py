"""How far a merged model is from the live adapter, token by token, on pairs that it was not trained on.

Shape suffixes: A answer tokens, V vocabulary. One model is in memory at a time: the live one's distributions wait
on disk.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dpo.adapters.adapter import open_adapter
from lora_dpo.adapters.base_search import base_of
from lora_dpo.adapters.folder import attach_adapter
from lora_dpo.adapters.loading import load_base_of
from lora_dpo.adapters.stored_pairs import STORED_PAIRS, Sides, read_stored_pairs
from lora_dpo.data import TokenPair, read_pairs, tokenize_pairs
from lora_dpo.data.pairs import evenly_spaced
from lora_dpo.errors import AdapterError, DataError
from lora_dpo.evaluation.verify_adapter import accuracy
from lora_dpo.files import disk_errors, replace_file
from lora_dpo.leftovers import temporary_folder
from lora_dpo.model.base import load_lock, load_tokenizer
from lora_dpo.model.decoding import Sampling, decode, stop_token_ids
from lora_dpo.quiet import quiet_libraries

if TYPE_CHECKING:
    import torch

REPORT = "fidelity.json"
PROMPTS, ANSWER = 3, 48
"""Prompts that both models answer greedily, and the tokens of an answer."""
MAX_STORED = 4 << 30
"""Bytes of the live model's distributions that wait on disk."""
CLOSE_DELTA, CLOSE_TOP1 = 0.1, 0.95
"""What still counts as the adapter that was measured, though on another base: probabilities of tokens within about a
tenth (e^0.1), and the same next token at 19 of 20 places. Reward accuracy alone cannot say so: it is over few pairs,
and a model can rank pairs as before and write other answers."""

OnStage = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Fidelity:
    """A merged model held against the live adapter. Log-probabilities in nats."""

    into: str
    dtype: str
    pairs: int
    tokens: int
    mean_delta: float
    """Mean |Δ log-probability| of the answers' tokens."""
    max_delta: float
    kl: float
    """Mean KL(live ‖ merged) of the next-token distributions."""
    top1: float
    """Share of tokens at which both would choose the same next one."""
    live_accuracy: float
    """Reward accuracy of the live adapter over the pairs, against the base it was trained on."""
    accuracy: float
    """The merged model's, against the base that it was merged into."""
    same_answers: int
    answers: int
    given: int = 0
    """Pairs that there were to compare on; `pairs` of them, evenly spaced, fit on the disk."""
    quantize: str = "nf4"
    """How the live adapter's base is held."""


def fidelity(
    adapter: str | Path,
    merged: Mapping[str, Path],
    *,
    model: str | None = None,
    pairs: str | Path | None = None,
    on_stage: OnStage | None = None,
) -> list[Fidelity]:
    """Compare merged folders with the live adapter, and write `fidelity.json` into each.

    Args:
        merged: folders by what was merged into (`base16`, `trained-base`).
        model: another place of the base.
        pairs: preference pairs to compare on; by default those that the adapter carries.

    Raises:
        AdapterError: the adapter carries no pairs and none are given.
        DataError: the pairs cannot be read, or none of them can be used.
        OutputError: the disk is full.
    """
    from transformers import AutoModelForCausalLM

    adapter = Path(adapter)
    tick = on_stage or (lambda stage, done, total: None)
    with quiet_libraries(), _waiting_room(merged) as scratch:
        base = load_base_of(adapter, model=model)
        given = _pairs(adapter, pairs, base.tokenizer)
        held = thinned(given, base.model.config.get_text_config().vocab_size)
        prompts = [held[index].prompt for index in range(min(PROMPTS, len(held)))]
        live = attach_adapter(base, adapter)
        policy = _store(live, held, scratch, lambda n: tick("live adapter", n, len(held)))
        with live.disable_adapter():
            ref = _sums(live, held)
        stops = stop_token_ids(base.model, base.tokenizer)
        answers = _answers(live, prompts, stops)
        dtype: Any = base.dtype
        device, quantize = base.device, base.quantize
        del live, base
        gc.collect()
        refs = {"trained-base": ref, "base16": ref}
        if "base16" in merged and quantize != "none":
            plain = load_base_of(adapter, model=model, quantize="none", dtype=dtype)
            refs["base16"] = _sums(plain.model, held)
            del plain
            gc.collect()
        found = []
        for into, folder in merged.items():
            with load_lock:
                one = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": device}).eval()
            ticking = _ticker(tick, into, len(held))
            found.append(_compare(one, into, folder, held, scratch, policy, ref, refs[into], ticking))
            same = sum(a == b for a, b in zip(answers, _answers(one, prompts, stops), strict=True))
            found[-1] = replace(found[-1], same_answers=same, answers=len(answers), given=len(given), quantize=quantize)
            del one
            gc.collect()
    for one_found, folder in zip(found, merged.values(), strict=True):
        _write(folder, [one_found])
    return found


def check_pairs(adapter: str | Path, pairs: str | Path | None = None, *, model: str | None = None) -> None:
    """Read the pairs that `fidelity` would compare on, before the work of a merge. Raises as that does."""
    name, revision = (model, None) if model else base_of(open_adapter(adapter))
    _pairs(Path(adapter), pairs, load_tokenizer(name, revision=revision))


def thinned(pairs: Sequence[TokenPair], vocabulary: int) -> list[TokenPair]:
    """Evenly spaced pairs whose distributions take about `MAX_STORED` bytes at most; all of them, if they fit."""
    size = sum(len(answer) for pair in pairs for answer in _sides(pair)) * vocabulary * 4
    return [pairs[index] for index in evenly_spaced(len(pairs), max(1, int(len(pairs) * min(1.0, MAX_STORED / size))))]


def recommend(found: Sequence[Fidelity]) -> str:
    """One sentence: which merge to use, and why."""
    by = {one.into: one for one in found}
    exact, stored = by.get("trained-base"), by.get("base16")
    if exact and stored:
        distance = f"{stored.mean_delta:.2g} nats a token from the live adapter, trained-base {exact.mean_delta:.2g}"
        if stored.accuracy < stored.live_accuracy:
            return (
                f"Use trained-base: base16 gets fewer of the {stored.pairs} pairs right than the live adapter "
                f"({stored.accuracy:.0%}, live {stored.live_accuracy:.0%}), and is {distance}."
            )
        if stored.mean_delta > CLOSE_DELTA or stored.top1 < CLOSE_TOP1:
            return (
                f"Use trained-base: base16 is {distance}, and would choose the same next token at {stored.top1:.0%} of "
                "places; it is not the adapter that was measured."
            )
        return (
            f"Use base16: it has no 4-bit rounding and gets as many of the {stored.pairs} pairs right as the live "
            f"adapter ({stored.accuracy:.0%}), though it is {distance}."
        )
    [one] = found
    close = "computes what the live adapter computes" if one.mean_delta <= 0.01 else "is not quite the live adapter"
    more = "; --into both shows it beside the other base" if one.quantize == "nf4" else ""
    return f"This merge {close}: {one.mean_delta:.2g} nats a token apart{more}."


def _pairs(adapter: Path, pairs: str | Path | None, tokenizer: Any) -> list[TokenPair]:
    if pairs is not None:
        read, _ = read_pairs(str(pairs))
        kwargs = open_adapter(adapter).chat_template_kwargs
        found = tokenize_pairs(tokenizer, read, max_length=1024, chat_template_kwargs=kwargs)[0]
        if not found:
            raise DataError(f"{pairs} holds no pair that can be compared on: none is left at 1024 tokens.")
        return found
    stored = read_stored_pairs(adapter)
    if stored is None:
        raise AdapterError(
            f"{adapter} carries no pairs ({STORED_PAIRS}) to compare on: give some with --pairs, or --no-report."
        )
    return stored.pairs


def _sides(pair: TokenPair) -> tuple[list[int], list[int]]:
    return pair.chosen, pair.rejected


def _distribution(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Log-probabilities `[A, V]` of each next token of an answer, float32 on the CPU."""
    import torch

    ids = torch.tensor([[*prompt, *answer]], device=model.get_input_embeddings().weight.device)
    with torch.no_grad():
        logits = model(input_ids=ids, logits_to_keep=len(answer) + 1, use_cache=False).logits[0, :-1]
    return torch.log_softmax(logits.float(), dim=-1).cpu()


@contextmanager
def _waiting_room(merged: Mapping[str, Path]) -> Iterator[Path]:
    """A folder on the disk of the merged models, which holds as much: the system's own place is often memory."""
    beside = next(iter(merged.values()))
    with disk_errors(beside), temporary_folder(beside) as place:
        yield place


def _store(model: Any, pairs: Sequence[TokenPair], scratch: Path, tick: Callable[[int], None]) -> Sides:
    """Keep the live distributions on disk; return the answers' log-probabilities."""
    sums: Sides = ([], [])
    for number, pair in enumerate(pairs):
        for side, answer in enumerate(_sides(pair)):
            logps_AV = _distribution(model, pair.prompt, answer)
            with disk_errors(scratch):
                (scratch / f"{number}-{side}").write_bytes(logps_AV.numpy().tobytes())
            sums[side].append(_sum(logps_AV, answer))
        tick(number + 1)
    return sums


def _sums(model: Any, pairs: Sequence[TokenPair]) -> Sides:
    sums: Sides = ([], [])
    for pair in pairs:
        for side, answer in enumerate(_sides(pair)):
            sums[side].append(_sum(_distribution(model, pair.prompt, answer), answer))
    return sums


def _sum(logps_AV: torch.Tensor, answer: list[int]) -> float:
    import torch

    return float(logps_AV.gather(1, torch.tensor(answer)[:, None]).sum())


def _compare(
    model: Any,
    into: str,
    folder: Path,
    pairs: Sequence[TokenPair],
    scratch: Path,
    policy: Sides,
    ref: Sides,
    own_ref: Sides,
    tick: Callable[[int], None],
) -> Fidelity:
    import numpy as np
    import torch

    deltas, kls, same = [], [], []
    sums: Sides = ([], [])
    for number, pair in enumerate(pairs):
        for side, answer in enumerate(_sides(pair)):
            stored = np.fromfile(scratch / f"{number}-{side}", dtype=np.float32)
            live_AV = torch.from_numpy(stored).view(len(answer), -1)
            here_AV = _distribution(model, pair.prompt, answer)
            ids_A1 = torch.tensor(answer)[:, None]
            deltas.append((here_AV.gather(1, ids_A1) - live_AV.gather(1, ids_A1)).abs().squeeze(1))
            kls.append((live_AV.exp() * (live_AV - here_AV)).sum(dim=1))
            same.append(live_AV.argmax(dim=1) == here_AV.argmax(dim=1))
            sums[side].append(_sum(here_AV, answer))
        tick(number + 1)
    delta = torch.cat(deltas)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return Fidelity(
        into=into,
        dtype=str(config.get("dtype", config.get("torch_dtype"))),
        pairs=len(pairs),
        tokens=delta.numel(),
        mean_delta=float(delta.mean()),
        max_delta=float(delta.max()),
        kl=max(0.0, float(torch.cat(kls).mean())),
        top1=float(torch.cat(same).float().mean()),
        live_accuracy=accuracy(policy, ref),
        accuracy=accuracy(sums, own_ref),
        same_answers=0,
        answers=0,
    )


def _ticker(tick: OnStage, into: str, total: int) -> Callable[[int], None]:
    return lambda done: tick(into, done, total)


def _answers(model: Any, prompts: Sequence[list[int]], stops: frozenset[int]) -> list[list[int]]:
    """Greedy answers as ids, one prompt at a time."""
    sampling = Sampling(max_new_tokens=ANSWER, temperature=0.0)
    return [[token for _, token in decode(model, [prompt], stops, sampling)] for prompt in prompts]


def _write(folder: Path, found: list[Fidelity]) -> None:
    text = json.dumps([asdict(one) for one in found], indent=2) + "\n"
    with disk_errors(folder):
        replace_file(folder / REPORT, text)
