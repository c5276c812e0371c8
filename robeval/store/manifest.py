"""The manifest of a run: what was computed, from what, with which settings, by which software."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import robeval
from robeval.core.errors import FileRefused, MachineError, UsageError
from robeval.core.numbers import pretty
from robeval.core.records import SCHEMA, AttackRecord, Certificate, Diagnosis

#: Kind of run -> its record.
RECORDS: dict[str, type] = {"attack": AttackRecord, "certify": Certificate, "diagnose": Diagnosis}
PACKAGES = ("torch", "numpy", "scipy", "pandas", "pyarrow", "safetensors", "torchattacks", "pyautoattack")


def _plain(value: Any) -> Any:
    """Only what JSON has: tuples become lists, infinity and NaN become the words that ``float`` reads."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return str(value)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git() -> dict[str, Any]:
    """Commit of the checkout that robeval runs from; empty when it is not a checkout."""
    home = Path(robeval.__file__).resolve().parents[1]
    if not (home / ".git").exists():
        return {}
    said = []
    for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            said.append(subprocess.run(["git", "-C", str(home), *command], capture_output=True, text=True, timeout=5))
        except (OSError, subprocess.TimeoutExpired):
            return {}
    if any(s.returncode for s in said):
        return {}
    return {"commit": said[0].stdout.strip(), "changed": bool(said[1].stdout.strip())}


def new_manifest(
    kind: str,
    *,
    model: dict[str, Any],
    data: dict[str, Any],
    threat: dict[str, Any],
    methods: list[dict[str, Any]],
    seed: int,
    settings: dict[str, Any],
    argv: list[str],
) -> dict[str, Any]:
    """Describe a run before it starts.

    Args:
        kind: A key of :data:`RECORDS`.
        model: ``name`` and ``fingerprint`` at least.
        data: ``name``, ``fingerprint`` of the FULL chosen image set (not of a shard), and ``images``, their number.
        threat: ``norm`` and ``eps``, a list of radii in pixel units.
        methods: In the order in which they run, each with ``label`` (its name in the records) and whatever defines it.
        settings: What else decides which records there are; nothing that only changes the speed.
        argv: The command as it was typed.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in RECORDS:
        raise ValueError(f"unknown kind of run {kind!r}, expected one of {', '.join(RECORDS)}")
    manifest: dict[str, Any] = _plain(
        {
            "schema": SCHEMA,
            "kind": kind,
            "model": model,
            "data": data,
            "threat": threat,
            "methods": methods,
            "seed": seed,
            "settings": settings,
            "argv": argv,
            "robeval": robeval.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "packages": _versions(),
            "git": _git(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    )
    manifest["run"] = run_id(manifest)
    return manifest


def identity(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two runs the same run: everything that can change a record, and nothing else."""
    return {
        "schema": manifest["schema"],
        "kind": manifest["kind"],
        "model": manifest["model"].get("fingerprint", ""),
        "data": {k: manifest["data"].get(k, "") for k in ("name", "fingerprint")},
        "threat": manifest["threat"],
        "methods": manifest["methods"],
        "seed": manifest["seed"],
        "settings": manifest["settings"],
    }


def run_id(manifest: Mapping[str, Any]) -> str:
    """Hash of the identity, 16 hex digits."""
    text = json.dumps(_plain(identity(manifest)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def slug(name: str) -> str:
    """A name that is safe in every file system; the real name stays in the manifest."""
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")[:40] or "model"


def folder_name(manifest: Mapping[str, Any]) -> str:
    """Such as ``attack-digits_cnn-7f3a12cd``; the same command always gives the same name."""
    return f"{manifest['kind']}-{slug(str(manifest['model'].get('name', '')))}-{run_id(manifest)[:8]}"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run folder.

    Raises:
        FileRefused: there is none, it is damaged (R05), or it is a link (R06).
        UsageError: a newer robeval wrote it (R03).
        MachineError: it cannot be read (E03).
    """
    path = folder / "manifest.json"
    if path.is_symlink():
        raise FileRefused(f"{path} is a link; refused", code="R06", why="a file of a run is never a link")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        newer, kind, _ = int(manifest["schema"]) > SCHEMA, manifest["kind"], run_id(manifest)
    except FileNotFoundError:
        raise FileRefused(
            f"no run at {folder}", code="R05", do="give a folder that robeval attack or certify made"
        ) from None
    except OSError as error:
        raise MachineError(f"cannot read {path}: {error.strerror}", code="E03") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FileRefused(f"{path} is damaged or is no manifest", code="R05") from None
    if newer:
        made = manifest.get("robeval", "of another version")
        raise UsageError(f"written by robeval {made}, which is newer", code="R03", where=str(path), do="update robeval")
    if kind not in RECORDS:
        raise FileRefused(f"{path} describes a run of unknown kind {kind!r}", code="R05")
    return manifest


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key in sorted(value):
            yield from _leaves(value[key], f"{path}.{key}" if path else key)
    else:
        yield path, value


def _said(name: str, value: Any) -> str:
    if name.rpartition(".")[2] == "eps":
        values = value if isinstance(value, list) else [value]
        return ",".join(pretty(float(v)) for v in values if v is not None)
    return str(value if value not in (None, "") else "none")


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """First part of the identity that differs: (name, text of the old one, text of the new one); None when equal."""
    before, after = (dict(_leaves(_plain(identity(m)))) for m in (old, new))
    for key in [*before, *(k for k in after if k not in before)]:
        if before.get(key) != after.get(key):
            name = key.removeprefix("threat.")
            return name, _said(key, before.get(key)), _said(key, after.get(key))
    return None
