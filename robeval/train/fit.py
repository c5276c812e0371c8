"""The one training loop: every method, every optimiser step, every resume goes through here."""

from __future__ import annotations

import copy
import hashlib
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robeval.core.catalogue import Spec
from robeval.core.classifier import weights_fingerprint
from robeval.core.images import Images
from robeval.core.streams import Streams
from robeval.train import resume
from robeval.train.augment import augmented
from robeval.train.average import Average
from robeval.train.awp import perturbed_weights
from robeval.train.devices import ALONE, Devices, before_sharing
from robeval.train.epoch import OnNotice, OnProgress, Run, end_epoch
from robeval.train.faster import compiled, computing_with, in_layout
from robeval.train.log import write_log
from robeval.train.memory import Memory
from robeval.train.passes import counting
from robeval.train.recipe import Recipe, make_optimizer
from robeval.train.resume import State, identity_of
from robeval.train.schedules import schedule
from robeval.train.step import Objective, about, fill_gradients, objectives
from robeval.train.warnings import Notice, before_training


@dataclass
class FitResult:
    """What a training came to; the module holds the chosen weights, in eval mode.

    Args:
        epoch: Epoch of the chosen weights, counted from 1.
        metrics: That epoch's row of the log.
        rows: The whole log.
        notices: Warnings.
        stopped: Why training ended early, or empty.
        resumed: ``no``, ``yes``, or ``finished`` when there was nothing left to do.
        steps: Optimiser steps of the whole training.
    """

    epoch: int
    metrics: dict[str, Any]
    rows: list[dict[str, Any]]
    notices: list[Notice] = field(default_factory=list)
    stopped: str = ""
    resumed: str = "no"
    steps: int = 0


def fit(
    module: nn.Module,
    train: Images,
    *,
    method: Spec,
    folder: Path,
    recipe: Recipe | None = None,
    validation: Images | None = None,
    device: torch.device | str = "cpu",
    devices: Devices = ALONE,
    pretrained: bool = False,
    surrogate: nn.Module | None = None,
    save_steps: int = 200,
    on_progress: OnProgress | None = None,
    on_notice: OnNotice | None = None,
) -> FitResult:
    """Train a network, or go on where the same training was stopped.

    The state is written after every epoch and every ``save_steps`` steps; on one machine and device type with the same
    number of threads, a killed and resumed training ends with the same weights, bit for bit, on a CPU.

    Args:
        module: The network, pixels in [0, 1] to logits; its starting weights are part of the training's identity.
        train: Training images.
        method: A trainer with its settings, from ``catalogue.parse("trainers", ...)``.
        folder: Where ``state.pt`` and ``log.csv`` go.
        recipe: Settings of the loop.
        validation: Held-out training images for the log and the selection (test images with ``select_from=test``);
            without them the first training batch.
        device: Where to train.
        devices: The processes that train together, from :func:`robeval.train.devices.together`, whose device goes with
            it. Each has all the images. A training may go on with another number of them; on more than one it ends with
            the weights of one up to rounding, save for dropout's masks and what PER_DEVICE warns of.
        pretrained: The weights come from an earlier training; they then serve as the surrogate too.
        surrogate: Another network, whose PGD images are tried on this one after each epoch: what resists its own
            gradients and not these has masked gradients.
        save_steps: Steps between two writes of the state inside an epoch.
        on_progress: Called with steps done, steps in all, and a short text.
        on_notice: Called with each new warning.

    Raises:
        ContractBroken: the loss became NaN (L01), the network does not fit the method (L02), or devices differ (L04).
        UsageError: the folder holds another training (R01); the method cannot be compiled or shared (A04).
        MachineError: the state cannot be written, or the network not compiled.
    """
    recipe = recipe or Recipe()
    before = before_training(method, module, pretrained)
    before += before_sharing(devices, method.method.name, module, min(recipe.batch_size, len(train)))
    if recipe.select_from == "test":
        text = "epochs are chosen on test images: every number on them is optimistic (test-selected)"
        before.append(Notice("TEST_SELECTED", 0, text))
    prints = {
        "training images": train.fingerprint,
        "validation images": validation.fingerprint if validation else "none",
    }
    prints["starting weights"] = weights_fingerprint(module.state_dict(), repr(module))
    if surrogate is None and pretrained:
        surrogate = copy.deepcopy(module)
    identity = identity_of(method.method.name, method.settings, recipe, **prints)
    module.to(device)
    in_layout(module, recipe.channels_last)
    for stale in folder.glob(".*.tmp") if devices.first else ():
        stale.unlink(missing_ok=True)
    saved = resume.load(folder / "state.pt", identity, device)
    begun = repr((identity, saved and (saved.step, saved.done)))
    devices.agree(hashlib.sha256(begun.encode()).hexdigest(), "settings, images, starting weights or saved states")
    train = train.to(device)
    first = train[_order(recipe.seed, 0, train)[: recipe.batch_size]]
    watched = first if validation is None else validation.to(device)
    run = Run(
        module,
        train,
        _share(devices, watched),
        _share(devices, first),
        method,
        method.method.load(),
        recipe,
        make_optimizer(recipe, module),
        saved or State(identity),
        folder / "state.pt",
        save_steps,
        on_progress if devices.first else None,
        on_notice if devices.first else None,
        None if surrogate is None else surrogate.to(device),
        devices=devices,
        watched_part=devices.part(len(watched)),
        first_part=devices.part(len(first)),
        forward=compiled(module) if recipe.compile else None,
    )
    resumed = "no" if saved is None else "finished" if saved.done else "yes"
    if saved is None:
        run.notice(before)
    else:
        module.load_state_dict(saved.weights)
        run.optimizer.load_state_dict(saved.optimizer)
    if recipe.average != "none":
        decay = recipe.average_decay if recipe.average == "ema" else None
        run.average = Average(decay, run.state.averaged, run.state.averaged_count)
        if decay is not None and not run.average.count:
            run.average.update(module)
    while not run.state.done:
        with computing_with(module, run.forward, method.method.name):
            _train_epoch(run)
        end_epoch(run)
        if devices.first:
            write_log(folder / "log.csv", run.state.rows)
    if devices.first:
        write_log(folder / "log.csv", run.state.rows)  # a run killed between state and log left it one row short
    return _choose(run, resumed)


