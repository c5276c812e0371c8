"""The state of a training on disk, so that a killed run goes on exactly where it stood."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from robeval.core.errors import FileRefused, MachineError, UsageError


@dataclass
class State:
    """Everything that the next step depends on, and what has been learnt about the run so far.

    Args:
        identity: What makes two trainings the same: method, recipe, data, starting weights.
        epoch: Epoch that is running, counted from 0.
        batch: Next batch of that epoch.
        step: Optimiser steps taken.
        weights: Parameters and buffers.
        optimizer: The optimiser's ``state_dict``.
        sums: Running sums of the epoch's log.
        rows: Finished rows of the log.
        best: Weights of the best epoch so far.
        best_epoch: Its number, counted from 1; 0 before the first.
        best_score: What it was chosen by.
        previous: Weights (averaged ones, if there are any) after the epoch before, for a method that may have to go
            back, and for ``select=last`` with an average.
        guard: Robust accuracy on the first batch after the epoch before.
        memory: What the method keeps from one mini-batch to the next.
        averaged: Averaged parameters and their buffers.
        averaged_count: Weights that went into the average.
        notices: Warnings as [code, epoch, text].
        stopped: Why training ended early, or empty.
        done: Training is over.
    """

    identity: dict[str, str]
    epoch: int = 0
    batch: int = 0
    step: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_epoch: int = 0
    best_score: list[float] = field(default_factory=list)
    previous: dict[str, Tensor] = field(default_factory=dict)
    guard: float | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)
    averaged: dict[str, Tensor] = field(default_factory=dict)
    averaged_count: int = 0
    notices: list[list[Any]] = field(default_factory=list)
    stopped: str = ""
    done: bool = False


def copied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy that later steps do not change."""
    return {name: t.detach().clone() for name, t in weights.items()}


def write_atomic(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write to a temporary name, flush to disk, rename; the old file stays until the new one is whole.

    Raises:
        MachineError: the disk is full, read-only or gone.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        with suppress(OSError):
            temporary.unlink()
        raise MachineError(
            f"cannot write {path}: {error}", code="E03", do="free space, then the same command"
        ) from None


def save(path: Path, state: State) -> None:
    """Write the state atomically."""
    plain = {f: getattr(state, f) for f in state.__dataclass_fields__}
    write_atomic(path, lambda file: torch.save(plain, file))


def load(path: Path, identity: dict[str, str], device: torch.device | str) -> State | None:
    """The saved state, or None when there is none.

    Args:
        path: The state file.
        identity: What the present command would train; must equal what the file says.
        device: Where tensors go.

    Raises:
        UsageError: the folder belongs to another training; names what differs.
        FileRefused: the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        state = State(**torch.load(path, map_location=device, weights_only=True))
    except Exception:
        raise FileRefused(
            f"{path} is damaged and cannot be resumed", code="L03", do="start anew with --fresh"
        ) from None
    for name in {**state.identity, **identity}:
        old, new = state.identity.get(name, "unset"), identity.get(name, "unset")
        if old != new:
            raise UsageError(
                f"the training in {path.parent} used {name} {old}, you gave {new}",
                code="R01",
                do="another --out, or --fresh to start this one anew",
            )
    return state


#: Settings of the loop that earlier versions did not have; at their defaults they are not part of the identity, so that
#: a training begun with such a version goes on.
LATER = (
    "clip_gradient", "awp", "awp_warmup", "average", "average_start", "average_decay", "select_from", "channels_last",
    "compile",
)  # fmt: skip


def identity_of(method: str, settings: Mapping[str, Any], recipe: Any, **prints: str) -> dict[str, str]:
    """Everything that must agree for a resume, as text by name."""
    named = {f"{method}'s {key}": str(value) for key, value in settings.items()}
    loop = {
        key: str(value)
        for key, value in asdict(recipe).items()
        if key not in LATER or value != type(recipe).__dataclass_fields__[key].default
    }
    return {"method": method} | named | loop | prints
