"""``robeval train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from robeval.cli.common import Device, Json, Quiet, device_named, note, print_json, progress, set_quiet
from robeval.cli.loading import DATA, MODEL, Data, normalisation, pairs
from robeval.core import catalogue
from robeval.core.errors import UsageError
from robeval.core.numbers import number, pretty, radius

THREAT, LOOP, OUTPUT, RUN = "Threat model", "Training loop", "Output", "Run"


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
    "**Methods** (settings after a colon or with --set)\n\n" + _trainers_help()
)


def train(
    method: Annotated[str, typer.Argument(help="A method, such as adv or soar:init=pgd1.", metavar="METHOD")],
    data: Data = "digits",
    normalise: Annotated[
        str,
        typer.Option(
            "--normalise",
            help="Inside the model: data (the training images' own), none, per-image, or MEANS/STDS.",
            rich_help_panel=DATA,
        ),
    ] = "data",
    held_out: Annotated[
        int | None,
        typer.Option(
            "--hold-out",
            min=0,
            help="Training images kept for log and selection; a tenth, at most 1000, by default.",
            rich_help_panel=DATA,
        ),
    ] = None,
    augment: Annotated[str, typer.Option("--augment", help="none, crop or crop-flip.", rich_help_panel=DATA)] = "none",
    model: Annotated[
        str,
        typer.Option(
            "--model", help="Architecture or file.py:function; by default by image size.", rich_help_panel=MODEL
        ),
    ] = "",
    model_arg: Annotated[
        list[str] | None,
        typer.Option("--model-arg", help="key=value for --model, repeatable.", rich_help_panel=MODEL),
    ] = None,
    init_from: Annotated[
        str, typer.Option("--init-from", help="Start from this trained model.", rich_help_panel=MODEL)
    ] = "",
    weights: Annotated[
        str, typer.Option("--weights", help="Starting weights: he or torch.", rich_help_panel=MODEL)
    ] = "he",
    norm: Annotated[str, typer.Option("--norm", help="linf, l2 or l1.", rich_help_panel=THREAT)] = "linf",
    eps: Annotated[str, typer.Option("--eps", help="Radius in pixel units.", rich_help_panel=THREAT)] = "8/255",
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value, a setting of METHOD, repeatable.", rich_help_panel=THREAT),
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over the data.", rich_help_panel=LOOP)] = 20,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images per step.", rich_help_panel=LOOP)] = 64,
    optimizer: Annotated[str, typer.Option("--optimizer", help="sgd or adam.", rich_help_panel=LOOP)] = "adam",
    lr: Annotated[str, typer.Option("--lr", help="Largest learning rate.", rich_help_panel=LOOP)] = "0.003",
    momentum: Annotated[float, typer.Option("--momentum", help="Of sgd.", rich_help_panel=LOOP)] = 0.9,
    weight_decay: Annotated[str, typer.Option("--weight-decay", help="Coupled L2 factor.", rich_help_panel=LOOP)] = "0",
    schedule: Annotated[
        str,
        typer.Option("--schedule", help="constant, cosine, cyclic or milestones:60/120x0.2.", rich_help_panel=LOOP),
    ] = "cosine",
    select: Annotated[
        str, typer.Option("--select", help="best or last epoch's weights.", rich_help_panel=LOOP)
    ] = "best",
    select_on: Annotated[
        str, typer.Option("--select-on", help="auto, robust or clean accuracy, held out.", rich_help_panel=LOOP)
    ] = "auto",
    seed: Annotated[int, typer.Option("--seed", help="Seed of weights, order and all draws.", rich_help_panel=RUN)] = 0,
    device: Device = "cpu",
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Throw the training of this file away first.", rich_help_panel=RUN)
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Model file, .pt or .safetensors.", rich_help_panel=OUTPUT),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a classifier with one of the methods and write a model file.

    The same command resumes an unfinished training exactly where it stood. Log and state are in FILE.train beside it.
    """
    set_quiet(quiet or json)
    spec, epsilon = spec_of(method, norm, eps, pairs(setting))
    path = out or Path(f"{spec.method.name}.pt")
    where = device_named(device)
    from robeval.data.load import load
    from robeval.train.job import Job, run_job
    from robeval.train.recipe import Recipe

    recipe = Recipe(
        epochs, batch_size, optimizer, number(lr, name="lr", code="A04"), momentum,
        number(weight_decay, name="weight decay", code="A04"), schedule, augment, select, select_on,
        str(spec.settings.get("norm", norm)), epsilon, seed,
    )  # fmt: skip
    job = Job(
        spec, recipe, path, model, pairs(model_arg), normalisation(normalise), weights, init_from, held_out, fresh,
        where, {"data": data},
    )  # fmt: skip
    images = load(data, "train")
    with progress(f"train {spec.label}") as on_progress:
        result = run_job(job, images, on_progress=on_progress, on_notice=lambda notice: note(str(notice)))
    if result.resumed == "finished":
        note("this training is finished already; --fresh trains anew")
    elif result.resumed == "yes":
        note("resumed an unfinished training")
    row = result.metrics
    if json:
        document = {"model": str(path), "log": str(job.folder / "log.csv"), "epoch": result.epoch, "metrics": row}
        warnings = [{"code": n.code, "epoch": n.epoch, "text": n.text} for n in result.notices]
        print_json(
            document
            | {"warnings": warnings, "stopped": result.stopped, "resumed": result.resumed, "steps": result.steps}
        )
    else:
        typer.echo(
            f"{path}  {spec.label}  epoch {result.epoch}/{epochs}  held out: clean {row['clean_accuracy']:.1%},"
            f" {recipe.norm} {pretty(epsilon)} PGD-20 <= {row['pgd20_accuracy']:.1%}"
        )
        note(f"{job.folder / 'log.csv'}   next: robeval attack {path} --data {data} --norm {recipe.norm} --eps {eps}")


def spec_of(method: str, norm: str, eps: str, settings: dict[str, str]) -> tuple[catalogue.Spec, float]:
    """The trainer with --norm, --eps and --set put into its settings, and the radius of the threat model.

    Settings written after the colon or with --set win over --norm and --eps.

    Raises:
        UsageError: unknown method, setting or norm; a norm that the method does not support; a bad radius.
    """
    from robeval.core.errors import unknown

    base = catalogue.parse("trainers", method)
    own = {s.name for s in base.method.settings}
    norms = base.method.facts["norms"] or ("linf", "l2", "l1")
    _, _, tail = method.partition(":")
    named = {part.partition("=")[0].strip().replace("-", "_") for part in tail.split(",")}
    if norm not in ("linf", "l2", "l1"):
        raise unknown("norm", norm, ("linf", "l2", "l1"))
    given: dict[str, Any] = {k: v for k, v in {"norm": norm, "eps": eps}.items() if k in own and k not in named}
    if given.get("norm", norm) not in norms:
        raise UsageError(
            f"{base.method.name} does not support {norm}", code="A04", do=f"choose from: {', '.join(norms)}"
        )
    if "eps" not in named | set(settings):
        radius(eps, norm)
    text = ",".join(f"{k}={v}" for k, v in {**given, **settings}.items())
    spec = catalogue.parse("trainers", method + ("," if tail else ":" if text else "") + text)
    epsilon = float(spec.settings["eps"]) if "eps" in spec.settings else radius(eps, norm)
    radius(str(epsilon), str(spec.settings.get("norm", norm)))
    return spec, epsilon
