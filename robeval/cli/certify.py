"""``robeval certify``."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robeval.cli.certifying import plain, show
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

if TYPE_CHECKING:
    from robeval.core.classifier import Classifier
    from robeval.core.images import Images
    from robeval.store.runstore import RunStore

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
    "    robeval certify model.pt --bound ibp --bound crown --norm linf --eps 1/255,2/255\n\n"
    "**Bounds** (settings after a colon; an estimate is no proof)\n\n" + _bounds_help()
)


def certify(
    model: ModelFile,
    names: Annotated[
        list[str] | None,
        typer.Option("--bound", "-b", help="A bound, repeatable. l-bound by default.", rich_help_panel=BOUND),
    ] = None,
    norm: Annotated[str, typer.Option("--norm", help="linf, l2 or l1.", rich_help_panel=BOUND)] = "l2",
    eps: Annotated[
        str | None,
        typer.Option(
            "--eps",
            help="Radii to prove, such as 1/255,2/255; without it the largest radius of each image is sought.",
            rich_help_panel=BOUND,
        ),
    ] = None,
    top_k: Annotated[
        int,
        typer.Option("--top-k", min=1, help="The class is to stay among so many best ones.", rich_help_panel=BOUND),
    ] = 1,
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
    shard: Annotated[
        str,
        typer.Option(
            "--shard", help="i/n: the i-th of n parts of the images; not for estimates.", rich_help_panel="Run"
        ),
    ] = "",
    device: Device = "cpu",
    out: Runs = "runs",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Bound the robustness of a classifier image by image, and hold the bounds against the attacks at hand.

    Every number carries its kind: a proof holds for every point of the ball, a probabilistic bound for the smoothed
    classifier, an estimate rests on sampled constants and can be wrong. The same command resumes.
    """
    set_quiet(quiet or json)
    from robeval.core.numbers import radii

    specs = specs_of(names or ["l-bound"], norm, top_k)
    values = radii(eps, norm) if eps else []
    classifier, chosen = load_both(
        model, data, split, images, arch=arch, arch_arg=arch_arg, normalise=normalise, device=device
    )
    from robeval.certification.run import certify as compute
    from robeval.certification.settings import Settings
    from robeval.reports.falsify import attack_runs, hits, summary

    settings = Settings(specs, norm, seed, batch_size, values, top_k, shard)
    with progress("certify") as on_progress:
        store = compute(classifier, chosen, settings, root=out, argv=sys.argv[1:], on_progress=on_progress)
    for warning in store.warnings:
        note(warning)
    attacked = attack_runs(runs or out, store.manifest())
    contradicted(store, attacked)
    table = summary(store, hits(attacked))
    repair(table, classifier, chosen, store, attacked)
    if json:
        print_json({"bounds": [plain(row) for row in table], "folder": str(store.folder)})
        return
    show(table)
    after = f"robeval sandwich {out}" if any(row["kind"] == "proof" for row in table) else f"robeval table {out}"
    after = after if attacked else f"robeval attack {model} --data {data} --norm {norm} --eps {eps or 'EPS'}"
    note(f"{store.folder}   next: {after}")


def specs_of(names: list[str], norm: str, top_k: int) -> list[catalogue.Spec]:
    """The bounds that the user named; those that know ``top`` hear it from ``--top-k``.

    Raises:
        UsageError: unknown bound, setting or norm, or a bound without this norm.
    """
    from robeval.core.ball import NORMS
    from robeval.core.choosing import choose
    from robeval.core.errors import unknown

    if norm not in NORMS:
        raise unknown("norm", norm, NORMS)
    if top_k > 1:
        names = [_with_top(name, top_k) for name in names]
    return choose("bounds", names, norm)


def _with_top(name: str, top_k: int) -> str:
    settings = {s.name for s in catalogue.parse("bounds", name).method.settings}
    if "top" not in settings or "top=" in name:
        return name
    return f"{name}{',' if ':' in name else ':'}top={top_k}"


def contradicted(store: RunStore, attacked: list[RunStore]) -> None:
    """Stop with an alarm where an attack at hand landed inside one of the proofs.

    Raises:
        Contradicted: with both records.
    """
    from robeval.core.errors import FileRefused
    from robeval.reports.sandwich import insist, sandwiches

    with contextlib.suppress(FileRefused):  # no proof, or nothing attacked
        insist(sandwiches([store, *attacked]))


def repair(
    table: list[dict[str, Any]], classifier: Classifier, images: Images, store: RunStore, attacked: list[RunStore]
) -> None:
    """Beside the constant of each estimate that has one, the smallest one that the attacks allow."""
    from robeval.certification.repair import repaired

    methods = {m["label"]: m for m in store.manifest()["methods"]}
    for row in table:
        method = methods[row["bound"]]
        row["symbol"] = {1: "L", 2: "C"}.get(method["order"], "")
        if row["kind"] == "estimate" and method["order"]:
            row["repaired_constant"], row["checked_against"] = repaired(
                classifier, images, method, row["norm"], row["constant"], attacked
            )
