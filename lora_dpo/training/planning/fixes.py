"""The first settings that make a run fit, in the order of what they cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lora_dpo.model.stored_form import can_pack
from lora_dpo.training.planning.memory_plan import Choice, Costs, Fix, Memory, memory_of

if TYPE_CHECKING:
    from lora_dpo.engine.cost_model import CostModel


def find_fix(costs: Costs, choice: Choice, *, roomy: bool = False) -> Fix | None:
    """The first settings that fit.

    In this order: what changes no number (smaller parts are no setting: training makes them by itself), shorter
    answers, a 4-bit base.

    Args:
        roomy: the first that do not only fit, but are not tight either.
    """
    bases = [choice]
    if can_pack(choice.quantize) and not choice.packed:  # the same function in a quarter of the memory or less
        bases.append(replace(choice, packed=True, overrides=("model.packed=true",)))
    if (found := _first_fit(costs, bases, roomy)) is not None:
        return found
    if (found := _shorten(costs, _smallest(costs, bases[-1]), roomy)) is not None or choice.quantize != "none":
        return found
    held = ("model.quantize=nf4",) if costs.machine.kind == "cuda" else ("model.quantize=nf4", "model.packed=true")
    small = replace(choice, quantize="nf4", packed=True, overrides=held)
    return _first_fit(costs, [small], roomy) or _shorten(costs, _smallest(costs, small), roomy)


def _enough(memory: Memory, roomy: bool) -> bool:
    return memory.verdict == "fits" if roomy else bool(memory.fits)


def fits_without_desktop(costs: Costs, cost: CostModel, choice: Choice) -> bool:
    """Whether a run fits on a card that no desktop shows on."""
    if not costs.machine.desktop:
        return False
    headless = replace(costs, machine=replace(costs.machine, desktop=0))
    return bool(memory_of(headless, cost, choice, costs.shapes).fits)


def _first_fit(costs: Costs, bases: Sequence[Choice], roomy: bool) -> Fix | None:
    for base in bases:
        for tried in _savers(costs, base):
            found = memory_of(costs, costs.footprint(tried), tried, costs.shapes)
            if _enough(found, roomy):
                return Fix(tried.overrides, found.total, pairs_lost=0, pairs_cut=0)
    return None


def _smallest(costs: Costs, choice: Choice) -> Choice:
    """The choice with all memory savers."""
    return list(_savers(costs, choice))[-1]


def _may_stream(costs: Costs) -> bool:
    """Whether weights can visit the device: not where something needs them all the time."""
    lora = costs.run.recipe.lora
    needed = lora.dora or lora.modules_to_save or lora.parameters
    return costs.machine.kind == "cuda" and costs.unsupported is None and not needed


def _savers(costs: Costs, choice: Choice) -> Iterator[Choice]:
    """The choice, then with one more memory saver after the other, in the order of what they cost in time; none of them
    changes the gradient.

    Computing a layer again is a pass more over some layers; a copy of its input goes there and back. The head comes
    twice a part, the layers twice a step while others compute; running each answer on its own computes every prompt
    twice and every pass once more.
    """
    on_a_card = costs.machine.kind == "cuda"
    yield choice
    if not choice.checkpointing:
        choice = replace(
            choice, checkpointing=True, overrides=(*choice.overrides, "trainer.gradient_checkpointing=true")
        )
        yield choice
    if not choice.offload and on_a_card:
        choice = replace(choice, offload=True, overrides=(*choice.overrides, "engine.offload=true"))
        yield choice
    for stream in ("embeddings", "on") if _may_stream(costs) else ():
        if choice.stream == "off" or (choice.stream == "embeddings" and stream == "on"):
            others = tuple(one for one in choice.overrides if not one.startswith("model.stream="))
            choice = replace(choice, stream=stream, overrides=(*others, f"model.stream={stream}"))
            yield choice
    if not choice.split_pairs:
        yield replace(choice, split_pairs=True, overrides=(*choice.overrides, "engine.split_pairs=true"))


def _shorten(costs: Costs, choice: Choice, roomy: bool) -> Fix | None:
    """The longest `max_length`, in steps of 64, that fits beside `choice` and keeps half of the pairs."""
    cost = costs.footprint(choice)
    longest = max(max(shape.first, shape.second) for shape in costs.shapes)
    low, high, found = 1, (longest - 1) // 64, None
    while low <= high:
        middle = (low + high) // 2
        kept = [short for shape in costs.shapes if (short := shape.cut(middle * 64)) is not None]
        memory = memory_of(costs, cost, choice, kept) if 2 * len(kept) >= len(costs.shapes) else None
        if memory is None:
            low = middle + 1
        elif _enough(memory, roomy):
            cut = sum(max(shape.first, shape.second) > middle * 64 for shape in costs.shapes)
            lost = len(costs.shapes) - len(kept)
            found = Fix((*choice.overrides, f"trainer.max_length={middle * 64}"), memory.total, lost, cut - lost)
            low = middle + 1
        else:
            high = middle - 1
    return found
