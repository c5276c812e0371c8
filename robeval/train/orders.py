"""What a training is asked to do, from presets, files, the environment and flags, each layer over the one before.

Every flag of ``robeval train`` is a field of :class:`Order`; in files and variables it has the same name.
"""

from __future__ import annotations

import json
import math
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from robeval.core import catalogue
from robeval.core import settings as written
from robeval.core.errors import FileRefused, UsageError, unknown
from robeval.core.numbers import number, pretty, radius
from robeval.core.settings import Setting

VARIABLE = "ROBEVAL_TRAIN_"
NORMS = ("linf", "l2", "l1")


@dataclass(frozen=True)
class Order:
    """One training: the words of ``robeval train``, read. See its help for the meaning of each."""

    method: str = ""
    preset: str = ""
    tiny: bool = False
    out: str = ""
    data: str = "digits"
    normalise: str = "data"
    hold_out: int | None = None
    augment: str = "none"
    model: str = ""
    init_from: str = ""
    surrogate: str = ""
    weights: str = "he"
    norm: str = "linf"
    eps: str = "8/255"
    epochs: int = 20
    batch_size: int = 64
    optimizer: str = "adam"
    lr: float = 0.003
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "cosine"
    clip_gradient: float = 0.0
    awp: float = 0.0
    awp_warmup: int = 0
    average: str = "none"
    average_start: float = 0.5
    average_decay: float = 0.999
    select: str = "best"
    select_on: str = "auto"
    select_from: str = "held-out"
    seed: int = 0
    channels_last: bool = False
    compile: bool = False
    device: str = "cpu"
    devices: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    model_arg: Mapping[str, str] = field(default_factory=dict)

    @property
    def spec(self) -> catalogue.Spec:
        """The method with all its settings, norm and eps among them where it has these."""
        own = {s.name for s in catalogue.find("trainers", self.method).settings}
        threat = {k: v for k, v in {"norm": self.norm, "eps": self.eps}.items() if k in own}
        text = ",".join(f"{k}={v}" for k, v in {**threat, **self.settings}.items())
        return catalogue.parse("trainers", self.method + (f":{text}" if text else ""))

    @property
    def label(self) -> str:
        """The method and the settings that are not its defaults, but for the threat model; ``awp-`` where it is on."""
        plain = catalogue.parse("trainers", self.method)
        own = self.spec.settings
        changed = [f"{k}={exact(v)}" for k, v in own.items() if k not in ("norm", "eps") and v != plain.settings.get(k)]
        return ("awp-" if self.awp > 0 else "") + plain.label + (":" if changed else "") + ",".join(changed)


TABLES = ("settings", "model_arg")
#: Every flag but the two tables, with its type and default.
KEYS = {f.name: Setting(f.name, str(f.type), f.default) for f in fields(Order) if f.name not in TABLES}


@dataclass(frozen=True)
class Layer:
    """What one place asks for.

    Args:
        where: The place, for messages.
        values: Text by key of :data:`KEYS`.
        settings: Settings of the method, text.
        model_arg: Arguments of the architecture, text.
    """

    where: str
    values: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    model_arg: Mapping[str, str] = field(default_factory=dict)


def split_method(text: str) -> tuple[str, dict[str, str]]:
    """``soar:init=pgd1`` as name and settings; the name may be ``file.py:function``."""
    name, tail = re.fullmatch(r"(.*\.py:\w+|[^:]*):?(.*)", text, re.S).groups()  # type: ignore[union-attr]
    return name.strip(), written.pairs(tail, "", text)


def layer(where: str, told: Mapping[str, Any]) -> Layer:
    """A layer from keys as people write them; values are text, numbers or true and false.

    Norm and eps among the method's settings are those of the whole training, whose log uses them too.

    Raises:
        UsageError: an unknown key, with the closest; a value that does not fit.
    """
    values: dict[str, str] = {}
    tables: dict[str, dict[str, str]] = {name: {} for name in TABLES}
    for written_key, value in told.items():
        key = written_key.replace("-", "_")
        if key in TABLES:
            if not isinstance(value, Mapping):
                raise UsageError(f"{written_key} must be a table of key = value", code="A04", where=where)
            tables[key] = {k.replace("-", "_"): _text(v, f"{written_key}.{k}", where) for k, v in value.items()}
        elif key in KEYS:
            values[key] = _text(value, written_key, where)
            _read(KEYS[key], values[key], "train", where)
        else:
            raise unknown_at(where, "key", written_key, [flag(k) for k in (*KEYS, *TABLES)])
    if "method" in values:
        values["method"], own = split_method(values["method"])
        tables["settings"] = own | tables["settings"]
    for key in ("norm", "eps"):
        if key in tables["settings"]:
            values[key] = tables["settings"].pop(key)
    return Layer(where, values, tables["settings"], tables["model_arg"])


