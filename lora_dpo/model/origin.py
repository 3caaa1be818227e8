"""Whether two checkpoints are one model in two forms, such as a 16-bit one and what somebody made of it in 4 bits.

Of some weights one window of 64 numbers is looked at, the block of bitsandbytes' 4-bit forms. The plain one's numbers
are quantised as the other's were, with its scales: of one origin nearly all of them are the same codes.

    c(w) = argmin_c |w / s - c|     s: the largest of the block, of the row, or the stored scale of an FP8 block

A model that was trained further differs in some: SmolLM2-135M, changed by 0.1 % of its weights' size, in 11 of 4096
codes of NF4, 16 of FP4, 59 of int8 and 144 of FP8; with two of seven matrices changed in 3, 4, 36 and 49.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dpo.data.pairs import evenly_spaced
from lora_dpo.model.identity import weight_files
from lora_dpo.model.quantised import block_side
from lora_dpo.model.tensor_file import State, open_tensors, state_of

if TYPE_CHECKING:
    import numpy as np
    import torch

    Numbers = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Window:
    """64 numbers of a weight."""

    kind: str
    """How it is stored: `plain`, `nf4`, `fp4`, `int8` or `fp8`."""
    numbers: Numbers
    """As they are stored: values, or codes."""
    scales: Numbers | None = None
    """What each code of 8 bits is multiplied with; 4-bit codes are over the largest of the window."""
    doubt: float = 0.0
    """How far the scales may be from those that were divided by, as a share: they are rounded, and so are quotients."""


WINDOW = 64
CARRIED = 64
"""Weights of a sample that travels in a passport: about 12 kB."""
FEWEST = 4
"""Weights that two samples must have in common."""

DIFFERENT = 1 / 4096
"""Most numbers whose codes differ, as a share: of one origin it is none, but for what lies just between two codes."""

_ROUNDED = {"F32": 2**-20, "F16": 2**-10, "BF16": 2**-8}
"""How far scales may be off that are stored so, with a margin: quotients that lie between two codes go either way."""
_KINDS = ("plain", "nf4", "fp4", "int8", "fp8")
_FOUR_BITS = ("nf4", "fp4")
_PLAIN = ("BF16", "F16", "F32")


def origin_sample(
    path: str, *, revision: str | None = None, most: int | None = None, only: Collection[str] | None = None
) -> dict[str, Window]:
    """One window of each of a checkpoint's matrices.

    Args:
        most: of so many at most, evenly spaced over their sorted names.
        only: of these alone.

    Slices of its safetensors files are read, and no whole matrix; once, as long as they stay as they are. Empty without
    such files. A matrix that is quantised in a form that is not known here is left out, and so is a head, which some
    files store and some do not.
    """
    files = tuple((file, state_of(file)) for file in weight_files(path, revision=revision))
    return dict(_sample(files, most, None if only is None else tuple(sorted(only))))


@lru_cache(maxsize=32)
def _sample(
    files: tuple[tuple[Path, State], ...], most: int | None, only: tuple[str, ...] | None
) -> Mapping[str, Window]:
    found: dict[str, Any] = {}
    for file, _ in files:
        tensors = open_tensors(file)
        found |= dict.fromkeys(tensors.keys(), tensors)
    names = sorted(name for name in found if name.endswith(".weight") and name != "lm_head.weight")
    wanted = names if only is None else [name for name in names if name in set(only)]
    matrices = [name for name in wanted if len(found[name].get_slice(name).get_shape()) == 2]
    chosen = matrices if most is None else [matrices[index] for index in evenly_spaced(len(matrices), most)]
    windows = {name: _window(found, name) for name in chosen}
    return {name: window for name, window in windows.items() if window is not None}


def same_origin(ours: Mapping[str, Window], theirs: Mapping[str, Window]) -> bool:
    """Whether two samples are of one model in two forms, as far as their numbers tell.

    Two plain checkpoints never are: they have fingerprints. Nor are two that are quantised otherwise: neither tells
    what the other was rounded from.
    """
    import torch

    both = [(ours[name], theirs[name]) for name in sorted(ours.keys() & theirs.keys())]
    quantised = [(one, other) for one, other in both if {one.kind, other.kind} != {"plain"}]
    if len(quantised) < FEWEST:
        return False
    for one, other in both:
        if one.kind == other.kind == "plain" and not _near(one.numbers, other.numbers):
            return False
    # weights may have been rounded to 16 bits before they were quantised: all of a checkpoint's in one way
    return any(
        _different(quantised, rounded) <= DIFFERENT * WINDOW * len(quantised)
        for rounded in (torch.float32, torch.bfloat16, torch.float16)
    )


def is_another_form(path: str, of: Mapping[str, Window], *, revision: str | None = None) -> bool:
    """Whether a checkpoint is the model of a sample in another form. False where its files cannot be compared."""
    return bool(of) and same_origin(origin_sample(path, revision=revision, only=of.keys()), of)


def to_text(sample: Mapping[str, Window]) -> dict[str, str]:
    """A sample as it stands in a passport."""
    return {
        name: ":".join((window.kind, f"{window.doubt:g}", *map(_packed, (window.numbers, window.scales))))
        for name, window in sample.items()
    }


def from_text(text: Mapping[str, str]) -> dict[str, Window]:
    """The sample of a passport, which may come from anywhere: what is no window is left out."""
    found: dict[str, Window] = {}
    for name, one in text.items():
        try:
            kind, doubt, numbers, scales = one.split(":")
            window = Window(kind, _unpacked(numbers), _unpacked(scales) if scales else None, float(doubt))
        except (binascii.Error, ValueError, zlib.error):
            continue
        if kind in _KINDS and 0 <= window.doubt < 0.01 and (window.scales is not None) == (kind in ("int8", "fp8")):
            found[name] = window
    return found


def _packed(numbers: Numbers | None) -> str:
    import numpy as np

    return "" if numbers is None else base64.b64encode(zlib.compress(numbers.astype(np.float32).tobytes())).decode()


def _unpacked(text: str) -> Numbers:
    """The numbers of a window. Raises `ValueError` for what are none."""
    import numpy as np

    content = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), 4 * WINDOW + 1)
    numbers = np.frombuffer(content, np.float32)
    if numbers.size != WINDOW or not np.isfinite(numbers).all():
        raise ValueError("no window")
    return numbers


# --- comparing ------------------------------------------------------------------------------------


def _near(one: Numbers, other: Numbers) -> bool:
    """Whether what stayed unquantised is the same, but for how 16 bits round."""
    import numpy as np

    return bool((np.abs(one - other) <= 2**-8 * np.abs(one) + 2**-24).all())


def _different(both: list[tuple[Window, Window]], rounded: torch.dtype) -> int:
    """In how many numbers pairs of windows differ, of weights that were rounded so before they were quantised."""
    return sum(_differing(one, other, rounded) for one, other in both)


def _differing(one: Window, other: Window, rounded: torch.dtype) -> int:
    import numpy as np
    import torch

    if one.kind == other.kind and one.kind in _FOUR_BITS:
        return int(np.count_nonzero(one.numbers != other.numbers))
    plain, codes = (one, other) if one.kind == "plain" else (other, one)
    if plain.kind != "plain":
        return WINDOW
    values = torch.from_numpy(plain.numbers.copy()).to(rounded)
    if codes.scales is None:
        return int(np.count_nonzero(_four_bit_codes(values, codes.kind) != codes.numbers))
    ratio = np.asarray(values.float().numpy() / codes.scales, np.float32)
    sides = (np.float32(1 / (1 + codes.doubt)), np.float32(1 + codes.doubt))
    least, most = (_eight_bit_codes(np.asarray(ratio * side, np.float32), codes.kind) for side in sides)
    least, most = np.minimum(least, most), np.maximum(least, most)
    return int(np.count_nonzero((codes.numbers < least) | (codes.numbers > most)))


def _four_bit_codes(values: torch.Tensor, kind: str) -> Numbers:
    """Codes of a block as bitsandbytes makes them, 0 to 15."""
    from bitsandbytes.functional import quantize_4bit

    packed, _ = quantize_4bit(values, quant_type=kind, blocksize=WINDOW)
    return _halves(packed)


def _eight_bit_codes(ratio: Numbers, kind: str) -> Numbers:
    import numpy as np
    import torch

    if kind == "int8":
        return np.asarray(np.rint(ratio), np.float32)
    codes: Numbers = torch.from_numpy(ratio).clamp(-448, 448).to(torch.float8_e4m3fn).float().numpy()
    return codes


def _halves(packed: torch.Tensor) -> Numbers:
    """Two codes a byte, the first in the upper half."""
    import numpy as np
    import torch

    codes = packed.contiguous().view(torch.uint8).reshape(-1).numpy()
    return np.asarray(np.stack([codes >> 4, codes & 15], axis=1).reshape(-1), np.float32)


# --- reading --------------------------------------------------------------------------------------


def _window(found: Mapping[str, Any], name: str) -> Window | None:
    """The window of a matrix in the middle of it; None for one that is all zeros, too small, or not known."""
    import numpy as np

    window = _stored_window(found, name)
    usable = window is not None and window.numbers.size == WINDOW and np.isfinite(window.numbers).all()
    return window if usable and window is not None and np.any(window.numbers) else None


def _stored_window(found: Mapping[str, Any], name: str) -> Window | None:
    four_bits = next((kind for kind in _FOUR_BITS if f"{name}.quant_state.bitsandbytes__{kind}" in found), None)
    if four_bits is not None:
        return _four_bit_window(found, name, four_bits)
    part = found[name].get_slice(name)
    rows, columns = part.get_shape()
    start = rows // 2 * columns // WINDOW * WINDOW
    row, column = divmod(start, max(columns, 1))
    dtype = part.get_dtype()
    if dtype in _PLAIN and not any(f"{name}{end}" in found for end in ("_scale_inv", ".quant_map")):
        last = min(rows, (start + WINDOW - 1) // max(columns, 1) + 1)
        flat = _numbers(part[row:last]).reshape(-1)
        return Window("plain", flat[column:][:WINDOW])
    if column + WINDOW > columns:
        return None  # its numbers have the scales of two rows
    if dtype == "I8":
        return _int8_window(found, name, part, row, column)
    return _fp8_window(found, name, part, row, column) if dtype == "F8_E4M3" else None


def _int8_window(found: Mapping[str, Any], name: str, part: Any, row: int, column: int) -> Window | None:
    import numpy as np

    module = name.removesuffix(".weight")
    scales, form = f"{module}.SCB", f"{module}.weight_format"
    if scales not in found or (form in found and found[form].get_tensor(form).item() != 0):
        return None
    step = float(_numbers(found[scales].get_slice(scales)[row : row + 1])[0]) / 127
    if not step > 0:
        return None
    codes = _numbers(part[row : row + 1, column : column + WINDOW]).reshape(-1)
    return Window("int8", codes, np.full(WINDOW, step, np.float32), _ROUNDED["F32"])


def _fp8_window(found: Mapping[str, Any], name: str, part: Any, row: int, column: int) -> Window | None:
    import numpy as np

    if (scales := f"{name}_scale_inv") not in found:
        return None
    rows, columns = part.get_shape()
    stored = found[scales].get_slice(scales)
    shape, dtype = stored.get_shape(), stored.get_dtype()
    if dtype not in _PLAIN or not (len(shape) == 2 or all(side == 1 for side in shape)):
        return None
    if len(shape) == 2:
        down, across = block_side(rows, shape[0]), block_side(columns, shape[1])
        line = _numbers(stored[row // down : row // down + 1]).reshape(-1)
        steps = line[(column + np.arange(WINDOW)) // across]
    else:
        steps = np.full(WINDOW, _numbers(found[scales].get_tensor(scales)).reshape(-1)[0], np.float32)
    if not (steps > 0).all():
        return None
    codes = _numbers(part[row : row + 1, column : column + WINDOW]).reshape(-1)
    return Window("fp8", codes, steps, _ROUNDED[dtype])


def _four_bit_window(found: Mapping[str, Any], name: str, kind: str) -> Window | None:
    """The codes of a block, in the order of the flat matrix."""
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
    return Window(kind, _halves(packed))


def _numbers(tensor: Any) -> Numbers:
    import torch

    found: Numbers = torch.as_tensor(tensor).float().numpy()
    return found
