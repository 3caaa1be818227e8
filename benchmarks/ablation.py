"""The engine with one of its parts switched off: what each part gives alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from measuring import Switch, Variant

from lora_dpo.engine import layout as layout_module
from lora_dpo.engine import pair_forward as forward_module


def ablations(full: Variant) -> list[Variant]:
    """The engine with one part switched off; the first is the whole engine, references known."""
    trainer = full.trainer
    forward = trainer.engine.forward
    found = [Variant("whole engine", trainer, full.batches)]

    def off(name: str, switch: Switch, *, whole: bool = True) -> None:
        found.append(Variant(name, trainer, full.batches, switch=switch, whole=whole))

    off("without sharing prefixes", lambda: patched(layout_module, "common_prefix", lambda left, right: 0))
    off(
        "with TRL's head: products repeated in the backward pass",
        lambda: patched(forward_module, "head_values", trl_head),
    )
    off("entropy, mean logits and top-1 in every step", lambda: patched(trainer, "_logs_next_step", lambda: True))
    # the hooks stay, and count what is kept; they only note no recipe
    off("without rematerialising", lambda: patched(forward.rematerialiser, "note", lambda *nothing: None))
    off("every layer checkpointed", lambda: checkpointed(trainer))
    off(
        "parts no longer than the longest pair",
        lambda: patched(trainer.engine.whole_step.budget, "tokens", 1),
        whole=False,
    )
    off(
        "the two branches of a pair apart", lambda: patched(trainer.engine.whole_step, "split_pairs", True), whole=False
    )
    return found


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)


@contextlib.contextmanager
def checkpointed(trainer: Any) -> Iterator[None]:
    trainer.model.gradient_checkpointing_enable()
    trainer.engine.whole_step.budget.checkpoint_layers(trainer.engine.whole_step.budget.layers)
    try:
        yield
    finally:
        trainer.engine.whole_step.budget.checkpoint_layers(0)


def trl_head(hidden: Any, weight: Any, bias: Any, label: Any, *, scale: float, softcap: Any, extras: Any) -> Any:
    """The same values through TRL's chunked head, on the labelled tokens only."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    values = ChunkedLogProbFunction.apply(
        hidden, weight, bias, label, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, softcap, scale, ("log_probs", *extras)
    )
    return forward_module.HeadValues(*values)
