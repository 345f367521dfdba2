"""All metadata is in pyproject.toml. Here configs/ becomes a part of the wheel."""

from pathlib import Path
from shutil import copytree

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies configs/ into the package, where `flux.settings.files.CONFIGS` finds it without a checkout."""

    def run(self) -> None:
        """Build the package."""
        super().run()
        if not self.editable_mode:
            copytree("configs", Path(self.build_lib, "flux", "configs"), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithConfigs})
