"""What pyproject.toml cannot say: the documentation goes into the built package. The repository has one copy of it."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithDocs(build_py):
    """Copies docs/*.md to lora_dpo/docs of what is built; an editable install reads the repository's."""

    def run(self) -> None:
        """Build the package, then the pages in it."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "lora_dpo" / "docs"
            target.mkdir(parents=True, exist_ok=True)
            for page in sorted(Path("docs").glob("*.md")):
                shutil.copyfile(page, target / page.name)


setup(cmdclass={"build_py": BuildWithDocs})
