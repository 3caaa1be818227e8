"""Norms and adapters by one autograd function each: fewer kernels, less traffic, less kept for the backward pass.

Shape suffixes: S tokens, I inputs and O outputs of a linear layer, r rank, E width that a norm goes over.

Plain autograd keeps a norm's input a second time in float32 and takes eight passes over it; PEFT's forward takes the
adapter's product through three more tensors of the layer's size. The functions here compute the same, up to rounding:

    norm      y = x̂·w or x̂·(1 + w),  x̂ = x·ρ,  ρ = (mean x² + ε)^(-1/2);  Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4
              ∂x = ρ·(u - x̂·mean(u·x̂)),  u = ∂y·w
    adapter   y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ;  Hu et al. 2021, arXiv 2106.09685, eq. 3
              ∂x = ∂y·W + s·(∂y·B)·A,  ∂A = s·(∂y·B)ᵀ·x,  ∂B = s·∂yᵀ·(x·Aᵀ)

A module gets such a function when it is known to compute just this: a norm by trying it, an adapter by being plain LoRA
on a linear layer whose frozen weight can be read. All others keep their own forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lora_dpo.engine.products import product
from lora_dpo.model.plain_lora import is_lora, plain_adapter
from lora_dpo.model.quantised import weight_value

Forward = Callable[..., torch.Tensor]


class FusedLayers:
    """The modules of one model that can have another forward pass, which they have from `install` to `remove`.

    Adapters may come and go: whether one is plain is asked in each call.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._forwards: list[tuple[torch.nn.Module, Forward]] = []
        self._adapted: list[Any] = []
        self._rounded: dict[torch.Tensor, torch.Tensor] = {}
        """Of each adapter's weight, its copy in autocast's precision, made for one pass."""
        for part in model.modules():
            if "forward" in vars(part):
                continue  # somebody else's
            if is_lora(part):
                self._adapted.append(part)
                self._forwards.append((part, self._of_adapter(part)))
            elif is_norm(part) and (offset := norm_offset(part)) is not None:
                self._forwards.append((part, _of_norm(part, offset)))

    def install(self) -> None:
        """Give the modules their fused forward passes, for one pass and its backward pass."""
        for part, forward in self._forwards:
            part.forward = forward
        self._round()

    def remove(self) -> None:
        """Give them back their own."""
        for part, _ in self._forwards:
            vars(part).pop("forward", None)
        self._rounded = {}

    def _round(self) -> None:
        """Copy all adapters in autocast's precision at once: by themselves they would be two kernels a layer each."""
        weights = [weight for part in self._adapted if not part.disable_adapters for weight in _adapter_weights(part)]
        kind = weights[0].device.type if weights else "cpu"
        if not weights or not torch.is_autocast_enabled(kind):
            self._rounded = {}
            return
        dtype = torch.get_autocast_dtype(kind)
        with torch.no_grad():
            copies = [torch.empty_like(weight, dtype=dtype) for weight in weights]
            torch._foreach_copy_(copies, weights)
        self._rounded = dict(zip(weights, copies, strict=True))

    def _of_adapter(self, part: Any) -> Forward:
        own = part.forward

        def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            adapter = None if args or kwargs else fusible(part, hidden)
            if adapter is None:
                return own(hidden, *args, **kwargs)  # type: ignore[no-any-return]
            first_rI, second_Or, scaling = adapter
            rounded = (self._rounded.get(first_rI), self._rounded.get(second_Or))
            return fused_lora(hidden, first_rI, second_Or, scaling, base=part.base_layer, rounded=rounded)

        return forward


def _of_norm(part: Any, offset: float) -> Forward:
    own, eps = part.forward, _eps(part) or 0.0

    def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs:  # a gate
            return own(hidden, *args, **kwargs)  # type: ignore[no-any-return]
        return fused_rms_norm(hidden, part.weight, eps=eps, offset=offset)

    return forward


# ---- norms


def is_norm(part: Any) -> bool:
    """Whether a module has what a norm has: one frozen vector, and an ε that is a float."""
    weight = getattr(part, "weight", None)
    return (
        isinstance(weight, torch.nn.Parameter) and weight.dim() == 1 and not weight.requires_grad and bool(_eps(part))
    )


