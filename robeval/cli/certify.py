"""``robeval certify``."""

from __future__ import annotations

import math
import sys
from typing import Annotated, Any

import typer

from robeval.cli.common import Device, Json, Quiet, note, print_json, progress, set_quiet
from robeval.cli.loading import (
    Arch,
    ArchArg,
    BatchSize,
    Data,
    ModelFile,
    Normalise,
    Runs,
    Seed,
    Split,
    Subset,
    load_both,
)
from robeval.core import catalogue

BOUND = "Bound"


def _bounds_help() -> str:
    """One line per bound of the folder, with its settings and defaults."""
    lines = []
    for m in catalogue.methods("bounds").values():
        settings = ", ".join(f"{s.name}={s.default}" for s in m.settings)
        lines.append(f"- `{m.name}` {m.facts['kind']} [{', '.join(m.facts['norms'])}] {m.summary} *{settings}*")
    return "\n".join(lines)


EXAMPLES = (
    "**Examples**\n\n"
    "    robeval certify model.pt --bound l-bound --norm linf\n\n"
    "    robeval certify model.pt --bound l-bound --bound c-bound:tolerance=1e-3 --norm l2 --images 200\n\n"
    "**Bounds** (settings after a colon; an estimate is no proof)\n\n" + _bounds_help()
)


def certify(
    model: ModelFile,
    names: Annotated[
        list[str] | None,
        typer.Option("--bound", "-b", help="A bound, repeatable. l-bound by default.", rich_help_panel=BOUND),
    ] = None,
    norm: Annotated[str, typer.Option("--norm", help="linf, l2 or l1.", rich_help_panel=BOUND)] = "l2",
    runs: Annotated[
        str | None,
        typer.Option(
            "--runs",
            help="Folder of attack runs that the bounds are held against; the folder of --out by default.",
            rich_help_panel=BOUND,
        ),
    ] = None,
    data: Data = "digits",
    split: Split = "test",
    images: Subset = None,
    arch: Arch = None,
    arch_arg: ArchArg = None,
    normalise: Normalise = "none",
    seed: Seed = 0,
    batch_size: BatchSize = 256,
    device: Device = "cpu",
    out: Runs = "runs",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Bound the robustness of a classifier image by image, and hold the bounds against the attacks at hand.

    Every number carries its kind: an estimate rests on sampled constants and can be wrong. The same command resumes.
    """
    set_quiet(quiet or json)
    specs = specs_of(names or ["l-bound"], norm)
    classifier, chosen = load_both(
        model, data, split, images, arch=arch, arch_arg=arch_arg, normalise=normalise, device=device
    )
    from robeval.reports.falsify import attack_runs, hits, summary
    from robeval.certify.repair import repaired
    from robeval.certify.run import Settings
    from robeval.certify.run import certify as compute

    settings = Settings(specs, norm, seed=seed, batch_size=batch_size)
    with progress("certify") as on_progress:
        store = compute(classifier, chosen, settings, root=out, argv=sys.argv[1:], on_progress=on_progress)
    for warning in store.warnings:
        note(warning)
    manifest = store.manifest()
    attacked = attack_runs(runs or out, manifest)
    table = summary(store, hits(attacked))
    methods = {m["label"]: m for m in manifest["methods"]}
    for row in table:
        method = methods[row["bound"]]
        row["symbol"] = {1: "L", 2: "C"}.get(method["order"], "")
        if method["order"]:
            row["repaired_constant"], row["checked_against"] = repaired(
                classifier, chosen, method, norm, row["constant"], attacked
            )
    if json:
        print_json({"bounds": [_plain(row) for row in table], "folder": str(store.folder)})
        return
    _show(table)
    after = f"robeval table {out}" if attacked else f"robeval attack {model} --data {data} --norm {norm} --eps EPS"
    note(f"{store.folder}   next: {after}")


def specs_of(names: list[str], norm: str) -> list[catalogue.Spec]:
    """The bounds that the user named.

    Raises:
        UsageError: unknown bound, setting or norm, or a bound without this norm.
    """
    from robeval.core.ball import NORMS
    from robeval.core.choosing import choose
    from robeval.core.errors import unknown

    if norm not in NORMS:
        raise unknown("norm", norm, NORMS)
    return choose("bounds", names, norm)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row that JSON can hold: no nan, no infinity."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def _show(table: list[dict[str, Any]]) -> None:
    """One block per bound on stdout, headed by its kind."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for row in table:
        symbol = row["symbol"]
        why = " (its constant was sampled: not a proof)" if row["kind"] == "estimate" else ""
        console.print(f"{row['kind'].upper()} {row['bound']}{why}", markup=False, style="bold")
        grid = Table(box=None, show_header=False, pad_edge=False)
        grid.add_column()
        grid.add_column(overflow="fold")
        grid.add_row("mean radius", f"{row['mean_radius']:.4g} {row['norm']} over {row['images']} images")
        grid.add_row("median radius", f"{row['median_radius']:.4g}")
        grid.add_row("clean accuracy", f"{row['correct']}/{row['images']}; a misclassified image has radius 0")
        grid.add_row(f"constant {symbol}", f"{row['constant']:.4g} of {row['loss']}, largest over the {row['domain']}")
        grid.add_row("falsified", _falsified(row))
        if row.get("checked_against"):
            raised = f"{row['repaired_constant']:.4g}"
            grid.add_row(f"repaired {symbol}", f"{raised}, from {row['checked_against']} adversarial images")
        seconds = f"{row['seconds']:.2f} s" if math.isfinite(row["seconds"]) else "finished earlier"
        grid.add_row("cost", f"{row['passes']:,} passes, {seconds}, {row['arithmetic']}")
        console.print(grid)
        console.print()


def _falsified(row: dict[str, Any]) -> str:
    """How attacks contradict a bound, in words."""
    if not row["attacked"]:
        return "not checked: no attack records of this model and data"
    text = f"{row['falsified']}/{row['attacked']} attacked images ({100 * row['share']:.1f} %)"
    if row["broken"]:
        text += f", largest radius / attack distance {row['worst_ratio']:.3g} (image {row['witness']})"
    return text + f"; attacks: {row['attacks']}"
