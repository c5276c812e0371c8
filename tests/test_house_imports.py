"""The house's arrows: who may import whom, what stays light, how long a file may be, what a docstring must say."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from robeval.core import catalogue

ROOT = Path(__file__).resolve().parent.parent
LIGHT_CORE = {"robeval.core.errors", "robeval.core.numbers", "robeval.core.records"}

#: Floor -> what it may import of the house, besides itself. Whatever is not listed here must not exist.
ARROWS: dict[str, set[str]] = {
    "robeval.core": set(),
    "robeval.attacks": {"robeval.core"},
    "robeval.bounds": {"robeval.core"},
    "robeval.references": {"robeval.core"},
    "robeval.engine": {"robeval.core"},
    "robeval.store": {"robeval.core"},
    "robeval.models": {"robeval.core"},
    "robeval.data": {"robeval.core"},
    "robeval.reports": {"robeval.store", *LIGHT_CORE},
}
LOWER = {*ARROWS} - {"robeval.reports"}
for floor in ("robeval.evaluate", "robeval.certification", "robeval.train"):
    ARROWS[floor] = LOWER
ARROWS["robeval.diagnose"] = LOWER | {"robeval.evaluate"}
ARROWS["robeval.interface"] = {*ARROWS}  # robeval from Python, beside the command line
ARROWS["robeval.cli"] = {*ARROWS}
ARROWS["robeval.bootstrap"] = set()
ARROWS["robeval.__main__"] = {"robeval.cli"}
#: Method files of these kinds must not lean on each other: an algorithm reads alone. Machinery beside them is shared.
ALONE = {m.module for kind in ("attacks", "bounds", "diagnostics") for m in catalogue.methods(kind).values()}
#: What everybody may ask the package itself.
ROOT_NAMES = ("robeval", "robeval.__version__")
#: Never imported, by anybody, tests and examples included.
BANNED = ("torchvision", "attacks", "bounds")
#: Must be importable without torch, and without anything that makes ``robeval --help`` slow.
LIGHT = [
    "robeval",
    "robeval.bootstrap",
    "robeval.core.errors",
    "robeval.core.numbers",
    "robeval.core.records",
    "robeval.core.catalogue",
    "robeval.cli.app",
]


def sources() -> dict[str, str]:
    """Source text by module name, over robeval/, attacks/ and bounds/."""
    found = {}
    for folder, prefix in (("robeval", "robeval"), ("attacks", "robeval.attacks"), ("bounds", "robeval.bounds")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if folder == "robeval" and path.relative_to(ROOT / folder).parts[0] in ("attacks", "bounds"):
                continue
            parts = [p for p in path.relative_to(ROOT / folder).with_suffix("").parts if p != "__init__"]
            found[".".join([prefix, *parts])] = path.read_text(encoding="utf-8")
    return found


def imported(text: str) -> Iterator[str]:
    """Every module that a source text imports, inside functions too, and by ``import_module`` with a literal name."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from (f"{base}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def under(module: str, tops: Iterable[str]) -> bool:
    return any(module == top or module.startswith(top + ".") for top in tops)


def broken_arrows(modules: dict[str, str]) -> list[str]:
    """``importer -> imported`` for every import that points the wrong way."""
    wrong = []
    for module, text in modules.items():
        if module == "robeval":  # resolves public names on first use, so it may know every floor
            continue
        home = next((floor for floor in ARROWS if under(module, (floor,))), None)
        if home is None:
            wrong.append(f"{module} stands on no floor")
            continue
        for name in imported(text):
            if name.startswith("."):
                wrong.append(f"{module} -> {name}")
            if not under(name, ("robeval",)):
                continue
            own = under(name, (home,)) and not (home in ("robeval.attacks", "robeval.bounds") and under(name, ALONE))
            if not (own or name in ROOT_NAMES or under(name, ARROWS[home])):
                wrong.append(f"{module} -> {name}")
    return wrong


def test_imports_point_downwards_only() -> None:
    assert broken_arrows(sources()) == []


@pytest.mark.parametrize(
    "module, text",
    [
        ("robeval.core.ball", "from robeval.engine import drive"),
        ("robeval.attacks.pgd", "import robeval.engine.judge"),
        ("robeval.attacks.pgd", "from robeval.bounds import l_bound"),
        ("robeval.bounds.c_bound", "from robeval.bounds.l_bound import l_bound"),
        ("robeval.attacks.fgsm", "from robeval.attacks.pgd import pgd"),
        ("robeval.store.folder", "from robeval import attack"),
        ("robeval.engine.run", "def f():\n    from robeval.attacks.pgd import pgd"),
        ("robeval.engine.run", "importlib.import_module('robeval.attacks.pgd')"),
        ("robeval.store.folder", "from robeval.evaluate import run"),
        ("robeval.reports.table", "from robeval.core.ball import Ball"),
        ("robeval.train.fit", "from robeval.cli.common import note"),
        ("robeval.evaluate.run", "from . import verify"),
        ("robeval.evaluate.run", "from robeval.diagnose.run import diagnose"),
        ("robeval.newfloor.x", ""),
    ],
)
def test_the_arrow_check_sees_each_kind_of_wrong_import(module: str, text: str) -> None:
    assert len(broken_arrows({module: text})) >= 1


