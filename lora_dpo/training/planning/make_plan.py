"""Before any training: what a recipe will read, compute, need and take. No weights are loaded, nothing is written.

Bytes and FLOPs are computed from the architecture (`engine/cost_model.py`), tokens from the tokenised pairs. How much
runs at once is decided as training decides it (`token_budget.fit`), with the predicted bytes in place of measured ones.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from lora_dpo import places
from lora_dpo.adapters.lora_config import read_config
from lora_dpo.config.recipe import Recipe
from lora_dpo.engine.cost_model import PairShape, pair_shape
from lora_dpo.errors import ConfigError
from lora_dpo.events import Note, OnEvent, Resolved, RowsDropped, StopSignal
from lora_dpo.model.base import check_packed, decide_packed, form_to_load, held_by, load_skeleton
from lora_dpo.model.device import device_name, free_bytes, pick_device, pick_dtype
from lora_dpo.model.lora import attach_lora
from lora_dpo.model.quantised import kept_share
from lora_dpo.model.stored_form import held_text
from lora_dpo.model.stored_size import stored_size
from lora_dpo.quiet import quiet_libraries
from lora_dpo.text import shown
from lora_dpo.training.planning.cards import GB, Card, find_cards, unknown_card
from lora_dpo.training.planning.fixes import find_fix, fits_without_desktop
from lora_dpo.training.planning.loading import loading_of
from lora_dpo.training.planning.memory_plan import (
    CUDA_CONTEXT,
    DESKTOP,
    LATER,
    Choice,
    Costs,
    Machine,
    Memory,
    adapter_bytes,
    memory_of,
    parts_of,
    run_apart,
    streamed_in,
)
from lora_dpo.training.planning.plan_values import AnswersPlan, Plan, Rows, Steps, Tokens
from lora_dpo.training.planning.step_time import step_flops, time_of
from lora_dpo.training.prepare import check_early, prepare, read_run, with_reference
from lora_dpo.training.prepared import Run

if TYPE_CHECKING:
    from peft import PeftModel


MOST_GIGABYTES = 999
"""A larger number without a unit is the name of a card."""


def plan_answers(recipe: Recipe, *, on_event: OnEvent | None = None) -> AnswersPlan:
    """What training with an SFT or KTO recipe will read and hold; nothing is written, and no weights are loaded.

    Raises:
        LoraDPOError: as `train` would, for anything in recipe, data or model.
    """
    notes: list[str] = []
    resolved: list[tuple[str, str]] = []

    def emit(event: Any) -> None:
        if isinstance(event, Note):
            notes.append(event.text)
        elif isinstance(event, Resolved):
            resolved.extend(event.lines)
        elif on_event and not isinstance(event, RowsDropped):
            on_event(event)

    recipe = with_reference(recipe)
    check_early(recipe)
    with quiet_libraries():
        run = prepare(recipe, Path(recipe.output or places.adapters() / "plan"), emit, StopSignal())
        costs = _costs(run, {}, ())
        cost = costs.footprint(_choice(costs))
    data = {which: Rows.of(report) for which, report in run.reports.items()}
    adapter = adapter_bytes(run, cost)
    return AnswersPlan(
        method=recipe.method,
        data=data,
        steps=run.steps,
        cut=sum(one.truncated for one in run.answers),
        weights=cost.weight_bytes,
        adapter=adapter,
        lines=tuple(line for line in resolved if line[0] != "output"),
        notes=tuple(notes),
    )


def plan(
    recipe: Recipe,
    *,
    card: str | None = None,
    memory: str | None = None,
    measure: bool = False,
    on_event: OnEvent | None = None,
) -> Plan:
    """What training with a recipe will read, compute, need and take.

    Args:
        card: plan for a card by its name, such as "RTX 4090" (`planning.cards`), or for an NVIDIA card with so much
            memory, such as "12GB", in place of this machine.
        memory: plan for this machine with so much memory.
        measure: load the model, run two optimiser steps on the longest pairs, and report the real peak and time.
        on_event: receives progress and warnings (`lora_dpo.events`).

    Raises:
        LoraDPOError: as `train` would, for anything in recipe, data or model; or an option makes no sense.
    """
    sizes = check_sizes(card, memory, measure=measure)
    if recipe.method != "dpo":
        raise ConfigError(
            f"What a step takes is known of pairs, not with method: {recipe.method}. Use plan_answers, or try a few "
            "steps: trainer.max_steps=5."
        )
    notes: list[str] = []

    def emit(event: Any) -> None:
        if isinstance(event, Note):
            notes.append(event.text)
        elif on_event:
            on_event(event)

    recipe = with_reference(recipe)
    check_early(recipe)
    named = find_cards(card) if card else ()
    with quiet_libraries():
        run = read_run(recipe, Path(recipe.output or places.adapters() / "plan"), emit, StopSignal())
        costs = _costs(run, sizes, named)
        choice = _choice(costs)
        planned = _plan(costs, choice, notes)
        if measure:
            planned = _measured(planned, costs, choice, emit)
    return planned


def check_sizes(card: str | None, memory: str | None, *, measure: bool) -> dict[str, int]:
    """Bytes of what is given, by option. Raises `ConfigError` for what is no size, or does not go together."""
    if card and (memory or measure):
        raise ConfigError(f"--card {card} is another machine: it goes without --memory and --measure.")
    return {name: _bytes(f"--{name}", text) for name, text in (("card", card), ("memory", memory)) if text}


def parse_size(text: str) -> int | None:
    """Bytes of "12GB", "12 GiB", "12", "512MB" (units of 1,024, as memory is sold), or None."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([gm])(?:i?b)?)?\s*", text.lower())
    if not found or float(found[1]) <= 0:
        return None
    return int(float(found[1]) * (1 << 20 if found[2] == "m" else GB))


