"""A picture with the numbers behind it, as PNG, PDF, CSV, or SVG that takes the page's colours."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

from robeval.reports.tables import Table
from robeval.reports.writers import csv, one_line

#: What stands for the page's own ink; a page in SVG replaces it, so that dark and light pages read alike.
INK = "#010203"
BAND = 0.18
#: Properties that SVG takes as plain attributes; as such they need no leave to style.
_STYLE = re.compile(r' style="([^"]*)"')
_FONT = re.compile(r"(?:(?P<weight>bold|\d{3}) )?(?P<size>[\d.]+px) (?P<family>.+)")


def label(text: str, most: int = 40) -> str:
    """A name as a picture writes it: one line, shortened, its dollars no mathematics."""
    text = one_line(text)
    return (text if len(text) <= most else text[: most - 3] + "...").replace("$", r"\$")


@dataclass(frozen=True)
class Picture:
    """What to paint, and from which numbers.

    Args:
        name: Stem of its files: letters, digits and hyphens.
        title: What it shows.
        caption: How to read it.
        numbers: The rows behind it.
        paint: Draws on an empty figure, in :data:`INK` and colours.
        size: Width and height in inches.
    """

    name: str
    title: str
    caption: str
    numbers: Table
    paint: Callable[[Any], None]
    size: tuple[float, float] = (4.6, 3.1)

    def csv(self) -> str:
        """The numbers, one row each."""
        return csv(self.numbers)

    def draw(self, form: str) -> bytes:
        """The picture as ``png`` or ``pdf``, black on white; the same numbers give the same bytes."""
        return self._render(form, "black", transparent=False)

    def svg(self) -> str:
        """Inline SVG without styles, ids that no other picture has, and ink in the colour of the text around it."""
        raw = self._render("svg", INK, transparent=True).decode()
        raw = raw[raw.index("<svg") :]
        raw = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", raw, flags=re.S)
        raw = _STYLE.sub(lambda m: _attributes(m[1]), raw).replace(INK, "currentColor")
        name = re.sub(r"[^a-z0-9-]", "-", self.name.lower())
        raw = re.sub(r'(\bid=")', rf"\g<1>{name}-", raw)
        raw = re.sub(r'(url\(#|xlink:href="#)', rf"\g<1>{name}-", raw)
        raw = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", raw))
        told = escape(one_line(self.title), quote=True)
        return raw.replace("<svg", f'<svg role="img" aria-label="{told}" stroke-linejoin="round"', 1)

    def _render(self, form: str, ink: str, *, transparent: bool) -> bytes:
        import matplotlib as mpl
        from matplotlib.figure import Figure

        axes = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor")
        look: dict[Any, Any] = dict.fromkeys(axes, ink) | {
            "font.size": 9,
            "axes.titlesize": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "svg.fonttype": "none",
            "svg.hashsalt": self.name,
            "font.family": "sans-serif",
        }
        with mpl.rc_context(look):
            figure = Figure(figsize=self.size, dpi=160, layout="constrained")
            self.paint(figure)
            buffer = io.BytesIO()
            dates: dict[str, dict[str, Any]] = {
                "pdf": {"CreationDate": None},
                "png": {"Software": None},
                "svg": {"Date": None},
            }
            figure.savefig(buffer, format=form, metadata=dates[form], transparent=transparent)
        return buffer.getvalue()


def _attributes(style: str) -> str:
    """``fill: none; stroke: #000`` as attributes; a font becomes its size, weight and family."""
    found = []
    for part in style.split(";"):
        name, colon, value = (piece.strip() for piece in part.partition(":"))
        font = _FONT.fullmatch(value) if name == "font" else None
        if font:
            found += [("font-size", font["size"]), ("font-family", "sans-serif")]
            found += [("font-weight", font["weight"])] if font["weight"] else []
        elif colon:
            found.append((name, value))
    return "".join(f' {name}="{escape(value, quote=True)}"' for name, value in found)
