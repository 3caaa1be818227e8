"""What pyproject.toml cannot say: a wheel has copies of the documentation and of the quickstart in it.

Their one home is the repository's: docs/, configs/ and data/.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

COPIES = {Path("docs") / page.name: page for page in sorted(Path("docs").glob("*.md"))} | {
    Path("quickstart") / file: file
    for file in (Path("configs/quickstart.yaml"), *sorted(Path("data").glob("quickstart*.jsonl")))
}
"""By their places in the package. An editable installation finds them in the clone."""


class BuildWithCopies(build_py):
    """Puts the copies beside the package's modules."""

    def run(self) -> None:
        """Build, and copy the files."""
        super().run()
        if self.editable_mode:
            return
        for name, source in COPIES.items():
            target = Path(self.build_lib) / "lora_dpo" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def get_source_files(self) -> list[str]:
        """Everything that a source distribution needs."""
        return [*super().get_source_files(), *(source.as_posix() for source in COPIES.values())]


setup(cmdclass={"build_py": BuildWithCopies})
