"""Robust accuracy against every radius, from the smallest verified distance of each image."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robeval.core.errors import FileRefused
from robeval.core.numbers import pretty
from robeval.reports.frames import ABS, REL, AttackFacts
from robeval.reports.picture import label as label_of
from robeval.reports.stats import Rate
from robeval.reports.tables import Cell, Table, one_name_one_model, one_norm, provenance
from robeval.store.runstore import RunStore

#: Colours that people with any colour vision tell apart (Okabe and Ito 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
AXIS = {"linf": r"$\ell_\infty$", "l2": r"$\ell_2$", "l1": r"$\ell_1$"}
STEPS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Curve:
    """One model on one set of images in one norm.

    Args:
        name: How legends and columns call it.
        norm: Norm of the distances.
        distances: (n,) smallest verified adversarial distance per image, ascending; 0 where misclassified, inf where
            none was found.
        radii: Where attacks of a fixed eps ran.
        searched: Correctly classified images that a search of the nearest adversarial image saw.
        correct: Correctly classified images.
        notes: Where the numbers come from.
    """

    name: str
    norm: str
    distances: NDArray[np.float64]
    radii: list[float]
    searched: int
    correct: int
    notes: list[str] = field(default_factory=list)

    def robust(self, eps: float) -> Rate:
        """Images whose distance exceeds eps, with the verdict's tolerance: an upper bound on robust accuracy."""
        n = len(self.distances)
        return Rate(n - int(np.searchsorted(self.distances, eps * (1 + REL) + ABS, side="right")), n)

    @property
    def everywhere(self) -> bool:
        """A nearest-point search saw every correct image, so that the curve means something between the radii too."""
        return self.searched == self.correct

    @property
    def end(self) -> float:
        """The largest radius that anything is known of; 0 when nothing was found or attacked."""
        finite = self.distances[np.isfinite(self.distances)]
        return float(max([*self.radii, *finite[-1:]], default=0.0))

    def steps(self) -> list[tuple[float, Rate]]:
        """Where the curve falls, and the radii attacked, ascending from 0; each value holds until the next."""
        finite = self.distances[np.isfinite(self.distances)]
        found: list[tuple[float, Rate]] = []
        for eps in sorted({0.0, *self.radii, *finite.tolist()}):
            rate = self.robust(eps)
            if not found or rate.k != found[-1][1].k or eps in self.radii:
                found.append((eps, rate))
        return found

    def mean(self) -> tuple[float, int]:
        """Mean of the finite distances, and how many images have one."""
        finite = self.distances[np.isfinite(self.distances)]
        return (float(finite.mean()) if len(finite) else math.nan), len(finite)

    def median(self) -> float:
        """Median over all images; inf where half of them or more have no distance."""
        return float(np.median(self.distances)) if len(self.distances) else math.nan


def curves(stores: list[RunStore], norm: str | None = None) -> list[Curve]:
    """One curve per model and set of images, merged over the attack runs that share both.

    Args:
        stores: Attack runs; other runs are left out.
        norm: Norm of the curves, needed when the runs have several.

    Raises:
        UsageError: several norms (T01), or two models of one name (T02).
        FileRefused: no attack run in that norm (R05).
    """
    facts = [AttackFacts(s) for s in stores if s.manifest()["kind"] == "attack"]
    facts = [f for f in facts if norm in (None, f.norm)]
    if not facts:
        raise FileRefused("no attack run among these" + (f" in {norm}" if norm else ""), code="R05")
    one_norm({f.norm for f in facts})
    one_name_one_model([f.store for f in facts])
    groups: dict[tuple[str, str], list[AttackFacts]] = {}
    for f in facts:
        model, data = f.manifest["model"], f.manifest["data"]
        groups.setdefault((model["name"], data["fingerprint"]), []).append(f)
    names = [name for name, _ in groups]
    merged = []
    for (name, images), group in groups.items():
        data = group[0].manifest["data"]
        which = f" on {data['name']} {images[:6]}, n={data['images']}" if names.count(name) > 1 else ""
        merged.append(merge(name + which, group))
    return merged


