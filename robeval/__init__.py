"""Robustness evaluation and certification of image classifiers in PyTorch.

Importing this package loads nothing heavy: public names are resolved on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from robeval.core.classifier import Classifier
    from robeval.core.images import Images
    from robeval.interface import AttackRun, CertifyRun, attack, certify, wrap

_WHERE = {
    "AttackRun": "robeval.interface",
    "CertifyRun": "robeval.interface",
    "Classifier": "robeval.core.classifier",
    "Images": "robeval.core.images",
    "attack": "robeval.interface",
    "certify": "robeval.interface",
    "wrap": "robeval.interface",
}

__all__ = ["AttackRun", "CertifyRun", "Classifier", "Images", "__version__", "attack", "certify", "wrap"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'robeval' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
