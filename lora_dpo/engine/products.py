"""Matrix products whose sums are wanted in more digits than their factors have."""

from __future__ import annotations

import torch


def widens(device: torch.device) -> bool:
    """Whether the device's product can hand out its float32 sums without rounding them: NVIDIA GPUs, torch 2.8 on."""
    return device.type == "cuda" and hasattr(torch.ops.aten.mm, "dtype")


def wide_product(left_MK: torch.Tensor, right_KN: torch.Tensor) -> torch.Tensor:
    """The float32 sums of a product of 16-bit factors, where the device `widens`."""
    return torch.mm(left_MK, right_KN, out_dtype=torch.float32)


def product(left_MK: torch.Tensor, right_KN: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`[M, N]` in `dtype`: rounded to the factors' 16 bits on the way only where the device cannot do without."""
    if dtype == torch.float32 != left_MK.dtype and widens(left_MK.device):
        return wide_product(left_MK, right_KN)
    return torch.mm(left_MK, right_KN).to(dtype)
