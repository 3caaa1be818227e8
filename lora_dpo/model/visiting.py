"""Frozen weights that live in main memory and visit the device that computes: a base larger than a card.

Shape suffixes: V vocabulary, E hidden width, S tokens.

Decoder layers come one by one, the next one on its way while one computes, and at most two are there at a time. While
it is away a weight keeps its shape, type and device, and all its values are NaN: who reads it then gets NaN, and no
number that looks right. Of embeddings the rows that are looked up come, of the head some rows after the other. Adapters
never leave: what visits is what was frozen when the visits began.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from lora_dpo.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ALIGNMENT = 256
"""Bytes: where each weight of a layer begins, as an allocator would have it."""
PIECE = 1 << 27
"""Bytes of the head that come at once for plain logits."""


def visiting_of(model: Any) -> VisitingWeights | None:
    """The weights of a base model that visit, or None where all are at home on the device."""
    found: VisitingWeights | None = vars(model).get("visiting")
    return found


def refusal(model: PreTrainedModel) -> str | None:
    """Why the weights of a base cannot visit, or None."""
    import torch

    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if type(head) is not torch.nn.Linear or not isinstance(embeddings, torch.nn.Embedding):
        return f"{type(model).__name__} has no plain embeddings and head"
    if not isinstance(getattr(model.base_model, "layers", None), torch.nn.ModuleList):
        return f"{type(model).__name__} keeps its decoder layers elsewhere than in one list called layers"
    for part in model.modules():
        kind = type(part)
        if kind.__module__.startswith("bitsandbytes.") and kind.__name__ != "Linear4bit":
            return "of bitsandbytes' weights only those in 4 bits can"
        if isinstance(part, torch.nn.Linear | torch.nn.Embedding) and "forward" in vars(part):
            return "something else moves its weights already"
    return None


def let_visit(model: PreTrainedModel, device: torch.device, *, layers: bool) -> None:
    """Have a base that was loaded into main memory compute on a device: what does not visit it moves there.

    Raises:
        ModelError: as `VisitingWeights`.
    """
    import torch

    VisitingWeights(model, device, layers=layers)
    model.to(device)
    if hasattr(model, "hf_device_map"):  # accelerate compares it with the device that it trains on, number and all
        number = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
        model.hf_device_map = {"": torch.device(device.type, number)}


class VisitingWeights:
    """The frozen weights of one base model, from now on. What does not visit stays where it is.

    Args:
        device: where they visit.
        layers: whether decoder layers visit as well, beside embeddings and head.

    Raises:
        ModelError: weights of this model cannot visit.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, *, layers: bool) -> None:
        if (reason := refusal(model)) is not None:
            raise ModelError(f"model.stream moves weights, and those of this model cannot be moved: {reason}.")
        self.device = device
        self.reads: Counter[int] = Counter()
        """How often each layer came."""
        self.head_rows_read = 0
        self._way = _Way(device)
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        self.tied = embeddings.weight is head.weight
        self._embeddings, self._head = embeddings, head
        self._embedding_rows = _Home([_Weight.of(embeddings.weight)], device)
        self._head_rows = self._embedding_rows if self.tied else _Home([_Weight.of(head.weight)], device)
        self._look_up, embeddings.forward = embeddings.forward, self._embed
        head.forward = self._project
        self.layers: list[_Home] = []
        """Those that visit."""
        self._at, self._here = -1, dict[int, _Visit]()
        for number, layer in enumerate(model.base_model.layers if layers else ()):
            self.layers.append(_Home(list(_frozen(layer)), device))
            layer.register_forward_pre_hook(functools.partial(_announce, self, number))
        vars(model)["visiting"] = self

    def __deepcopy__(self, memo: Any) -> NoReturn:
        """Refused: of two trees over the same weights each would send away what the other computes with."""
        raise ModelError("A base whose weights visit the device (model.stream) has one tree of modules alone.")

    @property
    def resident(self) -> frozenset[int]:
        """The layers that are on the device now, or on their way."""
        return frozenset(self._here)

    def holds(self, storage: torch.UntypedStorage) -> bool:
        """Whether some memory is that of a layer that is there."""
        return any(visit.whole.untyped_storage()._cdata == storage._cdata for visit in self._here.values())

    def value(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight's, or a scale's, own values wherever they are."""
        for home in (self._embedding_rows, self._head_rows, *self.layers):
            if (found := home.value(weight)) is not None:
                return found
        return weight

    def arrive(self, number: int) -> None:
        """Have a layer's weights on the device, send away those of all others but of the one that is expected next.

        Expected is the next one in the direction of travel: up in a forward pass, down in a backward pass. At either
        end it turns: the last layer of a forward pass is the first of the backward pass, and need not come again.
        """
        if number == self._at:
            return
        step = 1 if number > self._at else -1
        following = number + step if 0 <= number + step < len(self.layers) else number - step
        for other in set(self._here) - {number, following}:
            self._here.pop(other).leave()
        for one in (number, following):
            if one not in self._here and 0 <= one < len(self.layers):
                self._here[one] = self._way.send(self.layers[one])
                self.reads[one] += 1
        self._here[number].arrive()
        self._at = number

    def leave(self) -> None:
        """Send all layers away."""
        while self._here:
            self._here.popitem()[1].leave()
        self._at = -1

    def head_rows(self, count: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The head's weight on the device, `count` rows after the other: the first one's number, and `[c, E]`."""
        (home_VE,) = self._head_rows.values
        starts = range(0, len(home_VE), count)
        coming = None
        try:
            for start, following in zip(starts, [*starts[1:], None], strict=True):
                visit = coming or self._way.carry(home_VE[start : start + count])
                coming = None if following is None else self._way.carry(home_VE[following : following + count])
                visit.wait()
                self.head_rows_read += len(visit.whole)
                yield start, visit.whole
        finally:  # memory that a copy is on its way to is nobody else's until it has come
            if coming is not None:
                coming.wait()

    def whole_head(self) -> _WholeHead:
        """Inside the block the head's weight is on the device, for those who read it past the module."""
        return _WholeHead(self._head_rows, self._way)

    def _project(self, hidden: torch.Tensor) -> torch.Tensor:
        """The head's forward pass."""
        import torch

        (home_VE,) = self._head_rows.values
        rows = max(1, PIECE // (home_VE.shape[1] * home_VE.element_size()))
        logits = [torch.nn.functional.linear(hidden, weight_cE) for _, weight_cE in self.head_rows(rows)]
        whole = torch.cat(logits, dim=-1)
        return whole if self._head.bias is None else whole + self._head.bias

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        """The embeddings' forward pass: their own, on the rows of these tokens alone."""
        import torch

        (home_VE,), part = self._embedding_rows.values, self._embeddings
        rows_SE = home_VE.index_select(0, ids.reshape(-1).to("cpu")).to(self.device)
        away, unused = part.weight.data, part.padding_idx
        part.weight.data, part.padding_idx = rows_SE, None  # which only gradients would read
        try:
            places = torch.arange(ids.numel(), device=self.device).view(ids.shape)
            found: torch.Tensor = self._look_up(places)
        finally:
            part.weight.data, part.padding_idx = away, unused
        return found


def _announce(weights: VisitingWeights, number: int, layer: Any, given: Any) -> None:
    weights.arrive(number)


@dataclass
class _Weight:
    """A tensor that visits: where it is read and put, and what stands there while it is away."""

    owner: Any
    name: str
    away: torch.Tensor

    @classmethod
    def of(cls, owner: Any, name: str = "data") -> _Weight:
        """A parameter's data, or one tensor of a quantised weight's state."""
        return cls(owner, name, getattr(owner, name))

    def put(self, value: torch.Tensor) -> None:
        """Have the owner use these values."""
        setattr(self.owner, self.name, value)


def _frozen(layer: torch.nn.Module) -> Iterator[_Weight]:
    """A layer's frozen weights. Of one in 4 bits its scales as well, and their mean, so that it is NaN while away."""
    for parameter in layer.parameters():
        if parameter.requires_grad:
            continue
        yield _Weight.of(parameter)
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            yield _Weight.of(state, "absmax")
            if state.nested:
                yield _Weight.of(state, "offset")


class _Home:
    """Weights in main memory, in one piece: pinned where a GPU reads it."""

    def __init__(self, weights: Sequence[_Weight], device: torch.device) -> None:
        import torch

        self.weights, self._looks = weights, [(one.away.shape, one.away.dtype) for one in weights]
        size = sum(_padded(one.away) for one in weights)
        self.whole = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.values = self.views(self.whole)
        for view, weight in zip(self.values, weights, strict=True):
            view.copy_(weight.away)
            blank = math.nan if view.is_floating_point() else 0
            weight.away = torch.full((), blank, dtype=view.dtype, device=device).expand(view.shape)
            weight.put(weight.away)

    def views(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """The weights in a piece of memory."""
        found, start = [], 0
        for shape, dtype in self._looks:
            size = math.prod(shape) * dtype.itemsize
            found.append(whole[start : start + size].view(dtype).view(shape))
            start += -(-size // ALIGNMENT) * ALIGNMENT
        return found

    def value(self, weight: torch.Tensor) -> torch.Tensor | None:
        """The values of one of these, by the parameter or by the tensor that stands for a scale now."""
        for one, view in zip(self.weights, self.values, strict=True):
            if one.owner is weight or getattr(one.owner, one.name) is weight:
                return view
        return None

    def leave(self) -> None:
        """Let what stands for them take their places."""
        for weight in self.weights:
            weight.put(weight.away)


def _padded(tensor: torch.Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT


class _Carried:
    """A copy on the device, or on its way there."""

    def __init__(self, whole: torch.Tensor, done: Any) -> None:
        self.whole, self._done = whole, done

    def wait(self) -> None:
        """Let what is computed from now on wait for it; the CPU does not."""
        import torch

        if self._done is not None:
            torch.cuda.current_stream(self.whole.device).wait_event(self._done)
            self._done = None


class _Visit(_Carried):
    """A layer's weights on the device, or on their way there."""

    def __init__(self, home: _Home, whole: torch.Tensor, done: Any) -> None:
        super().__init__(whole, done)
        self.home, self.views = home, home.views(whole)

    def arrive(self) -> None:
        """Put them into their places."""
        self.wait()
        for weight, view in zip(self.home.weights, self.views, strict=True):
            weight.put(view)

    def leave(self) -> None:
        """Take them out again; their memory is free for what is computed after it."""
        self.wait()
        self.home.leave()


class _Way:
    """Copies to a device, on a stream of their own where it is a GPU."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self.device = device
        self._side: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def send(self, home: _Home) -> _Visit:
        """Begin to copy a layer."""
        return _Visit(home, *self._copy(home.whole))

    def carry(self, values: torch.Tensor) -> _Carried:
        """Begin to copy a tensor."""
        return _Carried(*self._copy(values))

    def _copy(self, values: torch.Tensor) -> tuple[torch.Tensor, Any]:
        import torch

        there = torch.empty_like(values, device=self.device)
        if self._side is None:
            return there.copy_(values), None
        # its memory may be that of weights which are in use until now
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            there.copy_(values, non_blocking=True)
        return there, self._side.record_event()


class _WholeHead:
    def __init__(self, home: _Home, way: _Way) -> None:
        self._home, self._way = home, way

    def __enter__(self) -> None:
        self._way.send(self._home).arrive()

    def __exit__(self, *_: object) -> None:
        self._home.leave()
