"""The device that computes, what it computes fast, how much of its memory is free, and when it ran out."""

from __future__ import annotations

import gc
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dpo.config.recipe import Dtype
from lora_dpo.errors import ConfigError
from lora_dpo.systems import wants_apple_gpu

if TYPE_CHECKING:
    import torch


def pick_device() -> torch.device:
    """The NVIDIA GPU if there is one, or Apple's if it is asked for (LORA_DPO_DEVICE=mps). Raises `ConfigError`."""
    import torch

    if wants_apple_gpu():
        if not torch.backends.mps.is_available():
            raise ConfigError(
                "LORA_DPO_DEVICE is mps, but torch offers no Apple GPU here. Unset it to compute on the CPU."
            )
        return torch.device("mps")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """What a person calls it."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "Apple GPU (untested)" if device.type == "mps" else f"CPU, {torch.get_num_threads()} threads"


def pick_dtype(dtype: Dtype, device: torch.device) -> str:
    """The compute dtype for "auto": what the hardware multiplies fast without losing the adapter's signal.

    bfloat16 on Ampere and newer and on Apple's GPUs, float16 on older ones. float32 on every CPU: without AMX or
    AVX512-BF16 a bf16 product runs 4 to 7 times slower, and with them the whole step gained less
    than a half (docs/decisions.md), at the price of log-probabilities good to 2 digits.
    """
    import torch

    if dtype != "auto":
        return dtype
    if device.type == "mps":
        return "bfloat16" if torch.backends.mps.is_macos_or_newer(14, 0) else "float32"
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def free_bytes(device: Any) -> int:
    """Memory that is free for this process: on the GPU, or its share of the machine's (or the container's)."""
    import psutil
    import torch

    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + cached)
    free = min(psutil.virtual_memory().available, container_bytes())
    return int(free) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torch's launchers set it


def peak_of_process() -> int:
    """Most bytes that this process has held so far."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def container_bytes(folder: Path = Path("/sys/fs/cgroup")) -> float:
    """Memory that is free under this control group's own limit (cgroup v2); infinite without one."""
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        if limit == "max":
            return math.inf
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        counted = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        return max(0, int(limit) - used + int(counted.get("inactive_file", 0)))  # file caches are given back
    except (OSError, ValueError):
        return math.inf


def give_back_memory() -> None:
    """Let go of what nothing refers to any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or, under a limit, on a CPU."""
    import torch

    said = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in said for words in _OUT_OF_MEMORY)


_OUT_OF_MEMORY = (
    "can't allocate memory",  # torch on a CPU, under a limit
    "not enough memory",  # the same on Windows
    "out of memory",  # the CUDA driver, outside torch's allocator; bitsandbytes; Apple's GPU
    "ALLOC_FAILED",  # cuBLAS and cuDNN, for their working space
)
