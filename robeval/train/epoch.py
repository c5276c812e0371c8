"""The loop's shared state, and what happens when an epoch ends: measure, warn, choose, write."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robeval.core.ball import Ball
from robeval.core.catalogue import Spec
from robeval.core.classifier import weights_fingerprint
from robeval.core.errors import ContractBroken
from robeval.core.images import Images
from robeval.train import resume
from robeval.train.average import Average
from robeval.train.devices import ALONE, WHOLE, Devices, Part
from robeval.train.faster import Forward
from robeval.train.measure import accuracy_on_both, measure, pgd_accuracy, transferred
from robeval.train.recipe import Recipe
from robeval.train.resume import State, copied
from robeval.train.step import Trainer
from robeval.train.warnings import Guard, Notice, after_epoch

OnProgress = Callable[[int, int, str], None]
OnNotice = Callable[[Notice], None]


@dataclass
class Run:
    """What the parts of the loop share."""

    module: nn.Module
    train: Images
    watched: Images
    first: Images
    method: Spec
    trainer: Trainer
    recipe: Recipe
    optimizer: torch.optim.Optimizer
    state: State
    file: Path
    save_steps: int
    on_progress: OnProgress | None
    on_notice: OnNotice | None
    surrogate: nn.Module | None = None
    transfers: Tensor | None = None  # PGD images of the surrogate; they never change
    average: Average | None = None
    devices: Devices = ALONE
    watched_part: Part = WHOLE  # what this process's ``watched`` weighs among those of all processes
    first_part: Part = WHOLE
    forward: Forward | None = None  # the network's compiled forward pass

    @property
    def batches(self) -> int:
        return -(-len(self.train) // self.recipe.batch_size)

    @property
    def robust(self) -> bool:
        return bool(self.method.method.facts.get("robust"))

    def snapshot(self) -> None:
        """Write the state; all processes hold the same, and the first one writes."""
        if not self.devices.first:
            return
        self.state.weights = self.module.state_dict()
        self.state.optimizer = self.optimizer.state_dict()
        if self.average is not None:
            self.state.averaged, self.state.averaged_count = self.average.tensors, self.average.count
        resume.save(self.file, self.state)

    def notice(self, found: list[Notice]) -> list[Notice]:
        """Keep and tell the warnings whose code was not told before."""
        new = [n for n in found if n.code not in {code for code, _, _ in self.state.notices} or n.epoch == 0]
        for n in new:
            self.state.notices.append([n.code, n.epoch, n.text])
            if self.on_notice:
                self.on_notice(n)
        return new


def end_epoch(run: Run) -> None:
    """Measure, warn, choose, and write the state."""
    began, recipe, state = time.monotonic(), run.recipe, run.state
    broken = [n for n, p in run.module.named_parameters() if not torch.isfinite(p).all()]
    if broken:
        raise ContractBroken(
            f"training diverged: {len(broken)} weights hold NaN or Inf, first: {broken[0]}",
            code="L01",
            where=f"epoch {state.epoch + 1}",
            do="a smaller --lr, with --fresh",
        )
    if run.devices.count > 1:
        run.devices.agree(weights_fingerprint(run.module.state_dict()), "weights")
    ball, sums = Ball(recipe.norm, recipe.eps), state.sums
    row: dict[str, Any] = {"epoch": state.epoch + 1, "lr": run.optimizer.param_groups[0]["lr"]}
    row |= {k.removeprefix("sum "): v / sums["images"] for k, v in sums.items() if k.startswith("sum ")}
    row |= {"forward_per_step": sums["forward"] / sums["seen"], "backward_per_step": sums["backward"] / sums["seen"]}
    averaged = _averaged(run)
    row |= _measured(run, averaged, ball)
    collapsed = False
    if run.robust:
        guard = Guard(last=state.guard)
        collapsed = guard.fell(row["first_batch_accuracy"])
        state.guard = guard.last
    row["seconds"] = sums["seconds"] + time.monotonic() - began
    found = after_epoch(
        [*state.rows, row], robust=run.robust, size=run.train.x[0].numel(), classes=len(run.train.classes)
    )
    if collapsed:
        text = "robust accuracy on the first training batch collapsed: training stopped, weights of the epoch before"
        found.append(Notice("CATASTROPHIC_OVERFITTING", state.epoch + 1, text))
        state.stopped = "CATASTROPHIC_OVERFITTING"
    row["warnings"] = " ".join(n.code for n in found)
    state.rows.append(row)
    run.notice(found)
    if not collapsed:
        chosen, prefix = (run.module, "") if averaged is None else (averaged, "averaged_")
        score = [row[prefix + "pgd20_accuracy"], row[prefix + "clean_accuracy"]]
        if not (run.robust if recipe.select_on == "auto" else recipe.select_on == "robust"):
            score.reverse()
        if score > state.best_score:
            state.best, state.best_epoch, state.best_score = copied(chosen.state_dict()), state.epoch + 1, score
        if run.robust or averaged is not None:
            state.previous = copied(chosen.state_dict())
    state.epoch, state.batch, state.sums = state.epoch + 1, 0, {}
    state.done = collapsed or state.epoch >= recipe.epochs
    run.snapshot()


def _measured(run: Run, averaged: nn.Module | None, ball: Ball) -> dict[str, float]:
    """Columns of the log about the network as it stands; each process looks at its share of the images."""
    many = 2 * run.recipe.batch_size  # no parameter gradients, so twice the batch fits
    how: dict[str, Any] = {"seed": run.recipe.seed, "batch_size": many}
    row = dict(measure(run.module, run.watched, ball, **how))
    if run.robust and run.surrogate is not None:
        if run.transfers is None:
            run.transfers = transferred(run.surrogate, run.watched, ball, **how)
        row["transfer_accuracy"] = accuracy_on_both(run.module, run.watched, run.transfers, batch_size=many)
    if averaged is not None:
        told = measure(averaged, run.watched, ball, **how)
        row |= {f"averaged_{name}": told[name] for name in ("clean_accuracy", "pgd20_accuracy")}
    row = run.watched_part.means(row)
    if run.robust:
        first = pgd_accuracy(run.module, run.first, ball, fast=True, **how)
        row |= run.first_part.means({"first_batch_accuracy": first})
    return row


def _averaged(run: Run) -> nn.Module | None:
    """The network with averaged weights, once there are any."""
    if run.average is None:
        return None
    mean_of_epochs = run.average.decay is None
    if mean_of_epochs and run.state.epoch + 1 > run.recipe.average_start * run.recipe.epochs:
        run.average.update(run.module)
    if not run.average.count:
        return None
    return run.average.network(run.module, run.train if mean_of_epochs else None, run.recipe.batch_size)
