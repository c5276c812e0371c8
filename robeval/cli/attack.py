"""``robeval attack``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
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
from robeval.cli.planning import announce, prepared, settings_of, tell_plan, transferable
from robeval.core import catalogue
from robeval.core.errors import GateFailed

THREAT = "Threat model"


def _attacks_help() -> str:
    """One line per attack of the folder, with its settings and defaults."""
    lines = []
    for m in catalogue.methods("attacks").values():
        settings = ", ".join(f"{s.name}={s.default}" for s in m.settings)
        lines.append(
            f"- `{m.name}` [{', '.join(m.facts['norms'])}] {m.summary}" + (f" *{settings}*" if settings else "")
        )
    lines += [f"- `{r.name}:...` {r.summary}" for r in catalogue.methods("references").values()]
    return "\n".join(lines)


EXAMPLES = (
    "**Examples**\n\n"
    "    robeval attack model.pt --suite quick --eps 2/16\n\n"
    "    robeval attack model.pt --attack pgd:steps=20,restarts=5 --attack square --eps 8/255 --images 500 --each\n\n"
    "**Attacks** (settings after a colon, as `pgd:steps=50,restarts=10`)\n\n" + _attacks_help()
)


def attack(
    model: ModelFile,
    suite: Annotated[
        str | None,
        typer.Option(
            "--suite",
            "-s",
            help="quick, autoattack, white-box, ... (robeval list suites), or a .toml file.",
            rich_help_panel=THREAT,
        ),
    ] = None,
    attacks: Annotated[
        list[str] | None,
        typer.Option("--attack", "-a", help="One attack, repeatable; instead of a suite.", rich_help_panel=THREAT),
    ] = None,
    norm: Annotated[str, typer.Option("--norm", help="linf, l2 or l1.", rich_help_panel=THREAT)] = "linf",
    eps: Annotated[
        str | None,
        typer.Option("--eps", help="Radius in pixel units, or several: 1/255,8/255.", rich_help_panel=THREAT),
    ] = None,
    each: Annotated[
        bool,
        typer.Option(
            "--each",
            help="Run every attack on every correct image, not only on those still standing.",
            rich_help_panel=THREAT,
        ),
    ] = False,
    transfer_from: Annotated[
        list[str] | None,
        typer.Option(
            "--transfer-from",
            help="Craft the attacks on this model instead, at full length, and judge them here; repeatable.",
            rich_help_panel=THREAT,
        ),
    ] = None,
    randomised: Annotated[
        bool,
        typer.Option(
            "--randomised", help="The model answers at random; see --suite autoattack-rand.", rich_help_panel=THREAT
        ),
    ] = False,
    data: Data = "digits",
    split: Split = "test",
    images: Subset = None,
    arch: Arch = None,
    arch_arg: ArchArg = None,
    normalise: Normalise = "none",
    seed: Seed = 0,
    batch_size: BatchSize = 256,
    skip_certified: Annotated[
        str | None,
        typer.Option(
            "--skip-certified",
            help="Folder of certificates: images with a proof at that radius are not attacked.",
            rich_help_panel="Run",
        ),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            help="float32, or bfloat16 or float16 to search in; verdicts stay in float32.",
            rich_help_panel="Run",
        ),
    ] = "float32",
    no_diagnose: Annotated[
        bool,
        typer.Option(
            "--no-diagnose",
            help="Leave out the quick diagnosis of model and attacks; every table then says so.",
            rich_help_panel="Run",
        ),
    ] = False,
    channels_last: Annotated[
        bool,
        typer.Option("--channels-last", help="Keep weights in channels-last layout.", rich_help_panel="Run"),
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the model with torch.compile.", rich_help_panel="Run")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would run and what it may cost, and stop.", rich_help_panel="Run"),
    ] = False,
    shard: Annotated[
        str,
        typer.Option("--shard", help="i/n: the i-th of n parts; all parts share one folder.", rich_help_panel="Run"),
    ] = "",
    device: Device = "cpu",
    out: Runs = "runs",
    fail_under: Annotated[
        float | None,
        typer.Option(
            "--fail-under",
            help="Exit 7 when the interval of robust accuracy reaches below this.",
            rich_help_panel="Output",
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Attack a classifier image by image and record what was found.

    The same command resumes: images that are decided are not attacked again.
    """
    set_quiet(quiet or json)
    if transfer_from:
        attacks = transferable(attacks, suite=suite, shard=shard, skip_certified=skip_certified, dry_run=dry_run)
    settings = settings_of(
        suite or ("autoattack-rand" if randomised and not attacks else None), attacks, norm, eps,
        each=each, seed=seed, batch_size=batch_size, shard=shard, precision=precision, randomised=randomised,
    )  # fmt: skip
    classifier, chosen = load_both(
        model, data, split, images, arch=arch, arch_arg=arch_arg, normalise=normalise, device=device,
        randomised=randomised,
    )  # fmt: skip
    settings = prepared(settings, classifier, chosen, skip_certified, channels_last, compiled)
    if dry_run:
        tell_plan(settings, classifier, chosen, out, json)
        return
    if not (quiet or json or transfer_from):
        announce(settings, classifier, chosen)
    from robeval.cli.diagnosing import after_attack, insist_on_contract
    from robeval.evaluate.attacking import attack_run
    from robeval.evaluate.transferring import transfer_runs
    from robeval.evaluate.verify import verify
    from robeval.models.load import load as load_model
    from robeval.reports.diagnoses import diagnosed
    from robeval.reports.tables import attacks_table
    from robeval.reports.writers import terminal

    whole = bool(settings.radii) and not (no_diagnose or shard or transfer_from)
    if whole:
        insist_on_contract(classifier, chosen, settings)

    with progress("attack") as on_progress:
        how: dict[str, Any] = {"root": out, "argv": sys.argv[1:], "on_progress": on_progress}
        if transfer_from:
            sources = [load_model(source) for source in transfer_from]
            store = transfer_runs([classifier], sources, chosen, settings, **how)[0]
        else:
            store = attack_run(classifier, chosen, settings, **how)
    with progress("verify") as on_progress:
        checked = verify(store, classifier, chosen, on_progress)
    checked.insist()
    for warning in store.warnings:
        note(warning)
    beside = after_attack(store, classifier, chosen, settings, out) if whole else []
    (run,) = (d for d in diagnosed([store, *beside]) if d.facts.store is store)
    facts = run.facts
    if json:
        print_json(
            summary(facts, beside)
            | {
                "verified": checked.confirmed,
                "folder": str(store.folder),
                "headlines": [run.headline(eps) for eps in facts.radii],
                "diagnostics": getattr(run.verdict(), "text", "not run"),
            }
        )
    else:
        sys.stdout.write(terminal(attacks_table(store, beside)))
        note(str(checked))
        note(f"{store.folder}   next: robeval certify {model} --data {data}")
    if fail_under is not None:
        low = min((facts.worst_case(e).interval[0] for e in facts.radii), default=1.0)
        if low < fail_under:
            raise GateFailed(f"robust accuracy may be as low as {low:.4f}, the limit is {fail_under:g}", code="G01")


def summary(facts: Any, beside: Sequence[Any] = ()) -> dict[str, Any]:
    """The result for machines: the table of the run, and the empirical distance."""
    from robeval.reports.tables import attacks_table

    mean, found = facts.mean_distance()
    return {
        "model": facts.manifest["model"]["name"],
        "norm": facts.norm,
        "clean_accuracy": facts.clean_accuracy.value,
        "worst_case": {f"{eps:g}": facts.worst_case(eps).value for eps in facts.radii},
        "mean_distance": mean if found else None,
        "distances_found": found,
        "table": attacks_table(facts.store, beside).to_json()["rows"],
        **facts.cost(),
    }
