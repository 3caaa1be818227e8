"""A real llama.cpp for tests: the npm package node-llama-cpp with its prebuilt CPU binaries, installed once."""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

VERSION = "3.22.1"
SCRIPT = Path(__file__).with_name("llama_cpp.mjs")
_BINARIES = {
    ("Linux", "x86_64"): "linux-x64",
    ("Linux", "aarch64"): "linux-arm64",
    ("Darwin", "arm64"): "mac-arm64-metal",
    ("Darwin", "x86_64"): "mac-x64",
}


@functools.cache
def installed() -> Path | str:
    """The folder with node_modules, or why there is none. About 85 MB, in the user's cache folder."""
    if not (shutil.which("node") and shutil.which("npm")):
        return "Node.js is not installed"
    binary = _BINARIES.get((platform.system(), platform.machine()))
    if binary is None:
        return f"node-llama-cpp has no prebuilt binary for {platform.system()} {platform.machine()}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "lora-dpo" / f"node-llama-cpp-{VERSION}"
    if (folder / "ready").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        command = ["npm", "install", "--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund"]
        command += [f"node-llama-cpp@{VERSION}", f"@node-llama-cpp/{binary}@{VERSION}"]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"npm could not install node-llama-cpp: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
        (Path(scratch) / "ready").touch()
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(scratch, folder, symlinks=True)
    return folder


def llama_cpp(model: Path, tasks: list[dict[str, Any]], *, lora: Path | None = None) -> list[Any]:
    """Run llama.cpp on a GGUF file, with an adapter if there is one; see llama_cpp.mjs for the tasks."""
    place = installed()
    if isinstance(place, str):
        pytest.skip(f"llama.cpp was not run: {place}")
    shutil.copyfile(SCRIPT, place / SCRIPT.name)  # beside node_modules, where its import is resolved
    with tempfile.TemporaryDirectory() as scratch:
        job = Path(scratch) / "job.json"
        job.write_text(json.dumps({"model": str(model), "lora": str(lora) if lora else None, "tasks": tasks}))
        done = subprocess.run(
            [str(shutil.which("node")), SCRIPT.name, str(job)],
            cwd=place,
            capture_output=True,
            text=True,
            check=False,
            timeout=1200,
        )
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-500:]
    return list(json.loads(done.stdout.strip().splitlines()[-1]))
