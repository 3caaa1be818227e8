"""Does a run fit into memory? All of it from the architecture and lengths.

How much runs at once is decided as training decides it (`token_budget.fit`), with predicted bytes in place of measured
ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from lora_dpo.engine.cost_model import CostModel, PairShape, footprint
from lora_dpo.engine.token_budget import CPU_TOKENS, CUDA_TOKENS, SHARE, fit, fit_streamed, stream_token_bytes
from lora_dpo.model.held_size import Streamed, weight_bytes
from lora_dpo.model.stored_form import StoredForm
from lora_dpo.model.stored_size import StoredSize
from lora_dpo.model.visiting import PIECE
from lora_dpo.training.planning.answer_memory import Asked, answer_bytes, asked_in
from lora_dpo.training.planning.cards import Card
from lora_dpo.training.prepared import Run

if TYPE_CHECKING:
    from peft import PeftModel

CUDA_CONTEXT = 1 << 29
"""Allowance for what CUDA and its libraries take of a card's memory; assumed, not measured."""

DESKTOP = 600 << 20
"""Allowance for a desktop that shows on the same card, with a browser: between 0.3 and 0.8 GB are usual; assumed."""

LATER = 512 << 20
"""What a process on a CPU grew by between a plan and its first step, beside the weights: libraries that are loaded
later, and what was not explained. Measured on the quickstart (docs/plan.md)."""

GAPS = 0.6
"""What a CPU's allocator lost between tensors there, as a share of activations and working space. A card's allocator
loses something too, how much was not measured: hence `TIGHT`."""

TIGHT = 0.85
"""Share of the memory above which a plan is called tight."""

Verdict = Literal["fits", "tight", "does not fit", "unknown"]


@dataclass(frozen=True)
class Machine:
    """Where the run is planned for."""

    kind: Literal["cpu", "cuda"]
    name: str
    memory: int
    """Bytes that the run may take."""
    libraries: int
    """Bytes that are taken before any weight is loaded."""
    dtype: str
    """What is computed in."""
    here: bool
    """Whether it is this machine, whose speed can be measured."""
    desktop: int = 0
    """Bytes that are left to a desktop on the same card."""
    card: Card | None = None
    """Set where it was named: its published speed is known."""
    others: tuple[str, ...] = ()
    """Cards that share its name."""


@dataclass(frozen=True)
class Choice:
    """The settings that memory depends on."""

    max_length: int | None
    quantize: str
    packed: bool
    checkpointing: bool
    split_pairs: bool
    offload: bool
    stream: Streamed = "off"
    overrides: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Costs:
    """What does not change between choices: structure, machine, data, and the rest of the recipe."""

    model: PeftModel
    machine: Machine
    shapes: Sequence[PairShape]
    run: Run
    unsupported: str | None
    stored: StoredSize
    form: StoredForm | None = None
    """How the base is stored quantised, if it is."""

    def footprint(self, choice: Choice) -> CostModel:
        """The model's costs as `choice` holds it."""
        import torch

        itemsize = getattr(torch, self.machine.dtype).itemsize
        cost = footprint(self.model, itemsize=itemsize, packed=choice.packed, form=self.form, streamed=choice.stream)
        if self.machine.kind == "cpu":  # where weights that visit are in the same memory
            return replace(cost, weight_bytes=cost.weight_bytes + cost.held.at_home(choice.stream))
        return cost

    @cached_property
    def asked(self) -> tuple[Asked, ...]:
        """The prompts that are answered beside the training."""
        return asked_in(self.run)

    @property
    def cap(self) -> int:
        """Most stream tokens at once, unless a pair is longer."""
        tokens = self.run.recipe.engine.tokens
        usual = CUDA_TOKENS if self.machine.kind == "cuda" else CPU_TOKENS
        return usual if tokens == "auto" else tokens


@dataclass(frozen=True)
class Memory:
    """Predicted bytes at the peak of training. `activations` is None where TRL's own passes run."""

    libraries: int
    desktop: int
    weights: int
    adapter: int
    """Adapter, its gradient, and the optimiser's state."""
    activations: int | None
    """Kept for the backward pass by the largest part of a step."""
    working: int
    """The larger of: a tile of logits, one layer's temporaries in its backward pass."""
    gaps: int
    """Lost between the tensors of these two."""
    answers: int
    """Keys and values, and the working space, while prompts are answered: not at the same time as these three."""
    answered: int
    """Prompts that are answered at once."""
    total: int
    available: int
    fits: bool | None
    """Whether the longest pair can be run, as training decides it; None where that is not known."""
    least: int | None
    """The least memory in which it fits; None where that is not known."""
    budget: int
    """Most stream tokens that may run at once."""
    part_tokens: int
    """Most stream tokens that do run at once."""
    checkpointed: int
    """Layers whose activations are computed again."""
    layers: int
    """Layers with an adapter, and any between them: those that keep anything."""

    @property
    def verdict(self) -> Verdict:
        """Whether it fits, and if so, with room to spare."""
        if not self.fits:
            return "unknown" if self.fits is None else "does not fit"
        return "tight" if self.total > TIGHT * self.available else "fits"


@dataclass(frozen=True)
class Fix:
    """The first settings that fit, as overrides to type, and what they need."""

    overrides: tuple[str, ...]
    total: int
    pairs_lost: int
    """Pairs that a shorter `max_length` would drop."""
    pairs_cut: int
    """Pairs whose answers it would cut further."""


def streamed_in(costs: Costs, *, packed: bool) -> Streamed:
    """Which weights will visit the device, as the loader decides it."""
    import torch

    asked, machine = costs.run.recipe.model.stream, costs.machine
    if asked in ("embeddings", "on"):
        return "on" if asked == "on" else "embeddings"
    if asked == "off" or machine.kind != "cuda" or costs.run.recipe.method != "dpo":
        return "off"
    itemsize = getattr(torch, machine.dtype).itemsize
    whole = weight_bytes(costs.model.get_base_model(), itemsize=itemsize, packed=packed, form=costs.form)
    return "on" if whole > machine.memory - machine.libraries - machine.desktop else "off"


def run_apart(pairs: Sequence[PairShape], choice: Choice) -> Sequence[PairShape]:
    """The pairs as they are run: whole, or each branch on its own."""
    return [branch for pair in pairs for branch in pair.branches()] if choice.split_pairs else pairs


def parts_of(pairs: Sequence[PairShape], tokens: int, choice: Choice) -> list[list[PairShape]]:
    """The parts that a step's pairs are run in."""
    from lora_dpo.engine.layout import pack

    if choice.split_pairs:
        return [[branch] for branch in run_apart(pairs, choice)]
    return [[pairs[index] for index in part] for part in pack([pair.stream for pair in pairs], tokens)]


def memory_of(
    costs: Costs,
    cost: CostModel,
    choice: Choice,
    shapes: Sequence[PairShape],
    batches: Sequence[Sequence[PairShape]] = (),
) -> Memory:
    """The peak of a run over `batches`; without them, of its longest pair alone."""
    longest = max(shapes, key=lambda shape: shape.stream)
    known = _beside_the_passes(costs, cost, longest)
    if costs.unsupported:
        return known
    held = known.libraries + known.desktop + known.weights + known.adapter
    free = max(1, costs.machine.memory - held) * SHARE
    may = known.layers if choice.checkpointing or choice.stream == "on" else 0
    segment: int | None = None
    if choice.stream == "on":
        layer = cost.kept_bytes(longest, checkpointed=may, offload=True) / longest.stream
        each, checkpointed = _beside_layers(cost, choice), may
        segment, tokens = fit_streamed(
            layer_bytes=layer, stream_bytes=each, free=free, longest=longest.stream, cap=costs.cap
        )
    else:
        tokens, checkpointed = fit(
            token_bytes=(cost.kept_bytes(longest) + cost.pass_bytes()) / longest.stream,  # as training measures it
            checkpoint_bytes=0 if choice.offload else cost.hidden * cost.itemsize,
            layers=known.layers,
            may_checkpoint=may,
            free=free,
            longest=longest.stream,
            cap=costs.cap,
        )
    lost = GAPS if costs.machine.kind == "cpu" else 0.0
    # The longest pair cannot be parted: it alone decides. Larger parts are made only where there is room.
    alone = parts_of([longest], tokens, choice)
    while checkpointed < may:  # as training does where memory runs out
        kept, working = _most(cost, alone, checkpointed, choice)
        if held + (kept + working) * (1 + lost) <= costs.machine.memory:
            break
        checkpointed += 1
    parts = [part for pairs in (*batches, [longest]) for part in parts_of(pairs, tokens, choice)]
    kept, working = _most(cost, parts, checkpointed, choice, segment)
    compared = _compared_bytes(cost)
    total = round(held + max((kept + working) * (1 + lost), known.answers, compared))
    one_row = max(answer_bytes(costs.asked, cost, free=0)[0], compared)
    least_kept, least_working = _most(cost, alone, may, choice)
    least = held + max(least_kept / SHARE, (least_kept + least_working) * (1 + lost), one_row)
    alone_kept, alone_working = _most(cost, alone, checkpointed, choice)
    room = checkpointed < may or alone_kept <= free
    fits = room and held + max((alone_kept + alone_working) * (1 + lost), one_row) <= costs.machine.memory
    return replace(
        known,
        activations=round(kept),
        working=round(working),
        gaps=round((kept + working) * lost),
        total=total,
        fits=fits,
        least=round(least),
        budget=tokens,
        part_tokens=max(sum(pair.stream for pair in part) for part in parts),
        checkpointed=checkpointed,
    )