def norm_offset(part: Any) -> float | None:
    """What an RMS norm adds to its weight, 0 or 1 (Gemma); None if trying shows that it computes something else."""
    weight, eps = part.weight, _eps(part) or 0.0
    draw = torch.Generator().manual_seed(0)
    with torch.device("cpu"), torch.no_grad(), torch.autocast("cpu", enabled=False):
        hidden_2E, weight_E = (torch.randn(*shape, len(weight), generator=draw) for shape in ((2,), ()))
        hidden_2E[1] *= eps**0.5  # where ε counts
        try:
            found_2E = torch.func.functional_call(part, {"weight": weight_E}, (hidden_2E,))
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            return None  # it takes something beside, such as a gate
        if not isinstance(found_2E, torch.Tensor) or found_2E.shape != hidden_2E.shape:
            return None
        for offset in (0.0, 1.0):
            wanted_2E, _ = _norm_forward(hidden_2E, weight_E, eps, offset)
            if torch.allclose(found_2E, wanted_2E, rtol=1e-5, atol=1e-6):
                return offset
    return None


def _eps(part: Any) -> float | None:
    eps = getattr(part, "variance_epsilon", getattr(part, "eps", None))
    return eps if isinstance(eps, float) else None


def fused_rms_norm(hidden: torch.Tensor, weight_E: torch.Tensor, *, eps: float, offset: float = 0.0) -> torch.Tensor:
    """RMS norm over the last axis under a frozen weight.

    Args:
        hidden: any shape that ends in E.
        eps: ε, in the units of the mean square.
        offset: added to the weight.
    """
    result: torch.Tensor = _RmsNorm.apply(hidden, weight_E, eps, offset)  # type: ignore[no-untyped-call]
    return result


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight_E, eps, offset):  # type: ignore[no-untyped-def]
        result, scale = _norm_forward(hidden, weight_E, eps, offset)
        ctx.save_for_backward(hidden, scale)
        ctx.weight, ctx.offset = weight_E, offset
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):  # type: ignore[no-untyped-def]
        hidden, scale = ctx.saved_tensors
        return _norm_backward(grad, hidden, scale, ctx.weight, ctx.offset), None, None, None


def has_norm_kernels(device: torch.device) -> bool:
    """Whether torch has a norm's forward and backward pass as one kernel each there: on NVIDIA GPUs, from 2.9 on."""
    return device.type == "cuda" and hasattr(torch.ops.aten, "_fused_rms_norm_backward")


