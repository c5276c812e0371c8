"""Find runs in a folder."""

from __future__ import annotations

from pathlib import Path

from robeval.core.errors import FileRefused
from robeval.store.runstore import RunStore


def runs(path: str | Path) -> list[RunStore]:
    """The run in this folder, or all runs one level below it, by name.

    Raises:
        FileRefused: no run there.
    """
    folder = Path(path)
    found = [folder] if (folder / "manifest.json").is_file() else sorted(p.parent for p in folder.glob("*/manifest.json"))
    if not found:
        raise FileRefused(f"no run in {folder}", code="R05", do="give a folder that robeval attack or certify made")
    return [RunStore.open(p) for p in found]
