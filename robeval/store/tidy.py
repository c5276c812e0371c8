"""What a killed writer left in a run folder, removed."""

from __future__ import annotations

from pathlib import Path

from robeval.store.files import Lock


def tidy(folder: Path, mine: str = "") -> None:
    """Remove temporary files, and images whose records were never written.

    Only of shards that nobody is writing now; a folder that this process may not write is left as it is.

    Args:
        mine: Tag of the shard that this process is about to write and has locked.
    """
    for path in folder.glob(".lock-*"):
        lock, tag = Lock(path), path.name.removeprefix(".lock-")
        if lock.taken() and tag != mine:
            continue  # another store of this process is writing it
        try:
            if lock.acquire():
                _tidy_shard(folder, tag)
        except OSError:
            continue
        finally:
            if tag != mine:
                lock.release()


def _tidy_shard(folder: Path, tag: str) -> None:
    for left in [*folder.glob(f".*.{tag}.tmp"), *folder.glob(f"*/.*.{tag}.tmp")]:
        left.unlink()
    for images in (folder / "examples").glob(f"part-{tag}-*.safetensors"):
        name = images.name.removesuffix(".safetensors")
        if not list((folder / "records").glob(f"{name}.parquet*")):
            images.unlink()
