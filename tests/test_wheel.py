"""The wheel: what a person without a clone has. Built from a copy, so that nothing but the listed files is needed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from lora_dpo.training.drafting.quickstart import FILES

ROOT = Path(__file__).parent.parent
PARTS = ("lora_dpo", "configs", "data", "pyproject.toml", "setup.py", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what the package is built from."""
    folder = tmp_path_factory.mktemp("source")
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def build(source: Path, out: Path) -> Path:
    """The wheel of a folder, by pip, without a network."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        ".",
    ]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    [wheel] = out.glob("*.whl")
    return wheel


def packaged(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_wheel_has_one_copy_of_the_quickstart_in_it_and_writes_it_into_an_empty_folder(source, tmp_path):
    wheel = build(source, tmp_path / "wheels")
    inside = packaged(wheel)
    for name in FILES:
        assert inside[f"lora_dpo/quickstart/{name.as_posix()}"] == (ROOT / name).read_bytes()
    extra = {name for name in inside if name.startswith("lora_dpo/quickstart/")}
    assert len(extra) == len(FILES)
    assert not [name for name in inside if name.startswith(("configs/", "data/", "tests/"))]
    modules = {name for name in inside if name.startswith("lora_dpo/") and name.endswith(".py")}
    assert modules == {path.relative_to(ROOT).as_posix() for path in (ROOT / "lora_dpo").rglob("*.py")}
    shutil.unpack_archive(str(wheel), tmp_path / "site", "zip")
    (tmp_path / "empty").mkdir()
    script = "import sys; from lora_dpo import cli; print(cli.__file__); sys.exit(cli.main(['init']))"
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, cwd=tmp_path / "empty", env={"PYTHONPATH": str(tmp_path / "site")}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site")), "not the one of the clone"
    written = {path.relative_to(tmp_path / "empty") for path in (tmp_path / "empty").rglob("*") if path.is_file()}
    assert written == set(FILES)
    assert (tmp_path / "empty" / FILES[0]).read_bytes() == (ROOT / FILES[0]).read_bytes()


@pytest.mark.slow
def test_a_wheel_of_a_source_distribution_has_the_quickstart_too(source, tmp_path):
    script = f"import setuptools.build_meta as build; print(build.build_sdist({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", script], cwd=source, check=True, capture_output=True)
    [archive] = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path / "unpacked", filter="data")
    [folder] = (tmp_path / "unpacked").iterdir()
    inside = packaged(build(folder, tmp_path / "wheels"))
    assert {f"lora_dpo/quickstart/{name.as_posix()}" for name in FILES} <= inside.keys()
