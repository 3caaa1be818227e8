"""Reference log-probabilities on disk: computed once a pair, for every later epoch, run, seed, rank, β and loss.

A reference is named by what it computes: a fingerprint of the weights as they are in memory (so quantisation and
revision are in it), the model's configuration, the precision of its products, and the reference adapter if there is
one. A pair is named by its token ids after template and truncation, and by which of them are scored. Nothing about
the policy is in either name.

One SQLite file per reference: several runs may read and write it at once. Each row carries a checksum; a row
that fails it, or a file that cannot be read, is computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import sqlite3
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_dpo.model.lora import REFERENCE, base_of

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

FORMAT = 2
"""Part of every reference's name: raised whenever values of an older version may be other ones."""
_ROW = struct.Struct("<4d")


class PairLogps(NamedTuple):
    """log π_ref of a pair's answers, in nats, each as the sum of two parts.

    The head is the first min(|chosen|, |rejected|) answer tokens, the tail the rest: LD-DPO (Liu et al. 2024,
    arXiv 2409.06411) weights the tail, so its α need not be in the name.
    """

    chosen_head: float
    chosen_tail: float
    rejected_head: float
    rejected_tail: float

    def sums(self, ld_alpha: float | None) -> tuple[float, float]:
        """`(log π_ref(chosen), log π_ref(rejected))`, tails weighted with LD-DPO's α if it is given."""
        tail = 1.0 if ld_alpha is None else ld_alpha
        return self.chosen_head + tail * self.chosen_tail, self.rejected_head + tail * self.rejected_tail


class ReferenceCache:
    """What one reference says of the pairs that it has scored.

    Args:
        folder: where the file of each reference lies; None keeps values for this process only.
        reference: the name that `reference_name` gives.
    """

    def __init__(self, folder: Path | None, reference: str) -> None:
        self.path = None if folder is None else folder / f"{reference}.sqlite"
        self.hits = self.misses = 0
        self._known: dict[bytes, PairLogps] = {}

    def get(self, keys: Sequence[bytes]) -> dict[bytes, PairLogps]:
        """The known ones among `keys`."""
        unread = [key for key in keys if key not in self._known]
        if unread and self.path is not None and self.path.is_file():
            for key, row, check in self._select(self.path, unread):
                if zlib.crc32(key + row) == check and len(row) == _ROW.size:
                    self._known[key] = PairLogps(*_ROW.unpack(row))
                else:
                    logger.warning("A stored reference value of %s is damaged: computing it again.", self.path)
        found = {key: self._known[key] for key in keys if key in self._known}
        self.hits += len(found)
        self.misses += len(set(keys)) - len(found)
        return found

    def put(self, values: Mapping[bytes, PairLogps]) -> None:
        """Note values. A full or read-only disk costs the next run time, not this run its life."""
        self._known.update(values)
        if self.path is None or not values:
            return
        rows = []
        for key, logps in values.items():
            row = _ROW.pack(*logps)
            rows.append((key, row, zlib.crc32(key + row)))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _open(self.path) as database:
                database.execute("CREATE TABLE IF NOT EXISTS logps (pair BLOB PRIMARY KEY, row BLOB, crc INTEGER)")
                database.executemany("INSERT OR REPLACE INTO logps VALUES (?, ?, ?)", rows)
        except (sqlite3.Error, OSError) as error:
            self._give_up(self.path, error)

    def _select(self, path: Path, keys: Sequence[bytes]) -> list[tuple[bytes, bytes, int]]:
        found: list[tuple[bytes, bytes, int]] = []
        try:
            with _open(path) as database:
                for start in range(0, len(keys), 500):  # SQLite's limit of variables is 999 in old builds
                    part = keys[start : start + 500]
                    marks = ",".join("?" * len(part))
                    query = f"SELECT pair, row, crc FROM logps WHERE pair IN ({marks})"  # noqa: S608 - only marks
                    found += database.execute(query, part).fetchall()
        except sqlite3.DatabaseError as error:
            if "no such table" in str(error):  # begun by a run that was killed, or that is about to write
                return []
            self._give_up(path, error)
        return found

    def _give_up(self, path: Path, error: Exception) -> None:
        self.path = None
        damaged = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)
        if damaged:
            with contextlib.suppress(OSError):
                path.unlink()
        logger.warning(
            "The reference cache %s cannot be used (%s): this run computes its references itself%s.",
            path,
            error,
            ", and the damaged file was removed" if damaged else "",
        )


