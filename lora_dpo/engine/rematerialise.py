"""Cheap results are made again in the backward pass instead of being kept for it.

A layer keeps its norms' outputs and, for the adapters, the MLP's products, although both follow from tensors
that are kept anyway by a few elementwise operations. While `Rematerialiser.active` a recipe is kept in their
place: the same values again, no matrix product repeated.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lora_dpo.engine.trunk_cache import decoder_layers
from lora_dpo.model.visiting import visiting_of

Recipe = Callable[[], torch.Tensor]


def storage_of(tensor: torch.Tensor) -> int:
    """Which memory a tensor lies in, by its owner: tensors without values have no address."""
    return int(tensor.untyped_storage()._cdata)


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    return storage_of(tensor), int(tensor.storage_offset())


class Rematerialiser:
    """Hooks on one model instance, there only inside `active`: a model with hooks could not be pickled."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._recipes: dict[tuple[int, int], tuple[weakref.ref[torch.Tensor], Recipe]] | None = None
        self.kept: dict[int, int] | None = None
        """Set it to {} to count: bytes of each storage that a forward pass keeps for its backward pass."""
        self._saved: list[weakref.ref[torch.Tensor]] = []
        """What was saved while counting."""
        self._checkpointed = False
        self._made: tuple[Recipe | None, Any] = (None, None)
        """What was made again last."""
        self._visiting = visiting_of(model)
        if self._visiting is not None:
            self._visiting.leave()  # what is there now will lie elsewhere
        self._weights = {storage_of(parameter) for parameter in model.parameters()}
        self._hooks: list[tuple[Callable[[Any], Any], Any]] = []
        """What registers a hook, and the hook."""
        for part in model.modules():
            if type(part).__name__.endswith("RMSNorm") and part is not getattr(model, "norm", None):
                self._hooks.append((part.register_forward_hook, self._note_output))
            elif all(hasattr(part, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
                self._watch_mlp(part.down_proj, part.act_fn, part.up_proj, lambda up: up)
            elif all(hasattr(part, name) for name in ("gate_up_proj", "down_proj", "activation_fn")):
                self._watch_mlp(
                    part.down_proj, part.activation_fn, part.gate_up_proj, lambda both: both.chunk(2, -1)[1]
                )
        for layer in decoder_layers(model):
            self._hooks.append((layer.register_forward_pre_hook, self._enter_layer))

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Keep recipes for the length of the block, which runs the forward pass."""
        self._recipes, self._made = {}, (None, None)
        registered = [register(hook) for register, hook in self._hooks]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            self._recipes = None
            for saved in self._saved:
                if (tensor := saved()) is not None:  # else a graph was let go within the pass, such as DoRA's of a norm
                    self._count(tensor)
            self._saved.clear()
            for handle in registered:
                handle.remove()

    def release(self) -> None:
        """Let go of what was made again last."""
        self._made = (None, None)

    def _watch_mlp(self, down: Any, act: Any, up_source: Any, up_of: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """down(act(gate) * up): the activation follows from `gate`, the product from `gate` and `up`."""
        seen: dict[str, torch.Tensor] = {}

        def note_up(module: Any, inputs: Any, output: torch.Tensor) -> None:
            if self._recipes is not None:
                seen["up"] = up_of(output.detach())

        def note_act(module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            if self._recipes is not None:
                seen["gate"] = inputs[0].detach()
                self._note_output(module, inputs, output)

        def note_product(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            if self._recipes is not None:
                gate, up = seen.pop("gate", None), seen.pop("up", None)
                if gate is None or up is None:
                    return  # another forward pass was put into this module, such as a fused kernel's
                self.note(inputs[0], lambda: act(gate) * up, gate, up)

        self._hooks.append((up_source.register_forward_hook, note_up))
        self._hooks.append((act.register_forward_hook, note_act))
        self._hooks.append((down.register_forward_pre_hook, note_product))

    def _enter_layer(self, layer: Any, inputs: Any) -> None:
        # Recipes hold their sources: what the last layer did not keep for its backward pass is let go.
        if self._recipes is not None:
            self._recipes.clear()
        # A checkpointed layer keeps nothing but its input, and runs again in the backward pass.
        self._checkpointed = getattr(layer, "gradient_checkpointing", False) and layer.training

    def _note_output(self, module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if self._recipes is not None:
            source, forward = inputs[0].detach(), module.forward  # as it is now: the stream's own ends with its pass
            self.note(output, lambda: forward(source), source)

    def note(self, tensor: torch.Tensor, recipe: Recipe, *sources: torch.Tensor) -> None:
        """Remember how a tensor is made again from `sources`, so that it need not be kept."""
        if self._recipes is None or self._checkpointed:
            return
        self._recipes[_place(tensor)] = (weakref.ref(tensor), recipe)
        for source in sources:
            self._count(source)

    def _count(self, tensor: torch.Tensor) -> None:
        if self.kept is None or storage_of(tensor) in self._weights:
            return
        if self._visiting is None or not self._visiting.holds(tensor.untyped_storage()):
            self.kept[storage_of(tensor)] = tensor.untyped_storage().nbytes()

    def _pack(self, tensor: torch.Tensor) -> Any:
        # While the noted tensor lives, nothing else can lie at its address: only itself and its views.
        noted = self._recipes.get(_place(tensor)) if self._recipes else None
        original = noted[0]() if noted else None
        if noted is None or original is None or original.numel() != tensor.numel() or not tensor.is_contiguous():
            saved = tensor.detach()  # the tensor itself would keep the graph alive that keeps the tensor
            if self.kept is not None:
                self._saved.append(weakref.ref(saved))
            return saved
        return noted[1], tensor.shape

    def _unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        recipe, shape = packed
        if recipe is not self._made[0]:  # several layers read one norm's output, one after the other
            with torch.no_grad():
                self._made = recipe, recipe()
        made: torch.Tensor = self._made[1]
        return made.view(shape)
