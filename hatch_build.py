"""The part of the build that hatchling does not do itself: the commit is written into sdist and wheel."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CommitHook(BuildHookInterface[Any]):
    """Puts ``commit.txt`` into the sdist, and into the package of the wheel, if the commit is known."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """See the interface. An editable installation asks git itself, for its commit changes."""
        if version == "editable":
            return
        root = Path(self.root)
        path = root / "trio_cluster" / "cli" / "commit.py"
        spec = importlib.util.spec_from_file_location("commit_of_sources", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        commit = module.commit_of_sources(root)
        if commit is None:
            return
        self._folder = tempfile.TemporaryDirectory()
        file = Path(self._folder.name) / module.FILE
        file.write_text(f"{commit}\n", encoding="ascii")
        build_data["force_include"][str(file)] = (
            module.FILE if self.target_name == "sdist" else f"trio_cluster/{module.FILE}"
        )

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """See the interface."""
        if hasattr(self, "_folder"):
            self._folder.cleanup()