@contextlib.contextmanager
def _open(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection whose changes are committed together when the block ends well."""
    database = sqlite3.connect(path, timeout=60)
    try:
        with database:
            yield database
    finally:
        database.close()


def pair_key(rows: Sequence[Sequence[int]], scored: Sequence[Sequence[int]]) -> bytes:
    """A pair's name.

    Args:
        rows: the token ids of its two sequences.
        scored: for each token of a row 1 if it counts towards the answer's log-probability, else 0.
    """
    digest = hashlib.blake2b(digest_size=20)
    for row, marks in zip(rows, scored, strict=True):
        digest.update(struct.pack(f"<q{len(row)}q", len(row), *row))
        digest.update(bytes(marks))
    return digest.digest()


def reference_name(model: Any, compute_dtype: torch.dtype) -> str:
    """The name of the reference that `lora_dpo.reference(model)` switches to.

    Every weight goes in with an exact sum of its bits, order aside, and with 64 values in order: one pass
    over memory where the weights are.

    Args:
        model: a PeftModel; the policy's adapter plays no part.
        compute_dtype: what the matrix products run in.
    """
    import torch

    from lora_dpo.model.visiting import visiting_of

    digest = hashlib.blake2b(digest_size=16)
    named = REFERENCE if REFERENCE in model.peft_config else None
    config = {key: value for key, value in model.get_base_model().config.to_dict().items() if key not in _NOT_MATHS}
    parts = [FORMAT, str(compute_dtype), torch.get_float32_matmul_precision(), config]
    if named is not None:
        adapter = model.peft_config[named]
        parts.append([adapter.r, adapter.lora_alpha, adapter.use_rslora, adapter.use_dora])
        parts.append([adapter.rank_pattern, adapter.alpha_pattern])
    digest.update(json.dumps(parts, sort_keys=True, default=str).encode())
    others, visiting = set(model.peft_config) - {named}, visiting_of(base_of(model))
    weights = {}
    for name, parameter in model.named_parameters():
        path = name.split(".")
        if any(part in others and above.startswith(_ADAPTERS) for above, part in itertools.pairwise(path)):
            continue
        # peft wraps what a policy adapts: the weight is the same inside
        weights[".".join(part for part in path if part not in _WRAPPED)] = parameter
    for name, parameter in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(_content(parameter.data if visiting is None else visiting.value(parameter)))
        state = getattr(parameter, "quant_state", None)  # bitsandbytes: the scales of a packed 4-bit weight
        if state is not None:
            digest.update(_content(state.absmax if visiting is None else visiting.value(state.absmax)))
    return digest.hexdigest()


_WRAPPED = ("base_layer", "original_module")
_ADAPTERS = ("lora_", "modules_to_save", "trainable_tokens_")
"""How the modules begin that peft keeps one part in for each adapter, under the adapter's name."""
_NOT_MATHS = ("_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype", "architectures")


PIECE = 1 << 24
"""Elements of a weight that are summed at once: the sum widens them to 8 bytes each first, 134 MB."""


def _content(tensor: torch.Tensor) -> bytes:
    import torch

    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().view(integers).flatten()
    sample = bits[:: max(1, bits.numel() // 64)][:64].cpu()
    total = sum(int(piece.sum(dtype=torch.int64)) for piece in torch.split(bits, PIECE))
    return f"{tuple(tensor.shape)}{tensor.dtype}{total}".encode() + sample.numpy().tobytes()
