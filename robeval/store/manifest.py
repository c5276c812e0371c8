"""What a run is: enough to repeat it, and the part of it that makes it the same run."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from robeval import __version__
from robeval.core.records import SCHEMA

PACKAGES = ("torch", "numpy", "scipy", "pandas", "pyarrow", "safetensors")


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
    """The manifest of a new run.

    Args:
        kind: ``attack`` or ``certify``.
        model: Name, fingerprint, file, architecture and so on.
        data: Name, fingerprint of the whole chosen set, ids.
        threat: Norm and radii.
        methods: One entry per attack or bound: label, name, settings, hash, source.
        seed: Seed of the run.
        settings: Everything else that was chosen.
        argv: The command line.
    """
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": kind,
        "model": model,
        "data": data,
        "threat": threat,
        "methods": methods,
        "seed": seed,
        "settings": settings,
        "argv": argv,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "robeval": __version__,
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": {"system": platform.system(), "machine": platform.machine(), "python": platform.python_version()},
        "git": _git(),
    }
    manifest["run_id"] = run_id(manifest)
    return json.loads(json.dumps(manifest, default=str))  # type: ignore[no-any-return]


def identity(manifest: dict[str, Any]) -> dict[str, Any]:
    """The part that decides whether two commands are the same run."""
    return {
        "schema": manifest["schema"],
        "kind": manifest["kind"],
        "model": manifest["model"]["fingerprint"],
        "data": [manifest["data"]["name"], manifest["data"]["fingerprint"]],
        "threat": manifest["threat"],
        "methods": [m["hash"] for m in manifest["methods"]],
        "seed": manifest["seed"],
        "settings": manifest["settings"],
    }


def run_id(manifest: dict[str, Any]) -> str:
    """Hash of the identity."""
    return hashlib.sha256(json.dumps(identity(manifest), sort_keys=True, default=str).encode()).hexdigest()


def folder_name(manifest: dict[str, Any]) -> str:
    """A folder name that the same command finds again: kind, model and hash."""
    slug = re.sub(r"[^A-Za-z0-9_-]+", "-", str(manifest["model"]["name"])).strip("-")[:40] or "model"
    return f"{manifest['kind']}-{slug}-{run_id(manifest)[:8]}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _git() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
