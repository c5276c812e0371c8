"""Settings of methods: keyword arguments in the source, ``key=value`` on the command line."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from robeval.core.errors import UsageError, unknown
from robeval.core.numbers import number

#: Counts: less than one of them means nothing.
COUNTS = ("steps", "restarts", "queries", "draws", "samples", "lookahead")


@dataclass(frozen=True)
class Setting:
    """One keyword argument of a method: what the user can set."""

    name: str
    type: str
    default: Any
    doc: str = ""

    def read(self, text: Any, owner: str) -> Any:
        """A value from the command line as the annotated type.

        Raises:
            UsageError: the text does not fit the type.
        """
        if not isinstance(text, str):
            return text
        choices = re.fullmatch(r"Literal\[(.*)\]", self.type)
        if choices:
            allowed = [str(ast.literal_eval(part.strip())) for part in choices[1].split(",")]
            if text not in allowed:
                raise unknown(f"{self.name} of {owner}", text, allowed)
            return text
        if "None" in self.type and text.lower() in ("none", "auto"):
            return None
        kinds = [part.strip() for part in self.type.split("|")]
        what = f"{self.name} of {owner}"
        if "bool" in kinds:
            if text.lower() not in ("true", "false", "yes", "no", "1", "0"):
                raise UsageError(f"{what} must be true or false, got {text!r}", code="A04")
            return text.lower() in ("true", "yes", "1")
        if "int" in kinds:
            value = number(text, name=what, code="A04")
            if value != int(value):
                raise UsageError(f"{what} must be a whole number, got {text!r}", code="A04")
            return int(value)
        if "float" in kinds:
            return number(text, name=what, code="A04")
        return text


def plain(text: Any) -> Any:
    """A value whose type nobody declared: true, false, none, a whole number, a number such as 8/255, else text."""
    if not isinstance(text, str):
        return text
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        value = number(text)
    except UsageError:
        return text
    return int(text) if re.fullmatch(r"[+-]?\d+", text.strip()) else value


def bind(owner: str, settings: tuple[Setting, ...], open_: bool, given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings, the given ones read and the rest at their defaults.

    Args:
        owner: Name of the method, for messages.
        settings: What it declares.
        open_: It takes any other setting too, read as it looks.
        given: From the command line, or from a preset.

    Raises:
        UsageError: a setting that the method does not have, or a value of the wrong type.
    """
    known = {s.name: s for s in settings}
    others = [name for name in given if name not in known]
    if others and not open_:
        raise unknown(f"setting of {owner}", others[0], known)
    bound = {n: s.read(given[n], owner) if n in given else s.default for n, s in known.items()}
    bound |= {name: plain(given[name]) for name in others}
    for name in COUNTS:
        value = bound.get(name)
        if name in given and isinstance(value, int | float) and value < 1:
            raise UsageError(f"{name} of {owner} must be at least 1, got {given[name]}", code="A04")
    return bound


def pairs(tail: str, word: str, where: str) -> dict[str, str]:
    """Read ``key=value,...``; where the method has a ``word``, a first bare word is its value."""
    given: dict[str, str] = {}
    for place, part in enumerate(filter(None, (p.strip() for p in tail.split(",")))):
        key, equals, value = part.partition("=")
        if word and place == 0 and not equals:
            key, equals, value = word, "=", part
        if not equals:
            raise UsageError(f'settings are written key=value, got "{part}"', code="A04", where=where)
        given[key.strip().replace("-", "_")] = value.strip()
    return given
