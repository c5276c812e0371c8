"""How steep and how curved the losses of models are at their images, and whether training paid for itself."""

from __future__ import annotations

import math

import pandas as pd

from robeval.core.errors import FileRefused
from robeval.reports.tables import Cell, Table, one_name_one_model
from robeval.store.runstore import RunStore

QUANTITIES = {"gradient_norm": "gradient norm", "curvature": "curvature"}


def regularity_table(stores: list[RunStore]) -> Table:
    """Mean and largest gradient norm and curvature over the images, one row per model, bound and norm.

    The table 3 of Finlay and Oberman 2019. A bound with one margin per rival has the values of the rival that decides;
    the paper's are those of ``l-bound-paper`` and ``c-bound-paper``.

    Args:
        stores: Runs of bounds; others are left aside.

    Raises:
        FileRefused: no run of bounds, or none with a gradient.
        UsageError: two models of one name.
    """
    mine = [store for store in stores if store.manifest()["kind"] == "certify"]
    one_name_one_model(mine)
    rows: list[dict[str, Cell]] = []
    notes: list[str] = []
    for store in mine:
        m = store.manifest()
        for (bound, norm), frame in store.frame().groupby(["bound", "norm"], sort=False):
            if not frame["gradient_norm"].notna().any():
                continue
            row: dict[str, Cell] = {"model": m["model"]["name"], "bound": str(bound), "norm": str(norm)}
            row |= {"loss": str(frame["loss"].iloc[0]), "images": len(frame)}
            for column, heading in QUANTITIES.items():
                row |= _mean_and_largest(frame[column], heading)
            rows.append(row)
        notes.append(
            f"{m['model']['name']}: sha256 {m['model']['fingerprint'][:12]}, {m['data']['name']}, {store.folder}"
        )
    if not rows:
        raise FileRefused(
            "no gradient norm or curvature in these runs",
            code="R05",
            do="robeval certify MODEL --bound l-bound-paper --bound c-bound-paper --norm l2",
        )
    notes.append(
        "the gradient norm is the dual one of the row's norm; curvature is the largest eigenvalue of the Hessian"
    )
    columns = list(dict.fromkeys(c for row in rows for c in row))
    return Table("Regularity at the images: values at points, no bounds over regions", columns, rows, notes)


def _mean_and_largest(values: pd.Series, heading: str) -> dict[str, Cell]:
    """Two cells, none where nothing was computed."""
    known = values[values.notna()]
    if known.empty:
        return {}
    return {f"mean {heading}": float(known.mean()), f"largest {heading}": float(known.max())}


def improvement_ratio(distance: float, distance0: float, error: float, error0: float) -> float:
    """Adversarial improvement ratio of Finlay and Oberman 2019: relative gain in distance over relative loss in error.

    ((distance - distance0) / distance0) / ((error - error0) / error0). A ratio above 1 says that distance grew by a
    larger factor than clean error; one network against another only if both errors grew.

    Args:
        distance: Mean adversarial distance of the defended network, misclassified images counting 0.
        distance0: That of the undefended one.
        error: Clean error of the defended network.
        error0: That of the undefended one.

    Returns:
        nan where nothing stands in the denominator: an undefended distance or error of 0, or the same error.
    """
    if distance0 <= 0 or error0 <= 0 or error == error0:
        return math.nan
    return (distance / distance0 - 1) / (error / error0 - 1)