@pytest.mark.parametrize(
    "module, text",
    [
        ("robeval.reports.table", "from robeval.store.folder import read\nfrom robeval.core.records import CLEAN"),
        ("robeval.evaluate.run", "from robeval import __version__\nfrom robeval.engine.run import run"),
        ("robeval.cli.attack", "from robeval.evaluate.run import evaluate\nimport torch"),
        ("robeval.bounds.c_bound", "from robeval.bounds.lanczos import lanczos"),
        ("robeval.core.goal", "from robeval.core.losses import cross_entropy"),
    ],
)
def test_the_arrow_check_lets_good_imports_pass(module: str, text: str) -> None:
    assert broken_arrows({module: text}) == []


def test_nobody_imports_the_banned_packages() -> None:
    texts = dict(sources())
    for folder in ("tests", "benchmarks", "examples", "docs"):
        texts |= {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for p in (ROOT / folder).rglob("*.py")}
    assert [
        f"{where} -> {name}" for where, text in texts.items() for name in imported(text) if under(name, BANNED)
    ] == []
    assert list(imported("from torchvision import transforms")) == ["torchvision.transforms"]


def light_modules() -> list[str]:
    """Everything that must not load torch: the named modules, and every file of store, reports and cli."""
    return LIGHT + [m for m in sources() if under(m, ("robeval.store", "robeval.reports", "robeval.cli"))]


PROBE = """
import importlib, sys
heavy = sys.argv[1].split(",")
for name in sys.argv[2:]:
    importlib.import_module(name)
    loaded = [h for h in heavy if h in sys.modules]
    if loaded:
        sys.exit(f"importing {name} loads {', '.join(loaded)}")
"""


def probe(heavy: str, *modules: str) -> str:
    """The first module whose import loads something heavy, told in words; empty when none does."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, heavy, *modules], capture_output=True, text=True, env=environment, check=False
    )
    return done.stderr.strip() if done.returncode else ""


def test_no_torch_at_import_where_none_is_needed() -> None:
    assert probe("torch", *light_modules()) == ""
    assert probe("torch", "robeval.core.ball").endswith("importing robeval.core.ball loads torch")


def test_the_command_line_starts_without_the_large_libraries() -> None:
    assert probe("torch,pandas,pyarrow,scipy,sklearn,matplotlib,numpy", *LIGHT) == ""


def test_no_file_is_longer_than_300_lines() -> None:
    lengths = {module: len(text.splitlines()) for module, text in sources().items()}
    assert {m: n for m, n in lengths.items() if n > 300} == {}


def test_import_names_are_links_to_the_folders_at_the_top() -> None:
    for name in ("attacks", "bounds"):
        assert os.readlink(ROOT / "robeval" / name) == f"../{name}"


SECTIONS = {
    "attacks": ("Shapes", "Cost", "Source", "Departs"),
    "bounds": ("Shapes", "Cost", "Source", "Departs"),
    "trainers": ("Cost", "Source", "Departs"),
    "models": ("Shapes", "Source"),
    "data": ("Source",),
    "references": ("Shapes", "Cost", "Source", "Departs"),
    "diagnostics": ("Cost", "Source", "Departs"),
}
METHODS = [(kind, method) for kind in catalogue.KINDS for method in catalogue.methods(kind).values()]


def missing_in_docstring(doc: str, kind: str, settings: tuple[str, ...]) -> list[str]:
    """What the docstring of a method lacks: a summary, a section, a section's text, or a setting's sentence."""
    lines = doc.strip().splitlines() or [""]
    missing = [] if re.fullmatch(r"\S.*\.", lines[0]) and (len(lines) == 1 or not lines[1].strip()) else ["summary"]
    for section in SECTIONS[kind] + (("Args",) if settings else ()):
        if not re.search(rf"^{section}:[^\S\n]*\n[^\S\n]+\S", doc, re.M):
            missing.append(section)
    return missing + [name for name in settings if not catalogue._args_docs(doc).get(name)]


@pytest.mark.parametrize("kind, method", METHODS, ids=[f"{kind}-{m.name}" for kind, m in METHODS])
def test_method_docstrings_have_every_section(kind: str, method: catalogue.Method) -> None:
    assert missing_in_docstring(method.doc, kind, tuple(s.name for s in method.settings)) == []
    if kind in ("attacks", "bounds", "trainers", "diagnostics"):
        assert method.facts.get("source"), f"{method.name} names no source"


def test_the_docstring_check_sees_what_is_missing() -> None:
    doc = catalogue.find("attacks", "pgd").doc
    assert missing_in_docstring(doc.replace("Departs:", "Differs:"), "attacks", ("steps",)) == ["Departs"]
    assert missing_in_docstring(doc, "attacks", ("steps", "unheard_of")) == ["unheard_of"]
    assert "summary" in missing_in_docstring("no full stop", "attacks", ())


def test_one_file_holds_one_method_of_the_same_name() -> None:
    for kind in ("attacks", "bounds", "trainers", "diagnostics"):
        homes = [(method.path.stem, method.function) for k, method in METHODS if k == kind]
        assert [(stem, function) for stem, function in homes if stem != function] == []