def merge(name: str, group: list[AttackFacts]) -> Curve:
    """The smallest distance of each image over some runs on the same model, images and norm."""
    nearest = pd.concat([f.distances() for f in group], axis=1).min(axis=1)
    clean = pd.concat([f.clean["clean_correct"] for f in group])
    correct = set(clean.index[clean.to_numpy(bool)])
    searched: set[int] = set()
    radii: set[float] = set()
    for f in group:
        searched |= set(f.attacks.loc[np.isinf(f.attacks["eps"]), "index"])
        if any(m["search"] == "fixed" for m in f.manifest["methods"]):
            radii |= set(f.radii)
    curve = Curve(
        name, group[0].norm, np.sort(nearest.to_numpy(float)), sorted(radii), len(searched & correct), len(correct)
    )
    curve.notes.extend([_distance_note(curve), *_reading(curve), *(provenance(f) for f in group)])
    return curve


def _distance_note(curve: Curve) -> str:
    (mean, found), n = curve.mean(), len(curve.distances)
    median = curve.median()
    middle = f"{median:.4g}" if math.isfinite(median) else "not reached"
    return (
        f"{curve.name}: distance, misclassified images 0: mean {mean:.4g} over the {found} of {n} images where one was "
        f"found, median {middle} over all"
    )


def _reading(curve: Curve) -> list[str]:
    """How far the curve may be trusted between the radii attacked."""
    if curve.everywhere:
        return []
    marked = ", ".join(pretty(r) for r in curve.radii)
    why = f"a search of the nearest image saw {curve.searched} of {curve.correct} correct images"
    if not curve.searched:
        why = "only attacks of a fixed eps ran"
    where = f"informative only at the radii attacked ({marked}, marked)" if marked else "loose for the others"
    return [f"{curve.name}: {why}; an upper bound everywhere, {where}"]


def ticks(norm: str, end: float, radii: Sequence[float] = ()) -> list[float]:
    """At most nine radii from 0 to about ``end``, in 16ths or 255ths where people think in them."""
    if end <= 0:
        return [0.0]
    sixteenths = bool(radii) and all(pretty(r).endswith("/16") for r in radii)
    if sixteenths or norm == "linf":
        bottom = 16 if sixteenths else 255
        step = next((s for s in STEPS if end * bottom / s <= 8), 0) / bottom
    else:
        step = 0.0
    if not step or step > end:
        power = 10.0 ** math.floor(math.log10(end))
        step = next(s for s in (power / 10, power / 5, power / 4, power / 2, power, 2 * power) if end / s <= 8)
    return [k * step for k in range(int(end / step * (1 + 1e-9)) + 1)]


def label(eps: float, norm: str, radii: Sequence[float]) -> str:
    """An eps as people write it: fractions in linf and where somebody attacked, decimals elsewhere."""
    return pretty(eps) if norm == "linf" or near(eps, radii) else f"{eps:.4g}"


def near(eps: float, radii: Sequence[float]) -> bool:
    """One of the radii, up to rounding."""
    return any(math.isclose(eps, r, rel_tol=1e-6) for r in radii)


def curve_table(found: list[Curve]) -> Table:
    """Robust accuracy at about ten radii: those attacked, and others only where they say something."""
    radii = sorted({r for c in found for r in c.radii})
    smooth = [c for c in found if c.everywhere or not c.radii]
    end = max(c.end for c in found)
    grid = ticks(found[0].norm, end, radii) if smooth else [0.0]
    if smooth and grid[-1] < end:
        grid.append(len(grid) * grid[1])  # one row beyond the farthest image found
    rows: list[dict[str, Cell]] = []
    for eps in sorted([*radii, *(g for g in grid if not near(g, radii))]):
        told = {f"{c.name} <=": c.robust(eps) for c in found if c in smooth or near(eps, [0.0, *c.radii])}
        rows.append({"eps": label(eps, found[0].norm, radii), **told})
    title = f"Robust accuracy against eps in {found[0].norm}: images that no attack broke, an upper bound"
    return Table(title, ["eps", *(f"{c.name} <=" for c in found)], rows, [note for c in found for note in c.notes])


