"""``robeval train``."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robeval.cli.common import Json, OnProgress, Quiet, device_named, note, print_json, progress, set_quiet
from robeval.cli.loading import normalisation, pairs
from robeval.core import catalogue
from robeval.core.errors import RobevalError
from robeval.core.numbers import number, pretty
from robeval.train import orders
from robeval.train.orders import Order
from robeval.train.preset import notes, presets, resolve

if TYPE_CHECKING:
    from robeval.train.fit import FitResult
    from robeval.train.job import Job

DATA, MODEL, LOOP, PICK, OUTPUT, RUN = "Data", "Model", "Training loop", "Averages and selection", "Output", "Run"
FIRST = None


def _trainers_help() -> str:
    """One line per trainer of the folder, with its settings and defaults."""
    lines = []
    for m in catalogue.methods("trainers").values():
        settings = ", ".join(f"{s.name}={s.default}" for s in m.settings)
        lines.append(f"- `{m.name}` {m.summary}" + (f" *{settings}*" if settings else ""))
    return "\n".join(lines)


EXAMPLES = (
    "**Examples**\n\n"
    "    robeval train adv --data digits --model-arg act=smooth --eps 2/16 --set steps=5 --epochs 10 --out adv.pt\n\n"
    "    robeval train soar:init=pgd1 --data digits --init-from standard.pt --eps 2/16 --lr 0.001 --out soar.pt\n\n"
    "    robeval train awp-trades --preset rat --tiny\n\n"
    "Presets, --config, variables such as ROBEVAL_TRAIN_EPOCHS, then flags: each wins over the one before.\n\n"
    "**Methods** (settings after a colon or with --set; `awp-NAME` is NAME with --awp)\n\n" + _trainers_help()
)


def _flag(name: str, panel: str | None, help_: str, *more: str) -> Any:
    """An option whose default is that of the order; absent means that another layer may say it."""
    key = name.removeprefix("--").replace("-", "_")
    default = orders.KEYS[key].default
    shown = "" if default is None else str(default)
    metavar = {"int": "INTEGER", "float": "NUMBER", "int | None": "INTEGER"}.get(orders.KEYS[key].type, "TEXT")
    return typer.Option(name, *more, help=help_, rich_help_panel=panel, show_default=shown or False, metavar=metavar)


def train(
    method: Annotated[
        str | None, typer.Argument(help="A method, such as adv, soar:init=pgd1 or awp-trades.", metavar="METHOD")
    ] = None,
    data: Annotated[
        str | None, _flag("--data", FIRST, "digits, mnist5k, idx:DIR, folder:DIR, npz:FILE, ... (robeval list data).")
    ] = None,
    norm: Annotated[str | None, _flag("--norm", FIRST, "linf, l2 or l1.")] = None,
    eps: Annotated[str | None, _flag("--eps", FIRST, "Radius in pixel units.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, a setting of METHOD, repeatable.")
    ] = None,
    epochs: Annotated[str | None, _flag("--epochs", FIRST, "Passes over the data.")] = None,
    lr: Annotated[str | None, _flag("--lr", FIRST, "Largest learning rate.")] = None,
    init_from: Annotated[str | None, _flag("--init-from", FIRST, "Start from this trained model.")] = None,
    preset: Annotated[
        str | None, _flag("--preset", FIRST, f"A paper's own training of METHOD: {', '.join(presets())}.")
    ] = None,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Small data, network and epochs: the same code in seconds.")
    ] = False,
    config: Annotated[Path | None, typer.Option("--config", help="TOML file; keys are the flags' names.")] = None,
    out: Annotated[str | None, _flag("--out", FIRST, "Model file, .pt or .safetensors.", "-o")] = None,
    normalise: Annotated[
        str | None,
        _flag("--normalise", DATA, "Inside the model: data (the training images' own), none, per-image, MEANS/STDS."),
    ] = None,
    hold_out: Annotated[
        str | None,
        _flag("--hold-out", DATA, "Training images kept for log and selection; a tenth, at most 1000, by default."),
    ] = None,
    augment: Annotated[
        str | None, _flag("--augment", DATA, "none, crop, crop-flip, crop-flip:pad=reflect,cutout=16, ...")
    ] = None,
    model: Annotated[
        str | None, _flag("--model", MODEL, "Architecture or file.py:function; by default by image size.")
    ] = None,
    model_arg: Annotated[
        list[str] | None,
        typer.Option("--model-arg", help="key=value for --model, repeatable.", rich_help_panel=MODEL),
    ] = None,
    weights: Annotated[str | None, _flag("--weights", MODEL, "Starting weights: he, torch or ibp.")] = None,
    surrogate: Annotated[
        str | None, _flag("--surrogate", MODEL, "Model whose images are tried each epoch; --init-from by default.")
    ] = None,
    batch_size: Annotated[str | None, _flag("--batch-size", LOOP, "Images per step.")] = None,
    optimizer: Annotated[str | None, _flag("--optimizer", LOOP, "sgd or adam.")] = None,
    momentum: Annotated[str | None, _flag("--momentum", LOOP, "Of sgd.")] = None,
    weight_decay: Annotated[str | None, _flag("--weight-decay", LOOP, "Coupled L2 factor.")] = None,
    schedule: Annotated[
        str | None, _flag("--schedule", LOOP, "constant, cosine, cyclic or milestones:60/120x0.2.")
    ] = None,
    clip_gradient: Annotated[
        str | None, _flag("--clip-gradient", LOOP, "Largest norm of a step's gradient; 0 for no limit.")
    ] = None,
    awp: Annotated[
        str | None, _flag("--awp", LOOP, "Adversarial weight perturbation, relative to the weights; 0 for none.")
    ] = None,
    awp_warmup: Annotated[str | None, _flag("--awp-warmup", LOOP, "Epochs without it at the beginning.")] = None,
    average: Annotated[
        str | None, _flag("--average", PICK, "Mean of weights: none, swa (epochs) or ema (steps).")
    ] = None,
    average_start: Annotated[
        str | None, _flag("--average-start", PICK, "Share of the epochs after which swa begins.")
    ] = None,
    average_decay: Annotated[str | None, _flag("--average-decay", PICK, "Weight of the past in ema.")] = None,
    select: Annotated[str | None, _flag("--select", PICK, "best or last epoch's weights.")] = None,
    select_on: Annotated[
        str | None, _flag("--select-on", PICK, "auto, robust or clean accuracy of the images selected on.")
    ] = None,
    select_from: Annotated[
        str | None, _flag("--select-from", PICK, "held-out training images, or test: stamped as optimistic.")
    ] = None,
    seed: Annotated[str | None, _flag("--seed", RUN, "Seed of weights, order and all draws.")] = None,
    device: Annotated[str | None, _flag("--device", RUN, "cpu, cuda or cuda:N.")] = None,
    devices: Annotated[
        str | None, _flag("--devices", RUN, "Processes, one device each; start them with torchrun.")
    ] = None,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Colours last in memory: often faster.", rich_help_panel=RUN)
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="torch.compile; not for double backward.", rich_help_panel=RUN)
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Throw the training of this file away first.", rich_help_panel=RUN)
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Write all settings as TOML and stop.", rich_help_panel=OUTPUT)
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a classifier with one of the methods and write a model file.

    The same command resumes an unfinished training exactly where it stood. Log and state are in FILE.train beside it.
    """
    told = dict(locals())
    set_quiet(quiet or json)
    layers = [*([orders.layer(str(config), orders.from_file(config))] if config else []), orders.environment()]
    layers.append(flags(told))
    order = resolve(layers)
    if print_config:
        sys.stdout.write(orders.to_toml(order))
        return
    for text in notes(order, orders.values_of(layers)["method"]):
        note(text)
    silent = order.devices > 1 and not _first_process()  # the first process talks for all
    set_quiet(quiet or json or silent)
    try:
        with progress(f"train {order.label}") as on_progress:
            job, result = run(order, fresh=fresh, on_progress=on_progress)
    except RobevalError as error:
        if silent:
            raise typer.Exit(error.exit_code) from None
        raise
    if silent:
        return
    if result.resumed == "finished":
        note("this training is finished already; --fresh trains anew")
    elif result.resumed == "yes":
        note("resumed an unfinished training")
    if json:
        print_json(document(job, result))
        return
    from robeval.train.job import judged

    recipe, (clean, pgd20) = job.recipe, judged(result.metrics)
    seen = "test-selected (optimistic)" if recipe.select_from == "test" else "held out"
    typer.echo(
        f"{job.out}  {order.label}  epoch {result.epoch}/{recipe.epochs}  {seen}: clean {clean:.1%},"
        f" {recipe.norm} {pretty(recipe.eps)} PGD-20 <= {pgd20:.1%}"
    )
    note(
        f"{job.folder / 'log.csv'}   next: robeval attack {job.out} --data {order.data} --norm {recipe.norm}"
        f" --eps {order.eps}"
    )


