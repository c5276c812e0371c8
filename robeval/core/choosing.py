"""Methods as the user named them, checked against the norm before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from robeval.core.catalogue import Spec, parse
from robeval.core.errors import UsageError


def choose(kind: str, names: list[str], norm: str) -> list[Spec]:
    """Read methods such as ``pgd:steps=50``, each once, in their order.

    Raises:
        UsageError: unknown method or setting, or a method that does not exist in this norm.
    """
    specs = list({s.label: s for s in (parse(kind, text) for text in names)}.values())
    insist_on_norm(specs, norm)
    return specs


def insist_on_norm(specs: list[Spec], norm: str) -> None:
    """Refuse a method that does not exist in this norm.

    Raises:
        UsageError: with the norms that it has.
    """
    for s in specs:
        norms = s.method.facts["norms"]
        if norm not in norms:
            raise UsageError(
                f"{s.method.name} has no {norm} form",
                code="A06",
                do=f"its norms: {', '.join(norms)}; choose with --norm",
            )


def for_classes(spec: Spec, classes: int) -> Spec:
    """The method as it runs on a problem with so many classes; what changes stands in its label.

    There are ``classes - 1`` rivals to aim at, and the DLR loss divides by a gap that needs three classes, or four
    towards a target: with fewer, its numerator alone is used, the margin (cw).
    """
    now = dict(spec.settings) if spec.method.kind == "attacks" else {}
    if now.get("targets"):
        now["targets"] = min(now["targets"], classes - 1)
    if now.get("loss") == "dlr" and classes < (4 if now.get("targets") else 3):
        now["loss"] = "cw"
    if not now or now == spec.settings:
        return spec
    name, _, tail = spec.label.partition(":")
    written = dict(part.split("=", 1) for part in tail.split(",") if part)
    written |= {k: str(v) for k, v in now.items() if v != spec.settings[k]}
    return replace(spec, settings=now, label=f"{name}:" + ",".join(f"{k}={v}" for k, v in sorted(written.items())))


def facts(spec: Spec) -> dict[str, Any]:
    """What every manifest says of a method."""
    return {
        "label": spec.label,
        "name": spec.method.name,
        "settings": spec.settings,
        "hash": spec.config_hash,
        "source": spec.method.facts["source"],
    }
