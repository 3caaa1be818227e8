"""Whether two checkpoints are one model in two forms, such as a 16-bit one and what somebody made of it in 4 bits.

Of each weight one window of 64 numbers is looked at, the block of bitsandbytes' 4-bit forms, over its largest number. A
finer window is rounded to the codes of the coarser one: of one origin they are the same codes.

    c(w) = argmin_c |w / max |w| - c|     c: the 16 numbers of NF4 or FP4 (Dettmers et al. 2023, appendix E)
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from lora_dpo.data.pairs import evenly_spaced
from lora_dpo.model.identity import weight_files
from lora_dpo.model.quantised import stored_value
from lora_dpo.model.tensor_file import open_tensors

if TYPE_CHECKING:
    import numpy as np

    Window = tuple[str, np.ndarray[Any, Any]]
    """How a weight is stored, and 64 of its numbers over the largest of them, in float16."""

WINDOW = 64
CARRIED = 32
"""Weights of a sample that travels in a passport: about 6 kB."""
FEWEST = 4
"""Weights that two samples must have in common, quantised in one of them."""

SAME_CODES = {"16": 0.97, "int8": 0.8, "fp8": 0.8, "nf4": 0.99, "fp4": 0.99}
"""Least mean share of equal codes, by how the finer one is stored: float16 moves few numbers over a code's border, and
8-bit rounding more. Of other weights about a tenth are equal."""
IN_EACH = 0.1
"""What a single window may have less: one matrix alone that differs is another model, too."""
SAME_NUMBERS = 0.06
"""Most root mean square of the difference between a window and its 8-bit form, over that of the window."""


def origin_sample(
    path: str, *, revision: str | None = None, most: int | None = None, only: Collection[str] | None = None
) -> dict[str, Window]:
    """One window of each of a checkpoint's matrices.

    Args:
        most: of so many at most, evenly spaced over their sorted names.
        only: of these alone.

    Read from its safetensors files, without loading them; empty without such files. A matrix that is quantised in a
    form that is not known here is left out, and so is a head, which some files store and some do not.
    """
    found: dict[str, Any] = {}
    for file in weight_files(path, revision=revision):
        tensors = open_tensors(file)
        found |= dict.fromkeys(tensors.keys(), tensors)
    names = sorted(name for name in found if name.endswith(".weight") and name != "lm_head.weight")
    wanted = names if only is None else [name for name in names if name in only]
    matrices = [name for name in wanted if len(found[name].get_slice(name).get_shape()) == 2]
    chosen = matrices if most is None else [matrices[index] for index in evenly_spaced(len(matrices), most)]
    windows = {name: _window(found, name) for name in chosen}
    return {name: window for name, window in windows.items() if window is not None}


def same_origin(ours: Mapping[str, Window], theirs: Mapping[str, Window]) -> bool:
    """Whether two samples are of one model in two forms; two plain checkpoints never are: they have fingerprints."""
    import numpy as np

    equal: dict[str, list[float]] = {}
    compared = 0
    for name in ours.keys() & theirs.keys():
        (finer, one), (coarser, other) = sorted((ours[name], theirs[name]), key=lambda window: _COARSENESS[window[0]])
        if {finer, coarser} == {"nf4", "fp4"}:  # neither tells what the other was rounded from
            return False
        if coarser in _CODES:
            codes = [_codes(values, coarser) for values in (one, other)]
            equal.setdefault(finer, []).append(float(np.mean(codes[0] == codes[1])))
        else:
            near = 2**-8 if coarser == "16" else SAME_NUMBERS
            if _root_mean_square(one - other) > near * _root_mean_square(one):
                return False
        compared += coarser != "16"
    return compared >= FEWEST and all(
        np.mean(shares) >= SAME_CODES[kind] and min(shares) >= SAME_CODES[kind] - IN_EACH
        for kind, shares in equal.items()
    )


def is_another_form(path: str, of: Mapping[str, Window], *, revision: str | None = None) -> bool:
    """Whether a checkpoint is the model of a sample in another form. False where its files cannot be compared."""
    return bool(of) and same_origin(origin_sample(path, revision=revision, only=of.keys()), of)


def to_text(sample: Mapping[str, Window]) -> dict[str, str]:
    """A sample as it stands in a passport."""
    return {name: f"{kind}:{base64.b64encode(values.tobytes()).decode()}" for name, (kind, values) in sample.items()}


def from_text(text: Mapping[str, str]) -> dict[str, Window]:
    """The sample of a passport, which may come from anywhere: what is no window is left out."""
    import numpy as np

    found: dict[str, Window] = {}
    for name, one in text.items():
        kind, _, encoded = one.partition(":")
        try:
            values = np.frombuffer(base64.b64decode(encoded, validate=True), np.float16)
        except (binascii.Error, ValueError):
            continue
        if kind in _COARSENESS and values.size == WINDOW and np.isfinite(values).all():
            found[name] = kind, values
    return found


_COARSENESS = {"16": 0, "int8": 1, "fp8": 2, "nf4": 3, "fp4": 4}


def _nf4_codes() -> list[float]:
    negative = [1.0, 0.6961928, 0.52507305, 0.39491749, 0.28444138, 0.18477343, 0.09105004]
    positive = [0.0795803, 0.1609302, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0]
    return [*(-value for value in negative), 0.0, *positive]


_CODES = {
    "nf4": _nf4_codes(),
    "fp4": [sign * value / 12 for sign in (-1, 1) for value in (0.0, 0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)],
}
"""The numbers of each form, whose largest is 1; `_codes` finds the nearest."""


def _codes(values: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    import numpy as np

    table = np.array(_CODES[kind], np.float32)
    found: np.ndarray[Any, Any] = np.abs(values.astype(np.float32)[:, None] - table[None]).argmin(axis=1)
    return found


def _root_mean_square(values: np.ndarray[Any, Any]) -> float:
    import numpy as np

    return float(np.sqrt(np.mean(values.astype(np.float32) ** 2)))


def _window(found: Mapping[str, Any], name: str) -> Window | None:
    """The window of a matrix in the middle of it; None for one that is all zeros, too small, or not known."""
    import numpy as np

    kind, numbers = _numbers(found, name)
    if numbers is None or numbers.size < WINDOW:
        return None
    largest = float(np.abs(numbers).max())
    return (kind, (numbers / largest).astype(np.float16)) if largest > 0 and np.isfinite(largest) else None


def _numbers(found: Mapping[str, Any], name: str) -> tuple[str, np.ndarray[Any, Any] | None]:
    """How a matrix is stored, and the 64 numbers of its window, up to a factor."""
    import numpy as np
    import torch

    part = found[name].get_slice(name)
    rows, columns = part.get_shape()
    four_bits = next((kind for kind in _CODES if f"{name}.quant_state.bitsandbytes__{kind}" in found), None)
    if four_bits is not None:
        return four_bits, _four_bit_numbers(found, name, four_bits)
    dtype = part.get_dtype()
    if dtype not in _PLAIN and not (dtype in ("I8", "F8_E4M3") and _has_scales(found, name)):
        return "", None
    start = rows // 2 * columns // WINDOW * WINDOW
    if dtype not in _PLAIN:
        value = stored_value(lambda key: found[key].get_tensor(key), name, found.keys())
        return {"I8": "int8"}.get(dtype, "fp8"), value.reshape(-1)[start : start + WINDOW].numpy()
    first, last = start // columns, min(rows, (start + WINDOW - 1) // columns + 1)
    flat = torch.as_tensor(part[first:last]).float().reshape(-1).numpy()
    return "16", np.asarray(flat[start - first * columns :][:WINDOW])


_PLAIN = ("BF16", "F16", "F32")


def _has_scales(found: Mapping[str, Any], name: str) -> bool:
    return f"{name.removesuffix('.weight')}.SCB" in found or f"{name}_scale_inv" in found


def _four_bit_numbers(found: Mapping[str, Any], name: str, kind: str) -> np.ndarray[Any, Any] | None:
    """Two codes a byte, the first in the upper half, in the order of the flat matrix."""
    import json

    import numpy as np
    import torch

    state = f"{name}.quant_state.bitsandbytes__{kind}"
    settings = json.loads(bytes(found[state].get_tensor(state).numpy()).decode())
    rows, columns = settings["shape"]
    part = found[name].get_slice(name)
    if settings["blocksize"] != WINDOW or len(part.get_shape()) != 2 or part.get_shape()[1] != 1:
        return None
    start = rows // 2 * columns // WINDOW * WINDOW
    each = torch.as_tensor(part[0:1]).element_size()
    packed = torch.as_tensor(part[start // 2 // each : (start + WINDOW) // 2 // each])
    codes = packed.contiguous().view(torch.uint8).reshape(-1).numpy()
    table = found[f"{name}.quant_map"].get_tensor(f"{name}.quant_map").float().numpy()
    return np.asarray(table[np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)])
