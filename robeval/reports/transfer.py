"""The transfer matrix: sources against targets, from the runs of the targets."""

from __future__ import annotations

from robeval.core.errors import FileRefused
from robeval.core.numbers import pretty
from robeval.reports.frames import AttackFacts
from robeval.reports.stats import Rate
from robeval.reports.tables import Cell, Table, one_name_one_model, one_norm, provenance
from robeval.store.runstore import RunStore

#: (source, attack, eps) of one row.
Row = tuple[str, str, float]


def crafted(facts: AttackFacts) -> dict[tuple[str, str], str]:
    """Label in the records by (source, attack), for the methods of a run that were crafted on another model."""
    found = {}
    for method in facts.manifest["methods"]:
        if "crafted_on" in method:
            source = method["crafted_on"]["name"]
            found[source, method["label"].removeprefix(f"transfer:{source}/")] = method["label"]
    return found


def crafting(facts: AttackFacts) -> str:
    """What the images of a run cost on their sources; targets of one command share them."""
    spent = [sum(s.get(f"source_{way}", 0) for s in facts.store.sessions()) for way in ("forwards", "backwards")]
    return f"to craft its images took {spent[0]:,} forward and {spent[1]:,} backward passes on the sources"


def cells(facts: AttackFacts) -> dict[Row, Rate | None]:
    """Robust accuracy of one target per source, attack and radius; None while images are left to judge."""
    found: dict[Row, Rate | None] = {}
    labels = crafted(facts)
    for eps in facts.radii:
        reached = {a.label: a for a in facts.per_attack(eps)}
        for (source, attack), label in labels.items():
            found[source, attack, eps] = reached[label].robust if reached[label].alone else None
    return found


def transfer_table(stores: list[RunStore], norm: str | None = None) -> Table:
    """Rows are sources (and attacks and radii where there are several), columns are targets.

    Args:
        stores: Attack runs; those without transferred images are left out.
        norm: Norm of the rows, needed when the runs have several.

    Raises:
        UsageError: several norms (T01), or two models of one name (T02).
        FileRefused: no transfer run in that norm (R05).
    """
    facts = [AttackFacts(s) for s in stores if s.manifest()["kind"] == "attack"]
    facts = [f for f in facts if crafted(f) and norm in (None, f.norm)]
    if not facts:
        raise FileRefused("no transfer run among these" + (f" in {norm}" if norm else ""), code="R05")
    one_norm({f.norm for f in facts})
    one_name_one_model([f.store for f in facts])
    found: dict[Row, dict[str, Cell]] = {}
    clean: dict[str, Cell] = {}
    for f in facts:
        column = f"on {f.manifest['model']['name']} <="
        clean[column] = f.clean_accuracy
        for row, rate in cells(f).items():
            found.setdefault(row, {})[column] = rate
    attacks, radii = (list(dict.fromkeys(row[k] for row in found)) for k in (1, 2))
    rows: list[dict[str, Cell]] = [{"crafted on": "(clean images)", **clean}]
    for (source, attack, eps), rates in found.items():
        rows.append({"crafted on": source, "attack": attack, "eps": pretty(eps), **rates})
    shown = ["crafted on"] + ["attack"] * (len(attacks) > 1) + ["eps"] * (len(radii) > 1)
    what = (
        ", ".join(str(a) for a in attacks) + f" in {facts[0].norm} at eps " + ", ".join(pretty(float(e)) for e in radii)
    )
    notes = [
        "rows: the model whose gradients made the images, at full length; columns: the model that judges the last image"
        " of each attempt; misclassified images count as broken; on the diagonal source and target are the same",
        *(f"{provenance(f)}; {crafting(f)}" for f in facts),
    ]
    return Table(f"Transfer of {what}: robust accuracy, an upper bound", [*shown, *clean], rows, notes)