def _order(seed: int, epoch: int, images: Images) -> torch.Tensor:
    """The order of the images in an epoch, a function of seed and epoch alone. -> (N,) int64."""
    return Streams(seed, [epoch], "order", device=images.x.device).permutation(len(images))[0]


def _share(devices: Devices, images: Images) -> Images:
    """The images of a set that this process measures on."""
    return images if devices.count == 1 else images[devices.share(torch.arange(len(images), device=images.x.device))]


def _train_epoch(run: Run) -> None:
    """The batches of the present epoch that are still to come."""
    recipe, state, devices = run.recipe, run.state, run.devices
    order = _order(recipe.seed, state.epoch, run.train)
    factor = schedule(recipe.schedule, recipe.epochs * run.batches, run.batches)
    parameters = [p for p in run.module.parameters() if p.requires_grad]
    name, device = run.method.method.name, run.train.x.device
    while state.batch < run.batches:
        began = time.monotonic()
        whole = order[state.batch * recipe.batch_size : (state.batch + 1) * recipe.batch_size]
        rows, part = devices.share(whole), devices.part(len(whole))
        ids, count = run.train.ids[rows].tolist(), state.epoch * run.batches + state.batch
        kind: dict[str, Any] = {"attempts": [count] * len(ids), "dtype": run.train.x.dtype, "device": device}
        x = augmented(run.train.x, rows, Streams(recipe.seed, ids, "augment", **kind), recipe.augment)
        rng = Streams(recipe.seed, ids, f"train/{name}", **kind)
        for group in run.optimizer.param_groups:
            group["lr"] = recipe.lr * factor(count)
        run.module.train()
        kept = devices.lend(state.memory)
        memory = Memory(kept, rows, state.epoch, count, run.batches, recipe.epochs, recipe.seed, run.train)
        # Dropout draws from the global generator; seeding it for the step makes a resumed run draw the same.
        with torch.random.fork_rng([device] if device.type == "cuda" else []), counting(run.module) as passes:
            torch.manual_seed(recipe.seed * 1_000_003 + count + (devices.rank << 40))
            for objective in objectives(
                run.trainer, run.module, x, run.train.y[rows], rng, run.method.settings, memory
            ):
                logs = _step(run, parameters, about(part, objective))
                _add(state.sums, {f"sum {k}": v * len(whole) for k, v in logs.items()} | {"images": len(whole)})
        part.statistics(run.module)
        state.memory = devices.collect(kept, state.memory, whole)
        seconds = time.monotonic() - began
        _add(state.sums, {"forward": passes.forward, "backward": passes.backward, "seen": len(ids), "seconds": seconds})
        state.batch += 1
        if run.on_progress:
            text = f"epoch {state.epoch + 1}/{recipe.epochs}  loss {logs['loss']:.3f}"
            run.on_progress(count + 1, recipe.epochs * run.batches, text)
        if run.save_steps and (state.batch % run.save_steps == 0) and state.batch < run.batches:
            run.snapshot()


def _step(run: Run, parameters: list[nn.Parameter], objective: Objective) -> dict[str, float]:
    """One step of the optimiser, at perturbed weights where the recipe asks for that. -> the objective's logs."""
    recipe, state = run.recipe, run.state
    perturbs = recipe.awp > 0 and state.epoch >= recipe.awp_warmup
    where = f"epoch {state.epoch + 1}, step {state.step + 1}"
    with (
        perturbed_weights(run.module, objective, recipe.awp, where) if perturbs else nullcontext(objective) as descended
    ):
        logs = fill_gradients(parameters, descended, where)
        if recipe.clip_gradient:
            nn.utils.clip_grad_norm_(parameters, recipe.clip_gradient)
        run.optimizer.step()
    if run.average is not None and run.average.decay is not None:
        run.average.update(run.module)
    state.step += 1
    return logs


def _add(sums: dict[str, float], more: dict[str, float]) -> None:
    for name, value in more.items():
        sums[name] = sums.get(name, 0.0) + value


def _choose(run: Run, resumed: str) -> FitResult:
    """Load the weights that the recipe asks for and report."""
    state = run.state
    epoch = len(state.rows)
    if run.recipe.select == "best":
        run.module.load_state_dict(state.best)
        epoch = state.best_epoch
    elif state.stopped:
        run.module.load_state_dict(state.previous)
        epoch -= 1
    elif run.average is not None and state.previous:
        run.module.load_state_dict(state.previous)
    run.module.eval()
    in_layout(run.module, channels_last=False)
    for p in run.module.parameters():
        p.grad = None
    notices = [Notice(*n) for n in state.notices]
    return FitResult(epoch, state.rows[epoch - 1], state.rows, notices, state.stopped, resumed, state.step)
