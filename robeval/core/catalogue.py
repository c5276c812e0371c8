"""The folder is the registry: a method appears because its file exists.

A method is a function with one decorator, ``@attack(...)``, ``@bound(...)``, ``@trainer(...)`` and so on. Its facts
(source, norms, ...) are the decorator's arguments, its settings are the keyword arguments of its signature, its help is
its docstring. The catalogue reads all this from the source text, so that listing a hundred methods imports none of
them, and no torch; the file is imported when the method runs.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import json
import re
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from robeval.core import settings as written
from robeval.core.errors import FileRefused, UsageError, unknown
from robeval.core.settings import Setting

F = TypeVar("F", bound=Callable[..., Any])


def _marks(doc: str) -> Callable[..., Callable[[F], F]]:
    def decorator(**facts: Any) -> Callable[[F], F]:
        return lambda function: function

    decorator.__doc__ = doc
    return decorator


attack = _marks("Mark an attack. Facts: source, norms, access, search, attempts, presets, aliases.")
bound = _marks("Mark a bound. Facts: source, norms, kind (estimate, proof, probabilistic), smooth, aliases.")
trainer = _marks("Mark a trainer. Facts: source, norms, loop (what the training loop should do by default), aliases.")
architecture = _marks("Mark a function that builds a network. Facts: source.")
dataset = _marks("Mark a function that loads a data set. Facts: source.")
diagnostic = _marks("Mark a diagnostic. Facts: id, group, level, images, question, limit, source.")
reference = _marks("Mark another package's attacks. Facts: source, norms, search, needs, word, by_word.")


@dataclass(frozen=True)
class Kind:
    """Where methods of a kind live and what the decorator is called."""

    decorator: str
    package: str
    noun: str
    hyphens: bool = True


KINDS = {
    "attacks": Kind("attack", "robeval.attacks", "attack"),
    "bounds": Kind("bound", "robeval.bounds", "bound"),
    "trainers": Kind("trainer", "robeval.train.methods", "trainer"),
    "models": Kind("architecture", "robeval.models.architectures", "architecture", hyphens=False),
    "data": Kind("dataset", "robeval.data.sources", "data set", hyphens=False),
    "diagnostics": Kind("diagnostic", "robeval.diagnose.methods", "diagnostic"),
    "references": Kind("reference", "robeval.references", "reference", hyphens=False),
}


@dataclass(frozen=True)
class Method:
    """A method that the catalogue found: everything but the code itself."""

    kind: str
    name: str
    function: str
    module: str
    path: Path
    doc: str
    facts: Mapping[str, Any]
    settings: tuple[Setting, ...]
    open: bool = False

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return self.doc.strip().splitlines()[0] if self.doc.strip() else ""

    def load(self) -> Callable[..., Any]:
        """Import the file and return the function."""
        if self.module:
            return getattr(importlib.import_module(self.module), self.function)  # type: ignore[no-any-return]
        spec = importlib.util.spec_from_file_location(f"robeval_user_{self.path.stem}", self.path)
        assert spec and spec.loader
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return getattr(loaded, self.function)  # type: ignore[no-any-return]

    def bind(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All settings, the given ones read and the rest at their defaults.

        Raises:
            UsageError: a setting that the method does not have, or a value of the wrong type.
        """
        return written.bind(self.name, self.settings, self.open, given)

    def named(self, word: str) -> Method:
        """One of the many attacks that a reference stands for, with the facts that hold for it alone."""
        own: dict[str, Any] = next(
            (f for names, f in self.facts.get("by_word", {}).items() if word in names.split()), {}
        )
        return replace(self, name=f"{self.name}:{word}", facts=types.MappingProxyType({**self.facts, **own}))