def _bytes(option: str, text: str) -> int:
    """Bytes of a size, or of a card that is named."""
    if option == "--card":
        if named := find_cards(text):
            return named[0].memory
        if text.strip().isdigit() and int(text) > MOST_GIGABYTES:  # "3061" is a name, "24" a size
            raise unknown_card(text)
    size = parse_size(text)
    if size is None and option == "--card":
        raise unknown_card(text)
    if size is None:
        raise ConfigError(f"{option} is {shown(text)}: write a size such as 12GB or 512MB.")
    return size


def _costs(run: Run, sizes: dict[str, int], named: Sequence[Card]) -> Costs:
    from lora_dpo.engine import unsupported_reason
    from lora_dpo.model.lora import base_of

    section = run.recipe.model
    skeleton = load_skeleton(section.name, revision=section.revision, trust_remote_code=section.trust_remote_code)
    stored = stored_size(section.name, skeleton, revision=section.revision)  # before an adapter is counted with it
    model = _with_adapter(run.recipe, skeleton)
    shapes = [pair_shape(pair.prompt, pair.chosen, pair.rejected) for pair in run.train]
    machine = _machine(run.recipe, sizes, named)
    form = form_to_load(section.name, revision=section.revision)
    return Costs(model, machine, shapes, run, unsupported_reason(base_of(model)), stored, form)


def _with_adapter(recipe: Recipe, skeleton: Any) -> PeftModel:
    if recipe.reference_adapter is None:
        return attach_lora(skeleton, recipe.lora, seed=0)
    from peft import get_peft_model

    from lora_dpo.adapters.folder import peft_errors
    from lora_dpo.adapters.passport import check_folder
    from lora_dpo.adapters.peft_config import live_config

    folder = recipe.reference_adapter
    check_folder(folder)
    with peft_errors(folder, recipe.model.name):
        return get_peft_model(skeleton, live_config(read_config(folder), skeleton))


