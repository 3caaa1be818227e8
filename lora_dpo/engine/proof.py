"""Whether a model may run as a stream of pairs, decided by trying: a small random copy of it, both ways.

The copy (`small_copy.py`) computes the loss of four pairs and its gradients on the stream, and by plain passes over
whole rows, in float32, and in float64 where that differs, since some copies amplify rounding a thousandfold. Equal: the
engine runs. Otherwise TRL's own passes do, with the reason and the number. What was
found is kept, by class, configuration, versions and the engine's own source, for the process and in the person's cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import torch

from lora_dpo import places
from lora_dpo.engine.pair_forward import PairForward, structural_reason
from lora_dpo.engine.preference_loss import preference_loss
from lora_dpo.engine.small_copy import small_config, small_copy
from lora_dpo.engine.trunk_cache import TrunkCache
from lora_dpo.errors import OutputError
from lora_dpo.files import replace_file
from lora_dpo.model.device import out_of_memory
from lora_dpo.text import SHOWN, one_line

LOSS, GRADIENT = 1e-5, 3e-5
"""Largest relative difference of the loss, and of the gradients, that counts as equal."""
DRAWS = 5
"""How often the weights are drawn until both are equal. A gated delta rule divides by what can be near zero, and one
draw in six then rounds to more than the bound; a state or a mask that is another one shows in every draw."""
LENGTHS = ((70, 9, 5), (12, 1, 7), (1, 6, 3), (20, 11, 1))
"""Tokens of prompt, chosen and rejected: across a chunk of linear attention (64) and windows, and answers of one."""
BETA = 0.1

_found: dict[str, Proof] = {}
_trying = threading.Lock()
"""Held while a copy is tried: fused kernels are off for the whole process meanwhile."""


@dataclass(frozen=True)
class Proof:
    """What trying found."""

    loss: float = math.nan
    """Relative difference of the loss; nan if the copy could not be made or run."""
    gradient: float = math.nan
    """The largest norm of a weight's difference, of the largest norm of a weight's gradient."""
    reason: str | None = None
    """Why the model may not run as a stream; None if it may."""
    trunk: bool = False
    """Whether layers may run on what was kept of those below them (`trunk_cache.py`): not where they share keys."""
    double: bool = False
    """Whether it was computed in float64, because float32 rounds this model's copy to more than the bound."""
    seconds: float = 0.0
    """What trying took; 0 if it was tried before."""

    @property
    def equal(self) -> bool:
        """Whether both are within the bounds; nan is not."""
        return self.loss <= LOSS and self.gradient <= GRADIENT

    @property
    def line(self) -> str:
        """What was found, for the header of a run."""
        when = f"{self.seconds:.1f} s" if self.seconds else "tried before"
        return (
            f"a small copy of the model has TRL's loss to {self.loss:.0e} and its gradients to {self.gradient:.0e} "
            f"({'in float64, ' if self.double else ''}{when})"
        )


def unsupported_reason(model: Any) -> str | None:
    """Why a base model cannot run a stream of pairs, or None if it can: by its structure, and by trying a copy."""
    return structural_reason(model) or proof_of(model).reason


def proof_of(model: Any) -> Proof:
    """What trying a small copy of a base model found; its tensors may be on the meta device."""
    key = key_of(model)
    if key in _found:
        return _found[key]
    found = _read(key)
    if found is None:
        found = prove(model)
        if math.isnan(found.loss):  # nothing was computed: memory that was short, a package that is missing
            return found
        _keep(key, found)
    _found[key] = dataclasses.replace(found, seconds=0.0)
    return found