def _first_process() -> bool:
    """Is this the first of the processes that torchrun or srun has started?"""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0


def flags(told: Mapping[str, Any]) -> orders.Layer:
    """What was given on the command line, from the function's own arguments; what is absent says nothing."""
    given = {k: v for k, v in told.items() if k in orders.KEYS and v is not None and v is not False}
    tables = {"settings": pairs(told["setting"]), "model_arg": pairs(told["model_arg"])}
    return orders.layer("command line", given | tables)


def run(
    order: Order, *, fresh: bool = False, load: Any = None, on_progress: OnProgress | None = None
) -> tuple[Job, FitResult]:
    """Train what was ordered.

    Args:
        order: From :func:`robeval.train.preset.resolve`.
        fresh: Throw the training of this file away first.
        load: Instead of the loader of data sets; takes text and split.
        on_progress: Told (steps, total, text).
    """
    from robeval.train.job import run_job

    if load is None:
        from robeval.data.load import load
    job = job_of(order, fresh)
    test = load(order.data, "test") if job.recipe.select_from == "test" else None
    images = load(order.data, "train")
    return job, run_job(job, images, test, on_progress=on_progress, on_notice=lambda notice: note(str(notice)))


def job_of(order: Order, fresh: bool = False) -> Job:
    """The job of an order, everything but the images checked.

    Raises:
        UsageError: values that make no sense.
        MachineError: no such device.
    """
    from robeval.train.job import Job
    from robeval.train.recipe import Recipe

    names = [f for f in Recipe.__dataclass_fields__ if f not in ("norm", "eps")]
    eps = number(order.eps, name="eps")
    recipe = Recipe(**{name: getattr(order, name) for name in names}, norm=order.norm, eps=eps)
    told = {"data": order.data} | ({"preset": order.preset} if order.preset else {})
    return Job(
        order.spec, recipe, Path(order.out), order.model, order.model_arg, normalisation(order.normalise),
        order.weights, order.init_from, order.surrogate, order.hold_out, fresh, device_named(order.device),
        order.devices, told,
    )  # fmt: skip


def document(job: Job, result: FitResult) -> dict[str, Any]:
    """The result for machines."""
    return {
        "model": str(job.out),
        "log": str(job.folder / "log.csv"),
        "epoch": result.epoch,
        "metrics": result.metrics,
        "warnings": [{"code": n.code, "epoch": n.epoch, "text": n.text} for n in result.notices],
        "selected_from": job.recipe.select_from,
        "stopped": result.stopped,
        "resumed": result.resumed,
        "steps": result.steps,
    }