def unknown_at(where: str, kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that does not exist, with the place where it was written."""
    error = unknown(kind, name, known)
    error.where = where
    return error


def flag(key: str) -> str:
    """A key as its flag is written."""
    return key.replace("_", "-")


def _text(value: Any, key: str, where: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float | Path):
        return str(value)
    raise UsageError(f"{key} must be text, a number, true or false, got {value!r}", code="A04", where=where)


def _read(setting: Setting, text: str, owner: str, where: str) -> Any:
    try:
        return setting.read(text, owner)
    except UsageError as error:
        error.where = error.where or where
        error.what = error.what.replace(f"{setting.name} of train", flag(setting.name))
        raise


def from_file(path: Path) -> dict[str, Any]:
    """A TOML file as it is.

    Raises:
        FileRefused: missing, or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileRefused(f"cannot read {path}: {error.strerror}", code="F02") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FileRefused(f"{path} is not TOML: {error}", code="F02") from None


def environment(variables: Mapping[str, str] = os.environ) -> Layer:
    """What ``ROBEVAL_TRAIN_EPOCHS`` and its like ask for."""
    told = {k.removeprefix(VARIABLE).lower(): v for k, v in variables.items() if k.startswith(VARIABLE)}
    return layer(f"environment variables {VARIABLE}...", told)


def values_of(layers: Iterable[Layer]) -> dict[str, str]:
    """The values that hold when later layers win."""
    return {key: text for one in layers for key, text in one.values.items()}


def merge(layers: Sequence[Layer]) -> Order:
    """The order that the layers come to, later ones winning, checked against the catalogue.

    Arguments of an architecture are forgotten where a later layer names another architecture.

    Raises:
        UsageError: unknown method or setting, with the place; a norm that the method does not support; a bad radius.
    """
    values = {key: KEYS[key].read(text, "train") for key, text in values_of(layers).items()}
    if not values.get("method"):
        raise UsageError("no method named", code="A04", do="robeval train METHOD; robeval list trainers")
    method = catalogue.find("trainers", values["method"])
    known = {s.name: s for s in method.settings}
    settings: dict[str, str] = {}
    model_arg: dict[str, str] = {}
    for one in layers:
        if "model" in one.values:
            model_arg = {}
        model_arg |= one.model_arg
        for key, text in one.settings.items():
            if key not in known and not method.open:
                raise unknown_at(one.where, f"setting of {method.name}", key, known)
            if key in known:
                _read(known[key], text, method.name, one.where)
            settings[key] = text
    order = Order(**values, settings=settings, model_arg=model_arg)
    _check_threat(order, method)
    return order if order.out else replace(order, out=f"{'awp-' if order.awp > 0 else ''}{method.name}.pt")


def _check_threat(order: Order, method: catalogue.Method) -> None:
    if order.norm not in NORMS:
        raise unknown("norm", order.norm, NORMS)
    norms = method.facts.get("norms") or NORMS
    if order.norm not in norms:
        raise UsageError(
            f"{method.name} does not support {order.norm}", code="A04", do=f"choose from: {', '.join(norms)}"
        )
    radius(order.eps, order.norm)
    _ = order.spec


def to_toml(order: Order) -> str:
    """The order as a file for ``--config`` that asks for the same, whatever presets say later."""
    lines = ["# robeval train --config THIS_FILE does this training again"]
    if order.preset or order.tiny:
        lines.append(f"# resolved from preset {order.preset or 'none'}{', tiny' if order.tiny else ''}")
    for key in KEYS:
        value = getattr(order, key)
        if key not in ("preset", "tiny") and value is not None:
            lines.append(f"{flag(key)} = {_toml(value)}")
    default = {s.name: s.default for s in order.spec.method.settings}
    own = {k: v for k, v in order.spec.settings.items() if k not in ("norm", "eps")}
    own = {k: v for k, v in own.items() if v is not None or default.get(k) is not None}
    for name, table in (("settings", own), ("model-arg", order.model_arg)):
        if table:
            lines += ["", f"[{name}]", *(f"{flag(key)} = {_toml(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and math.isfinite(value):
        said = exact(value)
        return f'"{said}"' if "/" in said else said
    return repr(value) if isinstance(value, int) else json.dumps(str(value), ensure_ascii=False)


def exact(value: Any) -> str:
    """A value as text that reads back as the same: 255ths as fractions, nothing as none."""
    said = pretty(value) if isinstance(value, float) else ""
    if said.endswith("/255") and number(said) == value:
        return said
    return "none" if value is None else str(value)