def prove(model: Any, copy: Callable[..., Any] = small_copy) -> Proof:
    """Try a small copy of a base model now.

    Args:
        copy: makes the copy of a model, with weights by `seed`.
    """
    begin = time.perf_counter()
    try:
        with _trying, _own_settings(), _without_kernels(model):
            best = _tried(model, copy)
    except Exception as error:  # whatever a model's class raises of sizes and calls that it does not take
        text = one_line(f"{type(error).__name__}: {error}", SHOWN)
        return Proof(reason=f"no small copy of {type(model).__name__} can be tried as a stream ({text})")
    reason = best.reason
    if reason is None and not best.equal:
        reason = (
            f"on a small copy of {type(model).__name__} the engine's loss differs from plain passes by {best.loss:.0e} "
            f"and its gradients by {best.gradient:.0e} (equal: up to {LOSS:.0e} and {GRADIENT:.0e})"
        )
    return dataclasses.replace(best, reason=reason, seconds=time.perf_counter() - begin)


def _tried(model: Any, copy: Callable[..., Any]) -> Proof:
    """The best of a few draws of a copy, without its verdict."""
    best = Proof(math.inf, math.inf)
    for seed in range(DRAWS):
        small = copy(model, seed=seed)
        if (reason := structural_reason(small)) is not None:
            return Proof(reason=reason)
        found = _best_of_both(small)
        if seed == 0 or (found.loss <= LOSS and found.gradient < best.gradient):
            best = found
        if found.equal or not found.loss <= LOSS:
            break
    return dataclasses.replace(best, trunk=best.loss <= LOSS and _has_trunk(small))


@contextlib.contextmanager
def _own_settings() -> Iterator[None]:
    """The copy is tried with gradients and in its own precision, whatever the caller has switched on."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        yield


@contextlib.contextmanager
def _without_kernels(model: Any) -> Iterator[None]:
    """Layers compute with torch alone: transformers binds fused kernels, where installed, also for tensors on a CPU."""
    modules = {sys.modules[type(part).__module__] for part in model.modules()}
    fused = [
        (module, name, function)
        for module in modules
        for name, function in vars(module).items()
        if isinstance(function, FunctionType) and "kernel" in function.__code__.co_qualname
    ]
    try:
        for module, name, function in fused:
            setattr(module, name, _unfused(function))
        yield
    finally:
        for module, name, function in fused:
            setattr(module, name, function)


def _unfused(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a kernel stands in for, called with what it takes."""
    plain = inspect.unwrap(function)
    taken = inspect.signature(plain).parameters
    return lambda *given, **named: plain(*given, **{name: value for name, value in named.items() if name in taken})


def _best_of_both(small: Any) -> Proof:
    """What a copy shows in float32, or else in float64: a state or a mask that is another one shows in both."""
    single = Proof(*_differences(small))
    if single.equal:
        return single
    try:
        double = Proof(*_differences(small.double()), double=True)
    except (RuntimeError, TypeError, ValueError) as error:  # a layer that makes tensors of a type of its own
        if out_of_memory(error):
            raise
        return single
    finally:
        small.float()
    return double if double.equal else single


def _differences(model: Any) -> tuple[float, float]:
    """Relative differences of the loss and of its gradients, stream against plain passes."""
    call, answers_RT = _batch(model.get_input_embeddings().num_embeddings)
    forward = PairForward(model)
    try:
        with forward.passed_on():
            loss, gradients = _backward(model, _plain(model, call, answers_RT))
        ours, own = _backward(model, model(**call, fused_lm_head=True).log_probs)
    finally:
        forward.close()
    return abs(ours - loss) / abs(loss), _apart(own, gradients)


def _has_trunk(model: Any) -> bool:
    """Whether the last layer makes the same of what was kept of the layers below it."""
    model.requires_grad_(False)
    model.base_model.layers[-1].requires_grad_(True)
    call, answers_RT = _batch(model.get_input_embeddings().num_embeddings)
    with torch.no_grad():
        log_probs_RT = _plain(model, call, answers_RT)
    forward = PairForward(model, trunk=TrunkCache(memory_bytes=1 << 28))
    try:
        with torch.no_grad():
            for _ in range(2):  # the first pass keeps, the second reads
                ours_RT = model(**call, fused_lm_head=True).log_probs
    except Exception as error:  # whatever a layer raises that wants more of those below it than their output
        if out_of_memory(error):
            raise
        return False
    finally:
        forward.close()
    return bool((ours_RT - log_probs_RT).abs().max() <= LOSS * log_probs_RT.abs().max())


