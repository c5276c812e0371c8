"""The runs at a path."""

from __future__ import annotations

from pathlib import Path

from robeval.core.errors import FileRefused, RobevalError
from robeval.store.runstore import RunStore


def runs(path: str | Path, *, check_examples: bool = False) -> list[RunStore]:
    """A run folder, or every run in a folder of runs, in order of their names.

    Raises:
        FileRefused: no run there (R05).
    """
    path = Path(path)
    if (path / "manifest.json").exists():
        return [RunStore.open(path, check_examples=check_examples)]
    found = sorted(p.parent for p in path.glob("*/manifest.json")) if path.is_dir() else []
    if not found:
        raise FileRefused(
            f"no run found at {path}",
            code="R05",
            why="a run is a folder with a manifest.json",
            do="robeval attack MODEL",
        )
    return [RunStore.open(p, check_examples=check_examples) for p in found]


def neighbours(store: RunStore) -> list[RunStore]:
    """The other runs in the folder of this one; a run that cannot be read is left out."""
    found = []
    for path in sorted(store.folder.resolve().parent.glob("*/manifest.json")):
        if path.parent != store.folder.resolve():
            try:
                found.append(RunStore.open(path.parent))
            except RobevalError:
                continue  # nobody asked for it
    return found
