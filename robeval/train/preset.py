"""Training settings of the papers, one file each in ``presets/``, and how they meet what a user asks for.

A file has ``about``, ``source`` and ``note``, a table ``common`` for all methods, a table for each in ``methods`` with
another ``note``, and ``[[cases]]`` that hold where all entries of their ``if`` do, later ones over earlier ones. Keys
are those of :mod:`robeval.train.orders`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from robeval.core import catalogue
from robeval.core.errors import UsageError, unknown
from robeval.core.numbers import number, pretty
from robeval.train.orders import KEYS, Layer, Order, exact, from_file, layer, merge, values_of

FOLDER = Path(__file__).parent / "presets"
#: Radius and warm-up epochs of adversarial weight perturbation, from its authors' code; others get the last entry.
AWP = {"adv": ("0.01", "0"), "trades": ("0.005", "10"), "rat": ("0.005", "10"), "": ("0.005", "0")}
#: What --tiny makes of any training: seconds on one core.
TINY = {"data": "digits", "model": "digits_cnn", "weights": "he", "epochs": "2", "hold_out": "100"}


@dataclass(frozen=True)
class Preset:
    """One paper.

    Args:
        name: What ``--preset`` takes.
        about: One sentence.
        source: The paper.
        note: What holds for all its methods and the user should know.
        common: Keys for all methods.
        methods: Keys per method that the paper trains, with ``settings`` and ``note``.
        cases: Keys that hold under a condition, each with the table ``if``.
        tiny: Keys of the small size, over those of any small training.
    """

    name: str
    about: str
    source: str
    note: str
    common: Mapping[str, Any]
    methods: Mapping[str, Mapping[str, Any]]
    cases: Sequence[Mapping[str, Any]]
    tiny: Mapping[str, Any]

    def key(self, method: str) -> str:
        """The paper's entry for a method, by the name typed or by what that stands for.

        Raises:
            UsageError: the paper does not train it; names those that it does.
        """
        if method in self.methods:
            return method
        awp, base = unwrapped(method)
        found = "awp-" * awp + catalogue.find("trainers", base).name
        if found not in self.methods:
            raise UsageError(
                f"the paper of preset {self.name} does not train {found}",
                code="A04",
                do=f"leave --preset out, or choose from: {', '.join(self.methods)}",
            )
        return found

    def layers(self, method: str, asked: Sequence[Layer]) -> list[Layer]:
        """What the paper says of a method, under the conditions that what was asked for sets."""
        key = self.key(method)
        where = f"preset {self.name}"
        own = {k: v for k, v in self.methods[key].items() if k != "note"}
        found = [layer(where, self.common), layer(where, own)]
        for case in self.cases:
            told = _facts([*found, *asked]) | {"method": key}
            if all(told.get(k, "") in ([v] if isinstance(v, str) else v) for k, v in case["if"].items()):
                found.append(layer(where, {k: v for k, v in case.items() if k != "if"}))
        return found


def _facts(layers: Sequence[Layer]) -> dict[str, str]:
    """What conditions ask about: values, the name of the data set without its arguments, settings of the method."""
    told = {key: str(setting.default) for key, setting in KEYS.items()} | values_of(layers)
    told["data"] = told["data"].partition(":")[0].replace("_", "-")
    told["eps"] = pretty(number(told["eps"], name="eps"))
    return told | {key: text for one in layers for key, text in one.settings.items()}


@cache
def presets() -> dict[str, Preset]:
    """All presets by name."""
    found = {}
    for path in sorted(FOLDER.glob("*.toml")):
        told = from_file(path)
        found[path.stem] = Preset(
            path.stem, told["about"], told["source"], told.get("note", ""), told.get("common", {}), told["methods"],
            told.get("cases", []), told.get("tiny", {}),
        )  # fmt: skip
    return found


def find(name: str) -> Preset:
    """The preset of that name.

    Raises:
        UsageError: no such preset, with the closest names.
    """
    if name not in presets():
        raise unknown("preset", name, presets())
    return presets()[name]


def unwrapped(method: str) -> tuple[bool, str]:
    """Whether a name asks for adversarial weight perturbation (``awp-trades``), and the method that it wraps."""
    try:
        catalogue.find("trainers", method)
    except UsageError:
        return (True, method.removeprefix("awp-")) if method.startswith("awp-") else (False, method)
    return False, method


def resolve(layers: Sequence[Layer]) -> Order:
    """The order that the layers come to, over the defaults of the method's name, the preset and the small size.

    Raises:
        UsageError: unknown names, keys or values; a method that the preset's paper does not train.
    """
    asked = values_of(layers)
    typed = asked.get("method", "")
    if not typed:
        return merge(layers)
    awp, name = unwrapped(typed)
    spec = catalogue.parse("trainers", name)
    beneath = [layer(typed, spec.method.facts.get("loop", {}))]
    if awp:
        gamma, warmup = AWP.get(spec.method.name, AWP[""])
        beneath.append(layer(typed, {"awp": gamma, "awp_warmup": warmup}))
    default = spec.method.bind({})
    stands_for = layer(typed, {"settings": {k: exact(v) for k, v in spec.settings.items() if default[k] != v}})
    preset = find(asked["preset"]) if asked.get("preset") else None
    if preset:
        beneath += preset.layers(typed, [stands_for, *layers])
    beneath.append(stands_for)
    if KEYS["tiny"].read(asked.get("tiny", "false"), "train"):
        beneath.append(_tiny(values_of(beneath), preset))
    if asked.get("init_from") and not asked.get("model"):
        beneath.append(Layer("", {"model": ""}))  # the architecture is that of the model to start from
    return merge([*beneath, *layers, Layer("", {"method": name})])


def _tiny(values: Mapping[str, str], preset: Preset | None) -> Layer:
    """Small data, a small network and few epochs, with the schedule and warm-ups shrunk alike."""
    told = TINY | dict(preset.tiny if preset else {})
    share = int(told["epochs"]) / int(values.get("epochs", KEYS["epochs"].default))
    name, _, rest = values.get("schedule", "").partition(":")
    if name == "milestones":
        epochs, x, gamma = rest.partition("x")
        at = {str(max(1, round(share * float(e)))) for e in re.split("/", epochs)}
        told["schedule"] = f"milestones:{'/'.join(sorted(at, key=int))}{x}{gamma}"
    if values.get("awp_warmup"):
        told["awp_warmup"] = str(int(share * int(values["awp_warmup"])))
    return layer("--tiny", told)


def notes(order: Order, typed: str) -> list[str]:
    """What the user of a preset should know."""
    if not order.preset:
        return []
    preset = find(order.preset)
    own = preset.methods[preset.key(typed)].get("note", "")
    return [f"preset {preset.name}: {text}" for text in (own, preset.note) if text]