def norm_kernel(hidden: torch.Tensor, weight_E: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`(y, ρ)` by one kernel, where the device has it."""
    return torch.ops.aten._fused_rms_norm(hidden, weight_E.shape, weight_E, eps)  # type: ignore[no-any-return]


def norm_slope_kernel(
    grad: torch.Tensor, hidden: torch.Tensor, scale: torch.Tensor, weight_E: torch.Tensor
) -> torch.Tensor:
    """∂x by one kernel."""
    given = (grad, hidden, weight_E.shape, scale, weight_E, [True, False])
    return torch.ops.aten._fused_rms_norm_backward(*given)[0]  # type: ignore[no-any-return]


def _norm_forward(
    hidden: torch.Tensor, weight_E: torch.Tensor, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(y, ρ)`. The kernel rounds once, what is below where Llama's and Gemma's own norms round."""
    if has_norm_kernels(hidden.device):
        inside, weight = _for_kernel(hidden, weight_E, offset)
        result, scale = norm_kernel(inside, weight, eps)
        return result.to(hidden.dtype), scale
    wide = hidden.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    unit = wide * scale
    if offset:
        return unit.mul_(weight_E.float() + offset).to(hidden.dtype), scale
    return weight_E * unit.to(hidden.dtype), scale


def _norm_backward(
    grad: torch.Tensor, hidden: torch.Tensor, scale: torch.Tensor, weight_E: torch.Tensor, offset: float
) -> torch.Tensor:
    if has_norm_kernels(hidden.device):
        inside, weight = _for_kernel(hidden, weight_E, offset)
        return norm_slope_kernel(grad.to(inside.dtype), inside, scale, weight).to(hidden.dtype)
    slope = grad.float() * (weight_E.float() + offset if offset else weight_E)
    unit = hidden.float() * scale
    mean = (slope * unit).mean(dim=-1, keepdim=True)
    return slope.sub_(unit.mul_(mean)).mul_(scale).to(hidden.dtype)


def _for_kernel(hidden: torch.Tensor, weight_E: torch.Tensor, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and weight of one dtype, as the kernel wants them; 1 + w has too many digits for 16 bits."""
    if offset or hidden.dtype != weight_E.dtype:
        return hidden.float(), weight_E.float() + offset
    return hidden, weight_E


# ---- adapters


def _adapter_weights(part: Any) -> list[torch.Tensor]:
    names = [name for name in part.active_adapters if name in part.lora_A]
    return [one[name].weight for name in names for one in (part.lora_A, part.lora_B)]


def fusible(part: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """A, B and s of a plain layer's adapter, if both compute in one precision and the layer's weight can be read.

    Without autocast the first is not so of an adapter in float32 on a layer in 16 bits: peft casts to and fro.
    """
    name, base, kind = plain_adapter(part), part.base_layer, hidden.device.type
    if name is None:
        return None
    first, second = part.lora_A[name].weight, part.lora_B[name].weight
    rounds = torch.is_autocast_enabled(kind)
    wanted = torch.get_autocast_dtype(kind) if rounds else first.dtype
    if is_packed(base):
        fits = hidden.dtype == wanted and base.compute_dtype in (None, wanted)
    else:
        fits = type(base) is torch.nn.Linear and (rounds or base.weight.dtype == hidden.dtype == wanted)
    return (first, second, float(part.scaling[name])) if fits else None


def is_packed(base: Any) -> bool:
    """Whether a linear layer holds its weight in bitsandbytes' 4 bits."""
    return getattr(getattr(base, "weight", None), "quant_state", None) is not None


def frozen_weight(base: Any) -> torch.Tensor:
    """W of a linear layer, `[O, I]`, unpacked if it is held in 4 bits."""
    value: torch.Tensor = weight_value(base) if is_packed(base) else base.weight.detach()
    return value


def fused_lora(
    hidden: torch.Tensor,
    first_rI: torch.Tensor,
    second_Or: torch.Tensor,
    scaling: float,
    *,
    base: Any,
    rounded: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
) -> torch.Tensor:
    """A frozen linear layer with its adapter: x·Wᵀ + s·(x·Aᵀ)·Bᵀ, and the layer's own bias.

    Args:
        hidden: any shape that ends in I.
        first_rI: A, as it is trained.
        second_Or: B.
        base: the layer, a `torch.nn.Linear` or bitsandbytes' `Linear4bit`.
        rounded: A and B in the precision of the products, where somebody has them.
    """
    given = (hidden, first_rI, second_Or, *rounded, scaling, base)
    result: torch.Tensor = _Lora.apply(*given)  # type: ignore[no-untyped-call]
    return result


class _Lora(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, first_rI, second_Or, rounded_rI, rounded_Or, scaling, base):  # type: ignore[no-untyped-def]
        result = base(hidden)
        dtype = result.dtype
        rounded_rI = first_rI.to(dtype) if rounded_rI is None else rounded_rI
        rounded_Or = second_Or.to(dtype) if rounded_Or is None else rounded_Or
        hidden_SI = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
        inner_Sr = hidden_SI @ rounded_rI.t()
        result.view(-1, result.shape[-1]).addmm_(inner_Sr, rounded_Or.t(), alpha=scaling)
        ctx.save_for_backward(hidden_SI, inner_Sr)
        ctx.rounded, ctx.masters = (rounded_rI, rounded_Or), (first_rI.dtype, second_Or.dtype)
        ctx.scaling, ctx.base, ctx.shape, ctx.dtype = scaling, base, hidden.shape, hidden.dtype
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):  # type: ignore[no-untyped-def]
        hidden_SI, inner_Sr = ctx.saved_tensors
        (first_rI, second_Or), masters = ctx.rounded, ctx.masters
        grad_SO = grad.reshape(-1, grad.shape[-1])
        # without `beta` the scale would be a kernel of its own
        inner_grad_Sr = torch.empty_like(inner_Sr).addmm_(grad_SO, second_Or, beta=0, alpha=ctx.scaling)
        of_first = of_second = of_hidden = None
        if ctx.needs_input_grad[1]:
            of_first = product(inner_grad_Sr.t(), hidden_SI, masters[0])
        if ctx.needs_input_grad[2]:
            of_second = product(grad_SO.t(), inner_Sr, masters[1]).mul_(ctx.scaling)
        if ctx.needs_input_grad[0]:
            of_hidden = grad_SO @ frozen_weight(ctx.base).to(grad_SO.dtype)
            of_hidden = of_hidden.addmm_(inner_grad_Sr, first_rI).view(ctx.shape).to(ctx.dtype)
        return of_hidden, of_first, of_second, None, None, None, None
