"""Several processes, one device each, that train one network together on shares of every mini-batch."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robeval.core.errors import ContractBroken, MachineError, UsageError
from robeval.train.modes import normalises_over_the_batch
from robeval.train.warnings import Notice

#: How processes put together what each of them keeps, by the name that it has in the method's memory: ``image`` has an
#: entry for each training image, ``place`` one for each place in the mini-batch, ``mean`` is a mean over images, and
#: ``same`` is computed alike by all.
KEPT = {
    "margins": "image", "delta": "place", "moment": "mean", "mean": "mean", "updates": "same", "scale": "same",
    "c": "same", "channels": "same", "pixels": "same",
}  # fmt: skip

#: What methods compute from a mini-batch as a whole, by their name; all else belongs to an image or is a mean.
BATCHWISE = {"sgr": "newest perturbations", "rat-released": "soft labels"}


@dataclass(frozen=True)
class Devices:
    """All processes that train together, as one of them sees them; by default there is only this one.

    The mini-batch stays as large as the recipe says: each process takes every ``count``-th of its rows. Random draws
    belong to the image, so a row is treated the same wherever it goes. Sums over processes are the same bits in all of
    them, and so are, then, their weights.

    Args:
        count: Number of processes.
        rank: Number of this one, from 0.
        fabric: A launched Lightning Fabric, through which they talk; None when there is only one.
    """

    count: int = 1
    rank: int = 0
    fabric: Any = None

    @property
    def first(self) -> bool:
        """Is this the one process that writes files and talks to people?"""
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes have come here."""
        if self.fabric is not None:
            self.fabric.barrier()

    def share(self, rows: Tensor) -> Tensor:
        """This process's rows; where there are fewer rows than processes it may be one that counts for nothing."""
        mine = rows[self.rank :: self.count]
        return mine if len(mine) else rows[:1]

    def part(self, rows: int) -> Part:
        """What this process's share of so many rows weighs."""
        return Part(self, len(range(self.rank, rows, self.count)) / rows)

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums over all processes, in one message. Shapes: each (...) -> same."""
        if self.count == 1 or not tensors:
            return list(tensors)
        flat = self.fabric.all_reduce(torch.cat([t.flatten() for t in tensors]), reduce_op="sum")
        return [piece.view(t.shape) for piece, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]

    def agree(self, fingerprint: str, what: str) -> None:
        """Make sure that all processes hold the same.

        Args:
            fingerprint: Hexadecimal digest of what this process holds.
            what: What that is, in the plural.

        Raises:
            ContractBroken: they do not.
        """
        if self.count > 1:
            digits = torch.zeros(self.count, dtype=torch.int64)
            digits[self.rank] = int(fingerprint[:15], 16)
            if len(self.total([digits])[0].unique()) > 1:
                raise ContractBroken(
                    f"the {self.count} processes hold different {what}",
                    code="L04",
                    do="the same command, files and versions for all of them",
                )

    def lend(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A method's memory as this process's share of the mini-batch needs it."""
        return {name: self.share(t) if KEPT.get(name) == "place" else t for name, t in kept.items()}

    def collect(self, lent: Mapping[str, Tensor], kept: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
        """The memory after a mini-batch, from what each process has made of what was lent to it.

        Args:
            lent: This process's memory.
            kept: The memory before the mini-batch.
            rows: Training images of the whole mini-batch, (n,) positions.

        Raises:
            UsageError: something in it that nobody says how to put together.
        """
        if self.count == 1:
            return dict(lent)
        return {n: t if kept.get(n) is t else self._together(n, t, kept, rows) for n, t in sorted(lent.items())}

    def _together(self, name: str, mine: Tensor, kept: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        part = self.part(len(rows))
        kind = KEPT.get(name)
        if kind == "same":
            return mine
        if kind == "mean":
            return part.mean([mine])[0]
        if kind == "image":
            own = rows[self.rank :: self.count]
            entries = mine.new_zeros(len(rows))
            entries[self.rank :: self.count] = mine[own]
            return mine.index_copy(0, rows, self.total([entries])[0])
        if kind == "place":
            own = mine if part.weight else kept[name][self.rank :: self.count]
            (sizes,) = self.total([torch.tensor(len(own))])
            places = mine.new_zeros(int(sizes), *mine.shape[1:])
            places[self.rank :: self.count] = own
            return self.total([places])[0]
        raise UsageError(
            f'the method remembers "{name}", and several devices do not know how to share that',
            code="A04",
            do="--devices 1",
        )


ALONE = Devices()


@dataclass(frozen=True)
class Part:
    """The rows of a mini-batch, or of a set of images, that one process computes with.

    Args:
        devices: All processes.
        weight: Their share of all rows.
    """

    devices: Devices = ALONE
    weight: float = 1.0

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Means over all rows, from each process's means over its own. Shapes: each (...) -> same."""
        if self.devices.count == 1:
            return list(tensors)
        return self.devices.total([t.detach() * self.weight for t in tensors])

    def means(self, values: Mapping[str, float]) -> dict[str, float]:
        """The same for numbers by name; rounded, so that equal shares of images are equal numbers."""
        if self.devices.count == 1:
            return dict(values)
        (found,) = self.mean([torch.tensor([values[name] for name in values], dtype=torch.float64)])
        return {name: float(f"{value:.12g}") for name, value in zip(values, found.tolist(), strict=True)}

    @torch.no_grad()
    def statistics(self, module: nn.Module) -> None:
        """Put the mean of all processes into BatchNorm's running statistics."""
        if self.devices.count > 1:
            layers = [m for m in module.modules() if isinstance(m, _BatchNorm)]
            held = [t for m in layers for t in (m.running_mean, m.running_var) if t is not None]
            for old, new in zip(held, self.mean(held), strict=True):
                old.copy_(new)


WHOLE = Part()


def before_sharing(devices: Devices, method: str, module: nn.Module, batch_size: int) -> list[Notice]:
    """What is computed from the rows of each device, where one device would take the whole mini-batch.

    Raises:
        UsageError: fewer images in a mini-batch than devices.
    """
    if batch_size < devices.count:
        raise UsageError(f"a mini-batch of {batch_size} images cannot be shared by {devices.count} devices", code="A04")
    if devices.count == 1:
        return []
    own = [f"the {BATCHWISE[method]} of {method}"] if method in BATCHWISE else []
    own += ["the batch statistics of BatchNorm"] if normalises_over_the_batch(module) else []
    return [
        Notice("PER_DEVICE", 0, f"{what} come from each device's own images, {batch_size // devices.count} in a step")
        for what in own
    ]


def together(count: int, device: str = "cpu") -> tuple[Devices, torch.device]:
    """Join the other processes of this command, which torchrun or srun has started.

    Args:
        count: How many there should be, on all machines together.
        device: ``cpu`` or ``cuda``.

    Returns:
        The processes, and this one's device.

    Raises:
        UsageError: another number was started; the package is missing; one device is named for all.
        MachineError: fewer GPUs than processes.
    """
    started = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1)
    machines = int(os.environ.get("GROUP_WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_NODES") or 1)
    if count < 1:
        raise UsageError(f"devices must be at least 1, got {count}", code="A04")
    if started != count:
        raise UsageError(
            f"--devices {count} needs {count} process{'es' if count > 1 else ''}, and this command runs as {started}",
            code="A04",
            do=f"torchrun --nproc-per-node {count} -m robeval train ... --devices {count}"
            if count > 1
            else f"--devices {started}, or the command without torchrun",
        )
    if count == 1:
        return ALONE, torch.device(device)
    if ":" in device:
        raise UsageError(
            f"--device {device} is one device, --devices {count} are several", code="A04", do="--device cuda"
        )
    local = count // machines
    if device == "cuda" and torch.cuda.device_count() < local:
        raise MachineError(
            f"{local} processes on this machine need as many GPUs, it has {torch.cuda.device_count()}", code="E02"
        )
    try:
        # Imported here because it takes seconds and few need it.
        fabric_class = import_module("lightning_fabric").Fabric
    except ModuleNotFoundError:
        raise UsageError(
            "--devices needs the package lightning-fabric, which is not installed",
            code="A07",
            do="pip install 'robeval[fabric]'",
        ) from None
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    fabric = fabric_class(accelerator=device, strategy="ddp", devices=local, num_nodes=machines)
    fabric.launch()
    return Devices(count, fabric.global_rank, fabric), fabric.device
