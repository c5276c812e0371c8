"""``robeval diagnose``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from robeval.cli.common import Device, Json, Quiet, note, print_json, set_quiet
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
from robeval.core.errors import GateFailed, UsageError, unknown

THREAT = "Threat model"
TESTS = "Tests"


def _tests_help() -> str:
    """One line per test of the folder."""
    order = lambda m: (m.facts["group"], m.facts["id"][0], int(m.facts["id"][1:]))
    found = sorted(catalogue.methods("diagnostics").values(), key=order)
    return "\n".join(f"- {m.facts['id']} `{m.name}` [{m.facts['level']}] {m.summary}" for m in found)


EXAMPLES = (
    "**Examples**\n\n"
    "    robeval diagnose model.pt --eps 8/255\n\n"
    "    robeval diagnose model.pt --eps 8/255 --level standard --source undefended.pt --runs runs\n\n"
    "**Tests** (in brackets the lowest level that runs them)\n\n" + _tests_help()
)


def diagnose(
    model: ModelFile,
    eps: Annotated[str, typer.Option("--eps", help="Radius in pixel units, such as 8/255.", rich_help_panel=THREAT)],
    norm: Annotated[str, typer.Option("--norm", help="linf, l2 or l1.", rich_help_panel=THREAT)] = "linf",
    level: Annotated[
        str,
        typer.Option(
            "--level",
            help="quick (256 images), standard (1000), or full (also the unit test of the attack).",
            rich_help_panel=TESTS,
        ),
    ] = "quick",
    source: Annotated[
        list[str] | None,
        typer.Option(
            "--source",
            help="A model to craft transferred images on, repeatable; best an undefended twin.",
            rich_help_panel=TESTS,
        ),
    ] = None,
    runs: Annotated[
        str | None,
        typer.Option(
            "--runs", help="Folder of attack runs and certificates to judge; --out by default.", rich_help_panel=TESTS
        ),
    ] = None,
    remedy: Annotated[
        bool,
        typer.Option(
            "--remedy", help="Where an attack cannot work, attack again with what mends it.", rich_help_panel=TESTS
        ),
    ] = False,
    randomised: Annotated[
        bool, typer.Option("--randomised", help="The model answers at random.", rich_help_panel=THREAT)
    ] = False,
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
    fail_on: Annotated[
        str | None,
        typer.Option("--fail-on", help="Exit 7 on failed or on warning.", rich_help_panel="Output"),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Look for signs that a robustness evaluation is weak: in the model, its gradients, each attack, and all together.

    Adversarial images that the tests find count in the robust accuracy. The same command resumes. No result says that
    a model withstands an attack that nobody has tried.
    """
    set_quiet(quiet or json)
    from robeval.core.ball import NORMS
    from robeval.core.numbers import radii

    if norm not in NORMS:
        raise unknown("norm", norm, NORMS)
    if fail_on not in (None, "failed", "warning"):
        raise unknown("result", str(fail_on), ("failed", "warning"))
    values = radii(eps, norm)
    if len(values) != 1:
        raise UsageError("a diagnosis takes one radius", code="A04", do="such as --eps 8/255")
    from robeval.cli.diagnosing import beside, headlines_of, run_diagnosis, runs_about, say_remedies, tell, warn
    from robeval.data.repeats import trained_on
    from robeval.diagnose.run import Settings
    from robeval.models.load import load as load_model
    from robeval.reports.diagnoses import diagnosed

    classifier, chosen = load_both(
        model, data, split, images, arch=arch, arch_arg=arch_arg, normalise=normalise, device=device,
        randomised=randomised, form_only=True,
    )  # fmt: skip
    if split == "test" and level != "quick":
        for remark in trained_on(chosen, data):
            note(remark)
    settings = Settings(norm, values[0], level, seed=seed, batch_size=batch_size, randomised=randomised, remedy=remedy)
    stores = runs_about(runs or out, classifier, chosen, norm, "attack")
    store = run_diagnosis(
        classifier, chosen, settings, out=out, runs=runs or out, stores=stores,
        surrogates=[load_model(file) for file in source or []],
    )  # fmt: skip
    warn([store])
    found = diagnosed([*stores, *beside(out, store)])
    told = tell(store, found, headlines_of(found))
    if json:
        told.pop("lines")
        print_json(told)
    else:
        sys.stdout.write("\n".join([*told["lines"], *say_remedies(store)]) + "\n")
        note(f"{store.folder}   next: robeval table {out}")
    signs = {"failed": ("FAILED",), "warning": ("FAILED", "warning")}.get(str(fail_on), ())
    bad = [t["id"] for t in told["tests"] if t["result"] in signs]
    if bad:
        raise GateFailed(f"the diagnosis has signs of a weak evaluation: {', '.join(bad)}", code="G02")