def _machine(recipe: Recipe, sizes: dict[str, int], named: Sequence[Card]) -> Machine:
    import psutil
    import torch

    if named:
        card = named[0]
        dtype: str = card.dtype if recipe.model.dtype == "auto" else recipe.model.dtype
        desktop = 0 if card.kind == "server" else DESKTOP
        others = tuple(other.name for other in named[1:])
        return Machine("cuda", card.name, card.memory, CUDA_CONTEXT, dtype, False, desktop, card, others)
    if "card" in sizes:
        dtype = "bfloat16" if recipe.model.dtype == "auto" else recipe.model.dtype
        name = f"an NVIDIA card with {sizes['card'] / GB:g} GB, Ampere or newer"
        return Machine("cuda", name, sizes["card"], CUDA_CONTEXT, dtype, here=False, desktop=DESKTOP)
    device = pick_device()
    dtype = pick_dtype(recipe.model.dtype, device)
    if device.type == "cuda":
        free = free_bytes(device) + torch.cuda.memory_allocated(device)
        name = torch.cuda.get_device_name(device)
        return Machine(
            "cuda", name, sizes.get("memory", free), 0 if "memory" not in sizes else CUDA_CONTEXT, dtype, True
        )
    own = psutil.Process().memory_info().rss
    name = device_name(device)
    memory = sizes.get("memory", free_bytes(device) + own)
    return Machine("cpu", name, memory, own + LATER, dtype, here=device.type == "cpu")  # of Apple's no speed is known


def _choice(costs: Costs) -> Choice:
    """The recipe's own settings, with what training would fill in."""
    import torch

    recipe, settings, machine = costs.run.recipe, costs.run.settings, costs.machine
    packed = recipe.model.packed
    held, form = held_by(recipe.model)
    if held == "none":
        packed = False
    elif packed == "auto":
        device = torch.device(machine.kind)
        packed = decide_packed(costs.model.get_base_model(), device, getattr(torch, machine.dtype), form)
    else:
        check_packed(form, packed, machine.kind)
    return Choice(
        max_length=settings.get("max_length", 1024),
        quantize=held,
        packed=packed,
        checkpointing=settings.get("gradient_checkpointing", True),  # as settings.trainer_config
        split_pairs=recipe.engine.split_pairs,
        offload=recipe.engine.offload,
        stream=streamed_in(costs, packed=packed),
    )


def _plan(costs: Costs, choice: Choice, notes: list[str]) -> Plan:
    cost, run = costs.footprint(choice), costs.run
    batches = list(_batches(costs.shapes, run.batch, run.steps, seed=run.settings["seed"]))
    memory = memory_of(costs, cost, choice, costs.shapes, batches)
    tokens = _tokens(run, costs.shapes, batches)
    steps = _steps(costs, batches, memory, choice)
    notes += _notes(costs)
    return Plan(
        model=run.recipe.model.name,
        held=_held(costs, choice),
        machine=costs.machine,
        data={which: Rows.of(report) for which, report in run.reports.items()},
        tokens=tokens,
        steps=steps,
        memory=memory,
        loading=loading_of(costs, cost, choice),
        time=time_of(costs, cost, choice, batches, memory, tokens, steps),
        fix=find_fix(costs, choice) if memory.fits is False else None,
        roomier=find_fix(costs, choice, roomy=True) if memory.verdict == "tight" else None,
        fits_without_desktop=memory.fits is False and fits_without_desktop(costs, cost, choice),
        notes=tuple(notes),
    )


def _held(costs: Costs, choice: Choice) -> str:
    if choice.quantize == "none":
        return held_text("none")
    how = "packed" if choice.packed else "held dequantised"
    return f"{held_text(choice.quantize, kept_share(costs.model.get_base_model(), costs.form))}, {how}"


def _measured(planned: Plan, costs: Costs, choice: Choice, emit: OnEvent) -> Plan:
    """The plan with two real steps beside it; their speed, in FLOP/s, is taken for the whole run."""
    from lora_dpo.training.planning.dry_run import try_steps

    dry_run = try_steps(costs.run, costs.shapes, on_event=emit)
    longest = sorted(costs.shapes, key=lambda shape: -shape.stream)[: dry_run.pairs]
    if dry_run.tokens is not None:
        cost = costs.footprint(choice)
        flops = sum(step_flops(cost, shape, choice, checkpointed=dry_run.checkpointed or 0) for shape in longest)
        dry_run = replace(dry_run, run_seconds=planned.time.flops / flops * dry_run.seconds)
    return replace(planned, dry_run=dry_run)


