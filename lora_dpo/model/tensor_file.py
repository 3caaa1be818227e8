"""safetensors files that others may write to while they are read here.

They are read with plain reads and never mapped into memory: a process that touches a mapped page that another one has
cut off is killed (SIGBUS), and with it everyone whom it serves. A plain read ends in an error. And Windows neither
renames nor removes what is mapped, as long as any tensor of it is held.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

State = tuple[int, int, int, int]
"""Modified, changed (ns), size and inode of a file: another state, another content."""

Looks = tuple[str, tuple[int, ...]]
"""A stored tensor's type, as safetensors files call it, and its shape."""


def open_tensors(path: Path, framework: str = "pt") -> Any:
    """A safetensors file to read tensors from, as `safetensors.safe_open`, which maps by default."""
    from safetensors import safe_open

    return safe_open(path, framework=framework, backend="pread")


class OpenFiles:
    """Open safetensors files, each once."""

    def __init__(self) -> None:
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *reason: object) -> None:
        self._open.clear()

    def get(self, file: Path, name: str) -> torch.Tensor:
        """A tensor."""
        tensor: torch.Tensor = self._of(file).get_tensor(name)
        return tensor

    def looks(self, file: Path, name: str) -> Looks:
        """A tensor's type and shape; it is not read."""
        part = self._of(file).get_slice(name)
        return part.get_dtype(), tuple(part.get_shape())

    def _of(self, file: Path) -> Any:
        if file not in self._open:
            self._open[file] = open_tensors(file)
        return self._open[file]


def read_tensors(path: Path) -> dict[str, Any]:
    """All tensors of a safetensors file by name, in memory of their own."""
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


def state_of(path: Path) -> State:
    """What a file is like now. Raises `OSError` if it is not there."""
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino
