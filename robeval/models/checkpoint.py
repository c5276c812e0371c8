"""robeval's own model files: weights and a plain description that is enough to build the network again."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from robeval.core.errors import FileRefused, MachineError
from robeval.models.files import read_weights, sha256_of

FORMAT = "robeval-checkpoint"
FORMAT_VERSION = 1
FIELDS = {
    "architecture": str, "arguments": dict, "normalise": (str, dict), "input_shape": list, "classes": list,
    "recipe": dict, "metrics": dict,
}  # fmt: skip


@dataclass
class Checkpoint:
    """What a model file holds.

    Args:
        state: Weights by name.
        spec: The description, for robeval's own files: architecture, arguments, normalise, input_shape (C, H, W),
            classes (names), recipe, metrics. None for a foreign file.
        path: The file.
        sha256: Hash of the file's bytes.
    """

    state: dict[str, Tensor]
    spec: dict[str, Any] | None
    path: Path
    sha256: str = field(default="")


def save(
    path: str | Path,
    module: nn.Module,
    *,
    architecture: str,
    arguments: Mapping[str, Any],
    normalise: Any,
    input_shape: Sequence[int],
    classes: Sequence[str],
    recipe: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> Path:
    """Write a self-describing checkpoint; ``.safetensors`` by its ending, torch's format otherwise.

    The file appears whole or not at all: it is written under a temporary name, forced to disk, then renamed.

    Args:
        module: As `robeval.models.build.build` returns it.
        input_shape: (C, H, W).
        classes: Class names in label order.
        recipe: How it was trained, plain values.
        metrics: What was measured, plain values.

    Raises:
        MachineError: the disk is full or the folder not writable (E03).
        TypeError: a description that is not of plain values.
    """
    path = Path(path)
    spec = json.loads(json.dumps({
        "format": FORMAT, "format_version": FORMAT_VERSION, "architecture": architecture, "arguments": dict(arguments),
        "normalise": normalise, "input_shape": list(input_shape), "classes": [str(c) for c in classes],
        "recipe": dict(recipe), "metrics": dict(metrics),
    }))  # fmt: skip
    state = {k: v.detach().cpu().contiguous().clone() for k, v in module.state_dict().items()}
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            if path.suffix == ".safetensors":
                file.write(to_safetensors(state, metadata={"robeval": json.dumps(spec)}))
            else:
                torch.save({**spec, "state_dict": state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch tells of a full disk with a RuntimeError
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise MachineError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}", code="E03") from error
    return path


def read(path: str | Path, *, sha256: str = "") -> Checkpoint:
    """Read a model file of any accepted kind.

    Args:
        sha256: The hash that the file must have; empty for any.

    Raises:
        FileRefused: see `robeval.models.files`; M06 when the hash differs; M09 when the description is not understood.
    """
    path = Path(path)
    held, metadata = read_weights(path)
    digest = sha256_of(path)
    if sha256 and digest != sha256:
        raise FileRefused(f"{path} is not the file recorded for this run (sha256 differs)", code="M06")
    spec: Any = None
    if "robeval" in metadata:
        try:
            spec = json.loads(metadata["robeval"])
        except ValueError:
            spec = {}
    elif isinstance(held, Mapping) and held.get("format") == FORMAT:
        spec = {k: v for k, v in held.items() if k != "state_dict"}
    if spec is not None:
        _check_spec(path, spec)
    return Checkpoint(_weights(path, held), spec, path, digest)


def _check_spec(path: Path, spec: Any) -> None:
    version = spec.get("format_version") if isinstance(spec, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise FileRefused(f"{path} was written by a newer robeval (checkpoint format {version})", code="M09")
    for name, kind in FIELDS.items():
        if not isinstance(spec, dict) or not isinstance(spec.get(name), kind):  # type: ignore[arg-type]
            raise FileRefused(f"{path} has a damaged description: {name} is missing or of the wrong type", code="M09")
    if not all(isinstance(n, int) and n > 0 for n in spec["input_shape"]) or len(spec["input_shape"]) != 3:
        raise FileRefused(f"{path} has a damaged description: input_shape must be three sizes", code="M09")


def _weights(path: Path, held: Any) -> dict[str, Tensor]:
    """The state_dict in what the file holds, wrappers taken off."""
    for key in ("state_dict", "model_state_dict", "model", "net"):
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
            break
    if not isinstance(held, Mapping) or not held or not all(isinstance(v, Tensor) for v in held.values()):
        kind = f"a {type(held).__name__}" if not isinstance(held, Mapping) else "something else"
        raise FileRefused(
            f"{path} holds {kind}, not a state_dict",
            code="M09",
            do="save the weights: torch.save(model.state_dict(), PATH)",
        )
    return {str(k): v for k, v in held.items()}
