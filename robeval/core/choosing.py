"""Methods as the user named them, checked against the norm before anything is loaded."""

from __future__ import annotations

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


def facts(spec: Spec) -> dict[str, Any]:
    """What every manifest says of a method."""
    return {
        "label": spec.label,
        "name": spec.method.name,
        "settings": spec.settings,
        "hash": spec.config_hash,
        "source": spec.method.facts["source"],
    }
