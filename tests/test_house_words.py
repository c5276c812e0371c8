"""Words that no generated text may use: what attacks show is never more than an upper bound."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from robeval.core import catalogue
from robeval.reports.verdict import FOOT

ROOT = Path(__file__).resolve().parent.parent
BANNED = re.compile(
    r"\b(secure|securely|safe|safely|guaranteed|guarantees|passes the test|is robust|are robust|no gradient masking)\b",
    re.I,
)
#: Of certificates and of the second look at stored images only.
VERIFIED = re.compile(r"\bverified\b", re.I)
#: The one sentence that says what cannot be shown.
ALLOWED = (FOOT,)
#: Floors whose texts reach people: messages, tables, verdicts, pages.
SPEAKING = ("robeval/diagnose", "robeval/reports", "robeval/cli", "robeval/evaluate", "robeval/engine", "attacks")
DIAGNOSTICS = (
    "robeval/diagnose",
    "robeval/reports/verdict.py",
    "robeval/reports/diagnoses.py",
    "robeval/cli/diagnose.py",
    "robeval/cli/diagnosing.py",
)
PASSES = re.compile(r"\b(model|test|evaluation|diagnosis)s? pass(es|ed)?\b", re.I)


def spoken(source: str) -> Iterator[str]:
    """String literals of a source text that are no docstrings, with what is joined to them."""
    tree = ast.parse(source)
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and node.body
        and isinstance(node.body[0], ast.Expr)
    }  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


def said_in(*places: str) -> list[tuple[str, str]]:
    """(file, text) of everything that the files of some places may print."""
    found = []
    for place in places:
        path = ROOT / place
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            text = file.read_text(encoding="utf-8")
            found += [(file.relative_to(ROOT).as_posix(), said) for said in spoken(text)]
    return found


def banned(texts: list[tuple[str, str]], pattern: re.Pattern[str]) -> list[str]:
    bare = [(where, re.sub("|".join(map(re.escape, ALLOWED)), "", said)) for where, said in texts]
    return [f"{where}: {said}" for where, said in bare if pattern.search(said)]


def test_no_text_claims_more_than_attacks_can_show() -> None:
    assert banned(said_in(*SPEAKING), BANNED) == []


def test_diagnostics_never_say_verified_or_pass() -> None:
    texts = said_in(*DIAGNOSTICS)
    assert banned(texts, VERIFIED) == []
    assert banned(texts, PASSES) == []


def test_help_and_documents_of_diagnostics_keep_to_the_words() -> None:
    docs = [(m.name, m.doc) for m in catalogue.methods("diagnostics").values()]
    page = ROOT / "docs" / "diagnostics.md"
    docs.append((page.name, page.read_text(encoding="utf-8")))
    assert banned([(where, " ".join(said.split())) for where, said in docs], BANNED) == []


@pytest.mark.parametrize("claim", ["the model is robust", "Safe at eps 8/255", "no gradient masking", "guaranteed"])
def test_the_check_sees_a_claim(claim: str) -> None:
    assert banned([("x", claim)], BANNED)
    assert not banned([("x", FOOT)], BANNED)