def curve_csv(found: list[Curve]) -> str:
    """``model, eps, robust, n, low, high``: one row where a curve falls or was attacked; shares, 95 % Wilson."""
    from robeval.reports.writers import csv

    rows: list[dict[str, Cell]] = []
    for c in found:
        for eps, rate in c.steps():
            low, high = rate.interval
            rows.append({"model": c.name, "eps": eps, "robust": rate.value, "n": rate.n, "low": low, "high": high})
    return csv(Table("", ["model", "eps", "robust", "n", "low", "high"], rows))


def curve_json(found: list[Curve]) -> dict[str, Any]:
    """Plain data: every step of every curve; no number where nothing was found."""
    plain = lambda value: value if math.isfinite(value) else None
    said = []
    for c in found:
        eps, rates = zip(*c.steps(), strict=True)
        said.append(
            {
                "model": c.name,
                "n": len(c.distances),
                "eps": list(eps),
                "robust": [plain(r.value) for r in rates],
                "low": [r.interval[0] for r in rates],
                "high": [r.interval[1] for r in rates],
                "mean_distance": plain(c.mean()[0]),
                "distances_found": c.mean()[1],
                "median_distance": plain(c.median()),
                "attacked_radii": c.radii,
                "informative_everywhere": c.everywhere,
                "notes": c.notes,
            }
        )
    return {"norm": found[0].norm, "curves": said}


def draw(found: list[Curve], form: str) -> bytes:
    """The plot: steps with their Wilson bands, and a dot at each radius that was attacked.

    Args:
        found: At least one curve.
        form: ``png`` or ``pdf``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), dpi=160, layout="constrained")
    paint(figure.add_subplot(), found, AXIS[found[0].norm])
    buffer = io.BytesIO()
    # No date, so that the same records give the same bytes.
    figure.savefig(buffer, format=form, metadata={"CreationDate": None} if form == "pdf" else {"Software": None})
    return buffer.getvalue()


def paint(axes: Any, found: list[Curve], norm: str) -> None:
    """The curves on axes; ``norm`` is its name on the axis."""
    end = max(c.end for c in found) * 1.04 or 1.0
    for k, c in enumerate(found):
        colour, steps = COLOURS[k % len(COLOURS)], c.steps()
        x = [eps for eps, _ in steps] + [end]
        rates = [rate for _, rate in steps] + [steps[-1][1]]
        y = [100 * r.value for r in rates]
        low, high = ([100 * r.interval[i] for r in rates] for i in (0, 1))
        name = label_of(c.name)
        style = "-" if c.everywhere else ":"
        axes.step(x, y, where="post", color=colour, linestyle=style, linewidth=1.8, label=f" {name}")
        axes.fill_between(x, low, high, step="post", color=colour, alpha=0.15, linewidth=0)
        marked = [100 * c.robust(r).value for r in c.radii]
        axes.plot(c.radii, marked, "o", color=colour, markersize=5, markeredgecolor="white", zorder=3)
    radii = sorted({r for c in found for r in c.radii})
    places = ticks(found[0].norm, end, radii)
    fractions = [label(v, found[0].norm, radii) for v in places]
    axes.set_xticks(
        places, [f"{v:.4g}" + (f"\n{f}" if "/" in f else "") for v, f in zip(places, fractions, strict=True)]
    )
    axes.set_xlim(0, end)
    axes.set_ylim(0, 102)
    axes.set_xlabel(f"radius eps in {norm}, pixels in [0, 1]")
    axes.set_ylabel("robust accuracy (upper bound), %")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    key = "band: 95 % Wilson" + ("; dots: radii attacked" if radii else "")
    axes.legend(frameon=False, loc="best", title=key, alignment="left")