def _beside_the_passes(costs: Costs, cost: CostModel, longest: PairShape) -> Memory:
    """All but what forward and backward passes keep, which is not known of TRL's own."""
    machine = costs.machine
    adapter = adapter_bytes(costs.run, cost)
    held = machine.libraries + machine.desktop + cost.weight_bytes + adapter
    answers, answered = answer_bytes(costs.asked, cost, free=machine.memory - held)
    answers += 2 * PIECE if answers and cost.streamed != "off" else 0  # of the head, which comes in pieces
    logits = _head_bytes(cost, longest.labels)
    return Memory(
        libraries=machine.libraries,
        desktop=machine.desktop,
        weights=cost.weight_bytes,
        adapter=adapter,
        activations=None,
        working=logits,
        gaps=0,
        answers=answers,
        answered=answered,
        total=held + max(answers, logits),
        available=machine.memory,
        fits=None,
        least=None,
        budget=0,
        part_tokens=0,
        checkpointed=0,
        layers=len(cost.layers) - cost.depth,
    )


def _compared_bytes(cost: CostModel) -> float:
    """Of a head that visits, what the check of the first batch takes, which has all of it at once, less what an
    optimiser would have by then."""
    head = cost.vocabulary * cost.hidden * cost.itemsize if cost.streamed != "off" else 0
    return float(max(0, head - 12 * cost.trainable))


def _beside_layers(cost: CostModel, choice: Choice) -> int:
    """Bytes that a token of a stream has while no layer runs on it."""
    inputs = 0 if choice.offload else (len(cost.layers) - cost.depth) * cost.hidden * cost.itemsize
    return inputs + stream_token_bytes(hidden=cost.hidden, itemsize=cost.itemsize)


def _most(
    cost: CostModel,
    parts: Sequence[Sequence[PairShape]],
    checkpointed: int,
    choice: Choice,
    segment: int | None = None,
) -> tuple[float, float]:
    """The most that any of these parts keeps, and the most that any works in.

    Args:
        segment: most tokens that run through a layer at once; a part's others have their hidden states alone.
    """
    from lora_dpo.engine.layout import pack

    each: list[tuple[float, float]] = []
    for part in parts:
        tokens = sum(pair.stream for pair in part)
        largest: Sequence[PairShape] = part
        if segment is not None and tokens > segment:
            groups = pack([pair.stream for pair in part], segment)
            several = ([part[index] for index in group] for group in groups)
            largest = max(several, key=lambda some: sum(pair.stream for pair in some))
        one, beside = part_bytes(cost, largest, checkpointed, offload=choice.offload)
        waiting = tokens - sum(pair.stream for pair in largest)
        each.append((one + waiting * _beside_layers(cost, choice), beside))
    kept, working = zip(*each, strict=True)
    return max(kept), max(working)


def part_bytes(
    cost: CostModel, part: Sequence[PairShape], checkpointed: int, *, offload: bool = False
) -> tuple[float, float]:
    """What a part keeps for its backward pass, and the space that it works in, at the peak.

    That is either in the head, before any layer is run again, or in the backward pass of a layer.
    """
    labels = sum(pair.labels for pair in part)
    head, layer = (
        sum(cost.kept_bytes(pair, checkpointed=checkpointed, offload=offload, at_head=at_head) for pair in part)
        + labels * cost.hidden * 4  # the head's gradient, [L, E] in float32, is made in its forward pass
        for at_head in (True, False)
    )
    merged = cost.pass_bytes(checkpointed=checkpointed)
    tokens = sum(pair.stream for pair in part)
    ahead = max(float(_head_bytes(cost, labels)), cost.norms_bytes(tokens, again=False))
    back = max(cost.backward_bytes(tokens), cost.norms_bytes(tokens, again=checkpointed > 0))
    return max((head + merged, ahead), (layer + merged, back), key=sum)


def _head_bytes(cost: CostModel, labels: int) -> int:
    """A tile of logits as `engine.logprobs` works on it, on a step that is logged."""
    from lora_dpo.engine.logprobs import TILE, rows_at_once

    rounded = cost.itemsize if cost.itemsize < 4 else 0
    if cost.streamed != "off":  # with the chunk of the head, the next one, and its share of the gradient
        rows = min(rows_at_once(labels), cost.vocabulary)
        return labels * rows * (4 + 4 + rounded) + 2 * rows * cost.hidden * cost.itemsize + labels * cost.hidden * 4
    tile = min(TILE, labels * cost.vocabulary)
    return tile * (4 + 4 + rounded)  # logits, their exponentials beside them, the softmax in the compute dtype


def adapter_bytes(run: Run, cost: CostModel) -> int:
    """float32 weight and gradient, Adam's two moments (in 8 bits, if asked for), and a frozen copy to hold to; the
    copy in the compute dtype that a pass makes.

    Of a fresh adapter there is no frozen copy: its reference is the base.
    """
    moments = 2 if "8bit" in str(run.settings.get("optim", "")) else 8
    copied = run.recipe.reference_adapter is not None
    return cost.trainable * (4 + 4 + moments + 4 * copied) + round(cost.rounded_bytes())
