"""Losses and gradients: the engine against stock TRL, and small copies of all model types against plain passes."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu_check.common import (
    ROOT,
    SIZES,
    Check,
    random_base,
    step,
    stock_trainer,
    tokenizer,
    trainer_of,
    unknown,
)

GRADIENT, LOSS = 1e-3, 1e-4
"""Largest difference in float32 on a card: ‖ours - TRL's‖ of ‖TRL's‖, and of the loss. On a CPU some 1e-6 is seen."""
WORSE = 1.3
"""How much further from float32 the engine's gradient may be than TRL's, in NF4 and bf16."""

Gradients = dict[str, torch.Tensor]


def run(check: Check) -> None:
    """Every part of it; what is not equal is noted."""
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    import kinds
    import tiny

    asked = check.options.kind
    for kind in asked or tiny.CONFIGS:
        if kind in tiny.CONFIGS:
            _guarded(check, f"equal fp32 {kind}", lambda kind=kind: against_trl(check, tiny, kind))
    for kind in asked or kinds.STREAMS:
        if kind in kinds.STREAMS:
            _guarded(check, f"equal stream {kind}", lambda kind=kind: against_plain(check, kinds, kind))
    _guarded(check, "equal NF4", lambda: in_bf16(check))


def _guarded(check: Check, name: str, part: Any) -> None:
    """One that breaks does not keep the others from being tried."""
    try:
        part()
    except Exception as error:
        check.notes.fail(f"{name}: {type(error).__name__}: {str(error)[:300]}")
        check.notes.save(name, {"error": str(error)[:300]})


def against_trl(check: Check, tiny: Any, kind: str) -> None:
    """One architecture's loss and gradient on four pairs, by the engine and by stock TRL."""
    from lora_dpo import DPOTrainer

    words = tempfile.mkdtemp()
    tokenizer().save_pretrained(words)
    found = {}
    for name, trainer_class in (("ours", DPOTrainer), ("TRL", tiny.Stock)):
        model = tiny.tiny(kind).to(check.device)
        trainer = tiny.build(trainer_class, model, words, tempfile.mkdtemp(), use_cpu=not check.on_card)
        batch = trainer._prepare_inputs(trainer.data_collator(tiny.columns(tiny.PAIRS)))
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        if name == "ours":
            streams = trainer.engine.forward.streams
        found[name] = loss.item(), tiny.gradients_of(trainer)
    off = apart(found["ours"][1], found["TRL"][1])
    losses = found["ours"][0], found["TRL"][0]
    ok = off <= GRADIENT and abs(losses[0] - losses[1]) <= LOSS and streams > 0
    check.notes.save(f"equal fp32 {kind}", {"losses": losses, "gradient": off, "ok": ok})
    said = f"float32 {kind}: loss {losses[0]:.6f}, TRL's {losses[1]:.6f}; gradients differ by {off:.1e}"
    check.notes.say(said) if ok else check.notes.fail(said)


def against_plain(check: Check, kinds: Any, kind: str) -> None:
    """A small copy of a model type on the device: the stream against plain passes over whole rows."""
    from lora_dpo.engine import proof
    from lora_dpo.engine.small_copy import small_copy

    with _batches_on(proof, check.device):
        found = proof.prove(kinds.skeleton(kind), lambda model, seed: small_copy(model, seed=seed).to(check.device))
    # a card sums in another order than a CPU: what counts there is that no mask or state is another one
    ok = found.loss <= LOSS and found.gradient <= GRADIENT if check.on_card else found.reason is None
    check.notes.save(f"equal stream {kind}", {**dataclasses.asdict(found), "ok": ok})
    said = f"stream {kind}: loss {found.loss:.0e}, gradients {found.gradient:.0e} {found.reason or ''}".rstrip()
    check.notes.say(said) if ok else check.notes.fail(said)


@contextlib.contextmanager
def _batches_on(proof: Any, device: str) -> Iterator[None]:
    own = proof._batch

    def moved(vocabulary: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        call, answers = own(vocabulary)
        return {name: value.to(device) for name, value in call.items()}, answers.to(device)

    proof._batch = moved
    try:
        yield
    finally:
        proof._batch = own


def in_bf16(check: Check) -> None:
    """NF4 and bf16: the engine's gradient and TRL's, each against float32 on the same NF4 values."""
    from lora_dpo import DPOTrainer

    size = SIZES["middle" if check.on_card else "small"]
    lot = random.Random(0)

    def ids(count: int) -> list[int]:
        return [lot.randrange(100, size.vocabulary - 1) for _ in range(count)]

    rows = [
        {
            "prompt_ids": ids(lot.randrange(5, 150)),
            "chosen_ids": ids(lot.randrange(2, 120)),
            "rejected_ids": ids(lot.randrange(2, 120)),
        }
        for _ in range(8)
    ]
    base = random_base(size, check.device)
    stock = trainer_of(stock_trainer(), base, rows, 8, check.device, gradient_checkpointing=False)
    # our own scores in TRL's place, so that the losses' slopes are the same: only the policy's passes are compared
    found = {}
    for name, trainer in (
        ("ours in bf16", trainer_of(DPOTrainer, base, rows, 8, check.device)),
        ("TRL in bf16", stock),
        ("ours in float32", trainer_of(DPOTrainer, in_float32(size, check.device), rows, 8, check.device, bf16=False)),
    ):
        trainer.precompute_ref_logps = True
        found[name] = gradients(trainer, unknown(rows))
    truth = found.pop("ours in float32")
    off = {name: apart(each, truth) for name, each in found.items()}
    ratio = off["ours in bf16"] / off["TRL in bf16"]
    check.notes.save("equal NF4", {**off, "ours / TRL": ratio, "ok": ratio <= WORSE})
    for name, value in off.items():
        check.notes.say(f"NF4, {name}: gradients differ from float32's by {value:.1e}")
    said = f"NF4: ours is {ratio:.2f} times as far from float32 as TRL (allowed: {WORSE})"
    check.notes.say(said) if ratio <= WORSE else check.notes.fail(said)


def in_float32(size: Any, device: str) -> Any:
    """The same base with its NF4 values in float32 matrices."""
    import bitsandbytes.functional as functional

    base = random_base(size, device)
    for parent in list(base.model.modules()):
        for name, part in list(parent.named_children()):
            if type(part).__name__ == "Linear4bit":
                full = torch.nn.Linear(part.in_features, part.out_features, bias=False, device="meta")
                values = functional.dequantize_4bit(part.weight.data, part.weight.quant_state).float()
                full.weight = torch.nn.Parameter(values, requires_grad=False)
                setattr(parent, name, full)
    base.model.float()
    base.model.is_loaded_in_4bit = False
    return dataclasses.replace(base, quantize="none", packed=False, dtype="float32")


def gradients(trainer: Any, rows: Any) -> Gradients:
    """Of one step with a drawn adapter, whose values bf16 can hold: TRL rounds its own."""
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_" in name:
            drawn = (torch.randn(parameter.shape) * 0.05).bfloat16()
            parameter.data = drawn.to(parameter.device, parameter.dtype)
    step(trainer, rows)
    return {
        name: parameter.grad.detach().double().cpu()
        for name, parameter in trainer.model.named_parameters()
        if parameter.grad is not None
    }


def apart(ours: Gradients, theirs: Gradients) -> float:
    """‖ours - theirs‖ of ‖theirs‖, all weights together."""
    norm = sum(float(each.double().square().sum()) for each in theirs.values()) ** 0.5
    off = sum(float((ours[name].double() - each.double()).square().sum()) for name, each in theirs.items()) ** 0.5
    return off / norm