def _plain(model: Any, call: dict[str, torch.Tensor], answers_RT: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the answers by a plain pass over whole rows, `[R, T-1]`, 0 elsewhere."""
    ids_RT, mask_RT = call["input_ids"], call["attention_mask"]
    logits_RTV = model(input_ids=ids_RT, attention_mask=mask_RT, use_cache=False).logits[:, :-1].float()
    log_probs_RT = torch.log_softmax(logits_RTV, dim=-1).gather(2, ids_RT[:, 1:, None]).squeeze(2)
    return log_probs_RT * answers_RT[:, 1:]


def _apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest norm of a weight's difference, of the largest norm of a weight's gradient."""
    largest = max(float(gradient.norm()) for gradient in theirs.values())
    return max(float((ours.get(name, 0.0) - gradient).norm()) for name, gradient in theirs.items()) / largest


def _backward(model: Any, log_probs_RT: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """DPO's loss against a reference of zeros, and the gradients of all weights that have one."""
    model.zero_grad(set_to_none=True)
    chosen_B, rejected_B = log_probs_RT.sum(dim=1).chunk(2)
    loss = preference_loss(chosen_B, rejected_B, beta=BETA)[0].mean()
    loss.backward()  # type: ignore[no-untyped-call]
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return float(loss.detach()), found


def _batch(vocabulary: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Pairs of random tokens as TRL calls a model with them, and where their answers are, `[R, T]`."""
    draw = torch.Generator().manual_seed(0)
    sides: tuple[list[list[int]], list[list[int]]] = ([], [])
    for prompt, *answers in LENGTHS:
        start = torch.randint(min(3, vocabulary - 1), vocabulary, (prompt,), generator=draw).tolist()
        for side, length in zip(sides, answers, strict=True):
            side.append(start + torch.randint(min(3, vocabulary - 1), vocabulary, (length,), generator=draw).tolist())
    rows = [*sides[0], *sides[1]]
    width = max(map(len, rows))
    ids_RT = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    length_R1 = torch.tensor([[len(row)] for row in rows])
    prompt_R1 = torch.tensor([[prompt] for prompt, _, _ in LENGTHS] * 2)
    column_T = torch.arange(width)
    mask_RT, answers_RT = column_T < length_R1, (column_T >= prompt_R1) & (column_T < length_R1)
    labels_RT = ids_RT.masked_fill(~answers_RT, -100)
    return {"input_ids": ids_RT, "attention_mask": mask_RT.long(), "labels": labels_RT}, answers_RT


def key_of(model: Any) -> str:
    """By what a proof is found again: class, configuration at its small size, and what computes."""
    import transformers

    try:
        config = small_config(model.config).to_dict()
    except Exception as error:  # as in `prove`, which says it
        config = {"none": f"{type(error).__name__}: {error}", **model.config.to_dict()}
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    about = [engine_source(), torch.__version__, transformers.__version__, kind, config]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:32]


@functools.cache
def engine_source() -> str:
    """Of the engine's passes and of this check: what was found by others is not believed."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _path(key: str) -> Path | None:
    folder = places.proofs()
    return folder and folder / f"{key}.json"


def _read(key: str) -> Proof | None:
    path = _path(key)
    if path is None:
        return None
    try:
        return dataclasses.replace(Proof(**json.loads(path.read_text(encoding="utf-8"))), seconds=0.0)
    except (OSError, ValueError, TypeError):
        return None  # not there, or not whole: it is tried again


def _keep(key: str, proof: Proof) -> None:
    path = _path(key)
    if path is not None:
        # where nothing can be written, it is tried again in the next process
        with contextlib.suppress(OSError, OutputError):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, json.dumps(dataclasses.asdict(proof)))
