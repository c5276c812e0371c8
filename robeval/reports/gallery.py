"""P6: adversarial images as they were stored, beside the clean image and the difference, magnified."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robeval.core.numbers import pretty
from robeval.reports.frames import AttackFacts
from robeval.reports.groups import NORM, Group
from robeval.reports.picture import Picture
from robeval.reports.tables import Cell, Table

Pixels = NDArray[np.float32]
#: Clean images by id; empty where the data set is not at hand.
Originals = Mapping[int, Pixels]
#: Largest side of a picture on a page; larger images are thinned out.
SIDE = 128


@dataclass(frozen=True)
class Triple:
    """One adversarial image.

    Args:
        row: Its record.
        adversarial: (C, H, W) in [0, 1].
        clean: The same before the attack, if at hand.
        black_box_only: No gradient attack of these runs broke the image.
    """

    row: Mapping[str, Any]
    adversarial: Pixels
    clean: Pixels | None
    black_box_only: bool

    @property
    def magnified(self) -> float:
        """Factor of the difference, so that the largest change becomes full black or white; whole where it can be."""
        assert self.clean is not None
        largest = float(np.abs(self.adversarial - self.clean).max())
        factor = 0.5 / largest if largest else 1.0
        return float(math.floor(factor)) if factor >= 1 else factor

    @property
    def difference(self) -> Pixels:
        """Grey where nothing changed."""
        assert self.clean is not None
        change: Pixels = 0.5 + np.float32(self.magnified) * (self.adversarial - self.clean)
        return change.clip(0, 1)


def triples(g: Group, originals: Originals, most: int = 12) -> list[Triple]:
    """Nearest stored adversarial images: first those that only black boxes broke, then over all classes."""
    kept: list[tuple[pd.Series, Pixels]] = []
    frames = [(f, _stored(f)) for f in g.attacks]
    rows = pd.concat([r.assign(run=k) for k, (_, r) in enumerate(frames)]) if frames else pd.DataFrame()
    if not len(rows):
        return []
    blind = _black_box(g)
    seeing = set(rows.loc[~rows["attack"].isin(blind), "index"])
    rows = rows.sort_values([f"distance_{g.norm}", "index"], kind="stable").drop_duplicates("index")
    rows = rows.assign(only=~rows["index"].isin(seeing) & bool(blind))
    rows = rows.assign(turn=rows.groupby(["only", "label"]).cumcount())
    chosen = rows.sort_values(["only", "turn", "label"], ascending=[False, True, True], kind="stable").head(most)
    for run, mine in chosen.groupby("run"):
        x = frames[int(run)][0].store.examples(mine)
        kept += [(row, pixels) for (_, row), pixels in zip(mine.iterrows(), x, strict=True)]
    kept.sort(key=lambda pair: (not pair[0]["only"], int(pair[0]["label"]), int(pair[0]["index"])))
    return [Triple(row.to_dict(), x, originals.get(int(row["index"])), bool(row["only"])) for row, x in kept]


def _stored(f: AttackFacts) -> pd.DataFrame:
    """Rows with an image in the run's own folder."""
    own = f.attacks["attack"].isin(f.labels)
    return f.attacks[own & f.attacks["success"] & (f.attacks["example"] >= 0)]


def _black_box(g: Group) -> set[str]:
    """Labels of the attacks that saw no gradient of the model, by their passes."""
    both = pd.concat([f.attacks[["attack", "backwards"]] for f in g.attacks])
    taken = both.groupby("attack")["backwards"].sum()
    return set(taken.index[taken == 0])


def class_names(g: Group) -> list[str]:
    """Names of the classes where the run knows them; numbers are used elsewhere."""
    said = g.manifest["model"].get("classes")
    return [str(name) for name in said] if isinstance(said, list) else []


def caption(t: Triple, classes: Sequence[str], norm: str) -> str:
    """Such as ``image 17: 8 read as 3, Linf 0.061, pgd``."""
    name = lambda k: classes[k] if 0 <= k < len(classes) else str(k)
    true, said = name(int(t.row["label"])), name(int(t.row["prediction"]))
    distance = float(t.row[f"distance_{norm}"])
    return f"image {t.row['index']}: {true} read as {said}, {NORM[norm]} {distance:.3g}, {t.row['attack']}"


def as_image(x: Pixels) -> Any:
    """(C, H, W) in [0, 1] as a Pillow image with at most :data:`SIDE` pixels a side."""
    from PIL import Image

    step = max(1, math.ceil(max(x.shape[1:]) / SIDE))
    pixels = (255 * np.clip(x[:, ::step, ::step], 0, 1) + 0.5).astype(np.uint8)
    return Image.fromarray(pixels[0]) if len(pixels) != 3 else Image.fromarray(pixels.transpose(1, 2, 0))


def data_uri(x: Pixels) -> str:
    """A PNG that a page holds itself."""
    buffer = io.BytesIO()
    as_image(x).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def gallery(groups: Sequence[Group], originals: Mapping[str, Originals]) -> list[Picture]:
    """One sheet per group with stored adversarial images; ``originals`` by fingerprint of the images."""
    sheets = []
    for g in groups:
        found = triples(g, originals.get(g.fingerprint, {}))
        if found:
            sheets.append(_sheet(g, found))
    return sheets


def _sheet(g: Group, found: list[Triple]) -> Picture:
    classes = class_names(g)
    rows: list[dict[str, Cell]] = [
        {
            "image": int(t.row["index"]),
            "label": int(t.row["label"]),
            "prediction": int(t.row["prediction"]),
            "attack": str(t.row["attack"]),
            "eps": pretty(float(t.row["eps"])),
            "distance": float(t.row[f"distance_{g.norm}"]),
            "black box only": "yes" if t.black_box_only else "no",
        }
        for t in found
    ]

    def paint(figure: Any) -> None:
        grid = figure.subplots(len(found), 3, squeeze=False)
        for t, axes in zip(found, grid, strict=True):
            shown = [("clean", t.clean), ("adversarial", t.adversarial)]
            shown.append((f"difference x {t.magnified:g}", t.difference) if t.clean is not None else ("", None))
            for place, (name, x) in zip(axes, shown, strict=True):
                place.axis("off")
                if x is not None:
                    place.imshow(np.asarray(as_image(x)), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
                    place.set_title(name, fontsize=7)

    return Picture(
        f"gallery-{g.key}",
        f"{g.name}: stored adversarial images in {NORM[g.norm]}",
        "; ".join(caption(t, classes, g.norm) for t in found),
        Table("", list(rows[0]), rows),
        paint,
        (4.2, 1.5 * len(found)),
    )