def _notes(costs: Costs) -> Iterator[str]:
    if costs.machine.card and costs.machine.card.kind == "amd":
        yield "Nothing here was tried on AMD's cards: that it runs there, and in this memory, is not claimed."
    if costs.machine.kind == "cpu" and not costs.machine.here:
        yield "Nothing here was tried on Apple's GPUs: memory is computed as for a CPU, and no time is claimed."
    if costs.unsupported:
        yield f"TRL's own passes will run ({costs.unsupported}): what they keep is not predicted. Use --measure."
    elif keeps_states(costs.model):
        yield (
            "Recurrent layers are counted as transformers' own functions keep them (fused kernels keep less), and "
            "their time as that of their matrices. Use --measure."
        )


def keeps_states(model: PeftModel) -> bool:
    """Whether a model has layers that keep a state from token to token."""
    from lora_dpo.engine.forked_states import recurrent_layers
    from lora_dpo.engine.trunk_cache import decoder_layers
    from lora_dpo.model.lora import base_of

    return bool(recurrent_layers(decoder_layers(base_of(model))))


# --- tokens and steps ------------------------------------------------------------------------------


def _batches(shapes: Sequence[PairShape], batch: int, steps: int, *, seed: int) -> Iterator[list[PairShape]]:
    """The pairs of each optimiser step, every pass over the data in another random order."""
    order = random.Random(seed)  # noqa: S311 - a shuffle
    left: list[PairShape] = []
    for _ in range(steps):
        if not left:
            left = order.sample(shapes, len(shapes))
        yield left[:batch]
        left = left[batch:]


def _tokens(run: Run, shapes: Sequence[PairShape], batches: Sequence[Sequence[PairShape]]) -> Tokens:
    lengths = {
        "prompt": [shape.prompt for shape in shapes],
        "chosen": [shape.first - shape.prompt for shape in shapes],
        "rejected": [shape.second - shape.prompt for shape in shapes],
        "pair": [shape.stream for shape in shapes],
    }
    edges = bins(max(map(max, lengths.values())))
    small = run.settings["per_device_train_batch_size"]
    padded = 0
    for pairs in batches:
        for start in range(0, len(pairs), small):
            rows = pairs[start : start + small]
            padded += 2 * len(rows) * max(max(shape.first, shape.second) for shape in rows)
    seen = [shape for pairs in batches for shape in pairs]
    return Tokens(
        medians={name: median(values) for name, values in lengths.items()},
        longest={name: max(values) for name, values in lengths.items()},
        cut=sum(pair.truncated for pair in run.train),
        edges=edges,
        histogram={name: count(values, edges) for name, values in lengths.items()},
        padded=padded,
        unpadded=sum(shape.first + shape.second for shape in seen),
        stream=sum(shape.stream for shape in seen),
    )


def bins(longest: int, most: int = 10) -> tuple[int, ...]:
    """Edges from 0 to above `longest`, at most `most` bins of one round width."""
    width = next(step * 10**power for power in range(9) for step in (1, 2, 5) if step * 10**power * most > longest)
    return tuple(range(0, (longest // width + 2) * width, width))


def count(values: Sequence[int], edges: Sequence[int]) -> tuple[int, ...]:
    """How many values lie in each bin of equal width."""
    counts = [0] * (len(edges) - 1)
    for value in values:
        counts[value // edges[1]] += 1
    return tuple(counts)


def _steps(costs: Costs, batches: Sequence[Sequence[PairShape]], memory: Memory, choice: Choice) -> Steps:
    run = costs.run
    if costs.unsupported:
        parts = [-(-len(pairs) // run.settings["per_device_train_batch_size"]) for pairs in batches]
        tokens = fmean(sum(shape.first + shape.second for shape in pairs) for pairs in batches)
    else:
        parts = [len(parts_of(pairs, memory.budget, choice)) for pairs in batches]
        tokens = fmean(sum(shape.stream for shape in run_apart(pairs, choice)) for pairs in batches)
    return Steps(
        steps=run.steps,
        pairs=run.batch,
        passes=sum(map(len, batches)) / len(run.train),
        tokens=tokens,
        parts=fmean(parts),
        most_parts=max(parts),
    )
