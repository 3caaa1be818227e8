"""A of a fresh adapter from what its layers read (EVA, Paischer et al. 2024, arXiv 2410.07170): `lora.init: eva`.

The rows of A are the first principal directions of a layer's inputs over some of the training data; B is zero, so that
the policy begins as the reference. peft's own way counts the same rows again and again until a drawn approximation
settles, which never ends where there are fewer tokens than the rank. Here one pass is decomposed exactly.

Shape suffixes: N tokens, D width of a layer's input, R rank, B rows, T tokens of a row.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lora_dpo.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

TOKENS = 2048
"""Of the one pass, padding included: as many as scoring has in a batch."""
TRIED = 1024
"""Most examples that are looked at, to fill that pass."""


def drawn_batch(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Rows of token ids for one pass, drawn from all over the data, always the same: files are often sorted by kind.

    The longest quarter of them is cut to one width, and as many are taken as fill `TOKENS` at that width: else one long
    row would leave no room for others beside it.
    """
    order = random.Random(0).sample(range(len(rows)), min(len(rows), TRIED))  # noqa: S311
    lengths = sorted(len(rows[index]) for index in order)
    width = max(1, min(lengths[3 * len(lengths) // 4], TOKENS // 4))
    return [list(rows[index][:width]) for index in order[: TOKENS // width]]


def init_from_inputs(
    model: PeftModel, rows: Sequence[Sequence[int]], *, on_layer: Callable[[int], None] | None = None
) -> None:
    """Set A of every adapted layer to the first directions of its inputs over these rows; all else stays.

    Args:
        model: a base with a fresh adapter on it.
        on_layer: called with the number of layers done so far.

    Raises:
        ConfigError: an input has fewer directions than the adapter's rank, or the layer is none that reads vectors.
    """
    import torch

    from lora_dpo.model.lora import POLICY, base_of, reference

    layers = {name: part for name, part in model.named_modules() if hasattr(part, "lora_A")}
    for name, part in layers.items():
        _check_layer(name, part, POLICY)
    width = max(map(len, rows))
    device = base_of(model).get_input_embeddings().weight.device
    ids_BT = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    mask_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    hook = _Hook(mask_BT, on_layer)
    handles = [part.register_forward_hook(hook.of(name, part.lora_A[POLICY].weight)) for name, part in layers.items()]
    base = base_of(model)
    # logits only where the head has an adapter, too
    decoder = base if base.get_output_embeddings() in layers.values() else base.base_model
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), reference(model):
            decoder(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if unread := [name for name in layers if name not in hook.done]:
        raise ConfigError(f"lora.init: eva: {_short(unread[0])} read nothing of the first training rows. {_INSTEAD}")


def directions(x_ND: torch.Tensor) -> torch.Tensor:
    """The principal directions of rows around their mean, `[·, D]`, the strongest first, none that rounding made.

    The right singular vectors of the centred rows, by the eigenvectors of the smaller of both products.
    """
    import torch

    x_ND = x_ND.double()
    x_ND = x_ND - x_ND.mean(dim=0)
    wide = x_ND.shape[1] > x_ND.shape[0]
    values, vectors = torch.linalg.eigh(x_ND @ x_ND.T if wide else x_ND.T @ x_ND)
    values, vectors = values.flip(0), vectors.flip(1)
    # in the products singular values are squared, and so is what rounding leaves of those that are zero
    count = int((values > values[0].clamp(min=1e-300) * max(x_ND.shape) * torch.finfo(torch.float64).eps).sum())
    found_RD: torch.Tensor = vectors[:, :count].T
    if wide:
        found_RD = (found_RD @ x_ND) / values[:count, None].sqrt()
    largest_R1 = found_RD.abs().argmax(dim=1, keepdim=True)
    found_RD = found_RD * found_RD.gather(1, largest_R1).sign()  # their signs are free: the largest part is positive
    return found_RD.float()


_INSTEAD = "Leave lora.init at its default."


class _Hook:
    """Takes what layers read, and sets A; layers that read one tensor (queries, keys, values) have one computation."""

    def __init__(self, mask_BT: torch.Tensor, on_layer: Callable[[int], None] | None) -> None:
        self.mask_N = mask_BT.flatten().bool()
        self.on_layer = on_layer
        self.done: set[str] = set()
        self.last: tuple[Any, torch.Tensor] | None = None

    def of(self, name: str, a_RD: torch.Tensor) -> Callable[..., None]:
        """The forward hook of one layer."""

        def take(part: Any, given: tuple[Any, ...], output: Any) -> None:
            if name in self.done:
                return
            self.done.add(name)
            a_RD.copy_(self._directions(name, given[0], len(a_RD)))
            if self.on_layer:
                self.on_layer(len(self.done))

        return take

    def _directions(self, name: str, x: torch.Tensor, rank: int) -> torch.Tensor:
        if self.last is None or self.last[0] is not x:
            x_ND = x.reshape(-1, x.shape[-1])
            if len(x_ND) != len(self.mask_N):
                raise ConfigError(
                    f"lora.init: eva: {_short(name)} reads {len(x_ND)} vectors of {len(self.mask_N)} tokens, so that "
                    f"padding cannot be told. {_INSTEAD}"
                )
            x_ND = x_ND[self.mask_N.to(x_ND.device)]
            self.last = (x, directions(x_ND.cpu() if x.device.type == "mps" else x_ND))  # which has no float64
        found_RD = self.last[1]
        if rank > x.shape[-1]:
            raise ConfigError(
                f"lora.init: eva: the input of {_short(name)} has {x.shape[-1]} numbers, fewer than the rank {rank}. "
                "Lower lora.rank, or that layer's in lora.rank_pattern."
            )
        if rank > len(found_RD):
            raise ConfigError(
                f"lora.init: eva: over the training rows that are read the input of {_short(name)} has no more than "
                f"{len(found_RD)} directions, fewer than the rank {rank}. Lower lora.rank, or leave lora.init at its "
                "default."
            )
        return found_RD[:rank]


def _check_layer(name: str, part: Any, adapter: str) -> None:
    import torch

    if adapter not in part.lora_A or not isinstance(part.lora_A[adapter], torch.nn.Linear):
        raise ConfigError(f"lora.init: eva takes A from what a layer reads, and {_short(name)} is no linear layer.")


def _short(name: str) -> str:
    return name.removeprefix("base_model.model.")