@dataclass(frozen=True)
class Spec:
    """A method with all its settings, as ``pgd:steps=20,restarts=5`` asks for it."""

    method: Method
    settings: dict[str, Any] = field(hash=False)
    label: str

    @cached_property
    def config_hash(self) -> str:
        """Hash of the name and every setting, defaults included; of a .npy file the content counts too."""
        arrays = [Path(v) for v in self.settings.values() if isinstance(v, str) and v.endswith(".npy")]
        held = [hashlib.sha256(path.read_bytes()).hexdigest() for path in arrays if path.is_file()]
        text = json.dumps([self.method.name, self.settings, *held], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class _Fold(ast.NodeTransformer):
    """Replaces quotients of plain numbers, such as ``8 / 255``, by their value."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        if isinstance(node.op, ast.Div):
            quotient = ast.literal_eval(node.left) / ast.literal_eval(node.right)
            return ast.copy_location(ast.Constant(quotient), node)
        return node


def _constant(node: ast.expr | None) -> Any:
    """A plain value from source text; quotients count as plain."""
    return None if node is None else ast.literal_eval(_Fold().visit(node))


def _args_docs(doc: str) -> dict[str, str]:
    """Sentences of the ``Args:`` section of a docstring, by argument."""
    section = re.search(r"^ *Args:\n(.*?)(?=^ {0,4}\S[^\n]*:\s*$|\Z)", doc, re.S | re.M)
    found: dict[str, str] = {}
    for match in re.finditer(r"^ {4,8}(\w+): (.*(?:\n {9,}\S.*)*)", section[1] if section else "", re.M):
        found[match[1]] = " ".join(match[2].split())
    return found


def _read_file(path: Path, kind: str, module: str) -> Iterable[Method]:
    """The decorated functions of one file."""
    spec = KINDS[kind]
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise FileRefused(f"{path} is not valid Python: {error}", code="F02") from None
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef):
            continue
        for mark in node.decorator_list:
            if not (isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) and mark.func.id == spec.decorator):
                continue
            try:
                facts = {k.arg: _constant(k.value) for k in mark.keywords if k.arg}
                defaults = [_constant(d) for d in node.args.kw_defaults]
            except ValueError:
                raise FileRefused(
                    f"{path}: facts and defaults of {node.name} must be plain values, not expressions", code="F02"
                ) from None
            doc = ast.get_docstring(node) or ""
            docs = _args_docs(doc)
            settings = tuple(
                Setting(a.arg, ast.unparse(a.annotation) if a.annotation else "str", value, docs.get(a.arg, ""))
                for a, value in zip(node.args.kwonlyargs, defaults, strict=True)
            )
            name = facts.get("name") or (node.name.replace("_", "-") if spec.hyphens else node.name)
            open_ = node.args.kwarg is not None
            yield Method(kind, name, node.name, module, path, doc, types.MappingProxyType(facts), settings, open_)


@cache
def methods(kind: str) -> dict[str, Method]:
    """Every method of a kind by name: the house's folder, then installed entry points of the group ``robeval.KIND``."""
    package = KINDS[kind].package
    spec = importlib.util.find_spec(package)
    assert spec and spec.submodule_search_locations
    found: dict[str, Method] = {}
    for folder in spec.submodule_search_locations:
        for path in sorted(Path(folder).glob("*.py")):
            if path.stem != "__init__":
                found |= {m.name: m for m in _read_file(path, kind, f"{package}.{path.stem}")}
    for entry in metadata.entry_points(group=f"robeval.{kind}"):
        outside = importlib.util.find_spec(entry.module)
        if outside and outside.origin:
            found |= {
                m.name: m for m in _read_file(Path(outside.origin), kind, entry.module) if m.function == entry.attr
            }
    return found


def _names(kind: str) -> dict[str, tuple[Method, dict[str, Any], str]]:
    """Names, aliases and presets that a user may type, with the preset's settings and the label it gets."""
    table: dict[str, tuple[Method, dict[str, Any], str]] = {}
    for method in methods(kind).values():
        table[method.name] = (method, {}, method.name)
        for alias in method.facts.get("aliases", ()):
            table[alias] = (method, {}, method.name)
        for preset, settings in method.facts.get("presets", {}).items():
            table[preset] = (method, dict(settings), preset)
    return table


def presets(kind: str) -> dict[str, str]:
    """Names of presets and aliases with the method that they stand for."""
    return {name: m.name for name, (m, _, _) in _names(kind).items() if name != m.name}


def find(kind: str, name: str) -> Method:
    """The method of that name, alias or preset; hyphens and underscores are the same.

    Raises:
        UsageError: no such method, with the closest names.
    """
    return _look_up(kind, name)[0]


def _look_up(kind: str, text: str) -> tuple[Method, dict[str, Any], str, str]:
    """The method that a text names, the preset's settings, the label, and what follows the name."""
    if re.match(r".*\.py:\w+", text):
        file, rest = text.split(".py:", 1)
        function, _, tail = rest.partition(":")
        path = Path(file + ".py")
        if not path.is_file():
            raise FileRefused(f"no file at {path}", code="F02")
        mine = {m.function: m for m in _read_file(path, kind, "")}
        if function not in mine:
            raise unknown(f"{KINDS[kind].noun} in {path}", function, mine)
        return mine[function], {}, mine[function].name, tail
    name, _, tail = text.partition(":")
    table = _names(kind) | (_names("references") if kind == "attacks" else {})
    key = next((k for k in table if k.replace("_", "-") == name.strip().replace("_", "-")), None)
    if key is None:
        raise unknown(KINDS[kind].noun, name, table)
    return *table[key], tail


def parse(kind: str, text: str) -> Spec:
    """Read ``name``, ``name:key=value,...`` or ``file.py:function`` into a method with all its settings.

    Among attacks, ``torchattacks:PGD,steps=20`` is the reference of that name; the bare word says which of its attacks.

    Raises:
        UsageError: unknown method or setting, with the closest names; malformed settings; a package that is missing.
        FileRefused: the file does not exist or holds no such method.
    """
    method, start, label, tail = _look_up(kind, text)
    word = method.facts.get("word", "")
    settings = method.bind({**start, **written.pairs(tail, word, text)})
    base = method.bind(start)
    changed = [f"{k}={v}" for k, v in sorted(settings.items()) if k != word and (k not in base or v != base[k])]
    if word:
        method = _installed(method.named(settings[word]))
        return Spec(method, settings, ",".join([method.name, *changed]))
    return Spec(method, settings, label + (":" + ",".join(changed) if changed else ""))


def _installed(method: Method) -> Method:
    """Refuse a method whose package is not there, without importing it."""
    needs = method.facts.get("needs", "")
    if needs and importlib.util.find_spec(needs) is None:
        raise UsageError(
            f"{method.name} needs the package {needs}, which is not installed",
            code="A07",
            do="pip install 'robeval[reference]'",
        )
    return method
