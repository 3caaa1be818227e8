"""What pyproject.toml cannot say: a wheel has a copy of the quickstart in it, whose one home is configs/ and data/."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

QUICKSTART = [Path("configs/quickstart.yaml"), *sorted(Path("data").glob("quickstart*.jsonl"))]


class BuildWithQuickstart(build_py):
    """Puts the quickstart beside the package's modules. An editable installation finds it in the clone."""

    def run(self) -> None:
        """Build, and copy the files."""
        super().run()
        if self.editable_mode:
            return
        for name in QUICKSTART:
            target = Path(self.build_lib) / "lora_dpo" / "quickstart" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(name, target)

    def get_source_files(self) -> list[str]:
        """Everything that a source distribution needs."""
        return [*super().get_source_files(), *(name.as_posix() for name in QUICKSTART)]


setup(cmdclass={"build_py": BuildWithQuickstart})
