"""One self-contained HTML page about some runs: nothing is fetched, nothing runs, everything foreign is escaped."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import robeval
from robeval.core.errors import FileRefused
from robeval.core.numbers import pretty
from robeval.core.records import CLEAR, DOES_NOT_APPLY, FAILED, NOT_RUN, WARNING
from robeval.reports.gallery import Originals, caption, class_names, data_uri, triples
from robeval.reports.groups import NORM, Group, groups
from robeval.reports.picture import Picture
from robeval.reports.plots.kinds import PAGE, pictures
from robeval.reports.tables import Cell, Table, run_table
from robeval.reports.verdict import FOOT, ordered, verdict_of
from robeval.reports.writers import text
from robeval.store.runstore import RunStore

#: Result words with a sign that does not need colour.
SIGNS = {CLEAR: "○", WARNING: "△", FAILED: "✕", NOT_RUN: "–", DOES_NOT_APPLY: "–"}
#: How a verdict is dressed, by its number.
DRESS = {1: "bad", 2: "bad", 3: "warn", 4: "plain"}


@dataclass(frozen=True)
class Shown:
    """A picture on the page."""

    title: str
    caption: str
    svg: str
    csv: str


def page(stores: Sequence[RunStore], originals: Mapping[str, Originals] | None = None) -> str:
    """The page.

    Args:
        stores: Runs of attacks, bounds and diagnostics.
        originals: Clean images by id, by the fingerprint of their set; where they are missing, the gallery shows the
            adversarial images alone.

    Raises:
        FileRefused: no run that a page can show (R05).
        UsageError: two models of one name (T02).
    """
    import jinja2
    from markupsafe import Markup

    found = groups(list(stores))
    if not found:
        raise FileRefused("no run among these that a report can show", code="R05", do="robeval attack MODEL")
    home = resources.files("robeval.reports")
    css = (home / "page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((home / "page.html").read_text(encoding="utf-8"))
    shared, own = _pictures(found)
    return template.render(
        css=Markup(css),
        css_hash=digest,
        version=robeval.__version__,
        foot=FOOT,
        title=", ".join(dict.fromkeys(g.name for g in found)),
        shared=shared,
        sections=[_section(g, own[g.key], (originals or {}).get(g.fingerprint, {})) for g in found],
        runs=[_run(s) for s in stores],
        signs=SIGNS,
    )


def _pictures(found: Sequence[Group]) -> tuple[list[Shown], dict[str, list[Shown]]]:
    """Pictures that compare models, and those of each group."""
    from markupsafe import Markup

    def shown(picture: Picture) -> Shown:
        numbers = base64.b64encode(picture.csv().encode()).decode()
        return Shown(picture.title, picture.caption, Markup(picture.svg()), "data:text/csv;base64," + numbers)

    shared = [shown(p) for p in pictures("accuracy", found, {})]
    own = {g.key: [shown(p) for kind in PAGE for p in pictures(kind, [g], {})] for g in found}
    return shared, own


def _section(g: Group, shown: list[Shown], originals: Originals) -> dict[str, Any]:
    """Everything about one model, one set of images and one norm."""
    recipe = g.manifest["model"].get("recipe") or {}
    trained = recipe.get("method", "") if isinstance(recipe, dict) else ""
    return {
        "id": g.key,
        "name": g.name,
        "norm": NORM[g.norm],
        "about": g.about(),
        "trained": trained,
        "parameters": g.manifest["model"].get("parameters"),
        "verdict": _verdict(g),
        "headlines": _headlines(g),
        "tables": [_table(t) for t in _tables(g)],
        "pictures": shown,
        "gallery": _gallery(g, originals),
        "tests": _tests(g),
        "level": g.diagnosis.manifest()["settings"]["level"] if g.diagnosis else "",
    }


def _verdict(g: Group) -> dict[str, str]:
    if not g.attacks and not g.diagnosis:
        return {"dress": "none", "text": "Nothing was attacked, so there is nothing to diagnose."}
    if g.diagnosis is None:
        return {
            "dress": "none",
            "text": "diagnostics: not run. Nobody looked whether the attacks worked on this model.",
        }
    lost = max((f.not_evaluated(eps) for f in g.attacks for eps in f.radii), default=0)
    end = verdict_of(g.diagnosis, lost)
    return {"dress": DRESS[end.number], "text": end.text}


def _headlines(g: Group) -> list[dict[str, str]]:
    """The big numbers: upper bounds of attacks, lower bounds of proofs, distances of searches."""
    lines = []
    for eps in g.radii:
        told = g.headline(eps)
        number, _, rest = told.partition(" (")
        lines.append(
            {"number": number.replace("robust accuracy ", ""), "of": "robust accuracy", "rest": rest.rstrip(")")}
        )
    for f in g.attacks:
        if not f.radii and len(f.clean):
            mean, count = f.mean_distance()
            distance = f"<= {mean:.4g}" if math.isfinite(mean) and count == len(f.clean) else f"{mean:.4g}"
            rest = (
                f"mean {NORM[g.norm]} distance of the nearest adversarial image found, for {count} of {len(f.clean)} "
            )
            lines.append({"number": distance, "of": "mean distance", "rest": rest + "images (0 where misclassified)"})
    for c in g.certificates:
        for bound, kind in c.kinds.items():
            whose = "the smoothed classifier, " if kind == "probabilistic" else ""
            if kind == "estimate":
                mean = float(c.rows(bound)["radius"].mean())
                rest = f"mean radius of {bound} over {len(c.rows(bound))} images: an ESTIMATE, which proves nothing"
                lines.append({"number": f"{mean:.4g}", "of": "ESTIMATE", "rest": rest})
                continue
            for eps in c.radii:
                rate = c.certified(bound, eps)
                rest = f"{whose}{bound}, {rate.k} of {rate.n} images, {NORM[g.norm]} eps {pretty(eps)}"
                lines.append({"number": f">= {100 * rate.value:.1f} %", "of": f"certified ({kind})", "rest": rest})
    return lines


def _tables(g: Group) -> list[Table]:
    tables = [run_table(run) for run in g.runs]
    rows: list[dict[str, Cell]] = []
    for c in g.certificates:
        for bound, kind in c.kinds.items():
            mine, radius = c.rows(bound), c.reach(bound)
            row: dict[str, Cell] = {
                "bound": bound,
                "kind": kind.upper() if kind == "estimate" else kind,
                "images": len(mine),
                "mean radius": float(radius.mean()),
                "median": float(radius.median()),
                "forwards": int(mine["forwards"].sum()),
                "backwards": int(mine["backwards"].sum()),
            }
            if kind != "estimate":
                row |= {f"certified at {pretty(eps)} >=": c.certified(bound, eps) for eps in c.radii}
            rows.append(row)
    if rows:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        note = "an ESTIMATE uses a sampled constant and proves nothing; probabilistic bounds speak of a smoothed model"
        tables.append(Table(f"{g.name}, bounds in {NORM[g.norm]}", columns, rows, [note]))
    return tables


def _table(t: Table) -> dict[str, Any]:
    rows = [[text(row.get(c)) for c in t.columns] for row in t.rows]
    numbers = [not isinstance(t.rows[0].get(c), str) if t.rows else False for c in t.columns]
    return {"title": t.title, "columns": t.columns, "rows": rows, "notes": t.notes, "numbers": numbers}


def _gallery(g: Group, originals: Originals) -> list[dict[str, Any]]:
    found = []
    for t in triples(g, originals):
        images = [("adversarial", data_uri(t.adversarial))]
        if t.clean is not None:
            images = [
                ("clean", data_uri(t.clean)),
                *images,
                (f"difference x {t.magnified:.3g}", data_uri(t.difference)),
            ]
        found.append({"images": images, "caption": caption(t, class_names(g), g.norm), "blind": t.black_box_only})
    return found


def _tests(g: Group) -> list[dict[str, Any]]:
    """Rows of the diagnosis as the page shows them."""
    if g.diagnosis is None:
        return []
    rows = []
    for r in ordered(g.diagnosis).to_dict("records"):
        low, high = r["interval95_low"], r["interval95_high"]
        interval = f"{low:.4g} to {high:.4g}" if math.isfinite(low) else ""
        rows.append({str(k): v for k, v in r.items()} | {"interval": interval})
    return rows


def _run(store: RunStore) -> dict[str, Any]:
    """Where a run's numbers come from."""
    m, sessions = store.manifest(), store.sessions()
    model, data = m["model"], m["data"]
    short = {**m, "data": {k: v if k != "ids" else f"{len(v)} ids" for k, v in data.items()}}
    facts = {
        "command": "robeval " + shlex.join(m["argv"]) if m["argv"] else "from Python",
        "folder": store.folder.name,
        "run": m["run"],
        "model": f"{model['name']}, sha256 {model['fingerprint'] or 'unknown'}",
        "model file": f"sha256 {model['file_sha256']}" if model.get("file_sha256") else "",
        "data": f"{data['name']}, {data['images']} images, sha256 {data['fingerprint']}",
        "threat model": f"{NORM[m['threat']['norm']]} eps {', '.join(pretty(e) for e in m['threat']['eps']) or '-'}",
        "seed": str(m["seed"]),
        "software": ", ".join([f"robeval {m['robeval']}", f"Python {m['python']}", *_packages(m)]),
        "started": m["created"],
        "sessions": f"{len(sessions)}, {sum(s.get('seconds', 0.0) for s in sessions):.1f} s, "
        f"exit codes {', '.join(str(s.get('exit_code')) for s in sessions) or '-'}",
    }
    methods = [{"label": x["label"], "source": x.get("source", ""), "hash": x.get("hash", "")} for x in m["methods"]]
    return {
        "kind": m["kind"],
        "facts": {k: v for k, v in facts.items() if v},
        "methods": methods,
        "manifest": json.dumps(short, indent=1, default=str),
        "warnings": store.warnings,
    }


def _packages(m: Mapping[str, Any]) -> list[str]:
    return [f"{name} {version}" for name, version in m.get("packages", {}).items()]
