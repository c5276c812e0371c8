"""Write the pages that are made from the source: records.md and exit-codes.md. Run: python docs/generate.py

A test compares the pages with what this file would write.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from robeval.core import errors
from robeval.core.records import SCHEMA, AttackRecord, Certificate, Diagnosis, describe

DOCS = Path(__file__).resolve().parent

RECORDS = """# Records

<!-- made by docs/generate.py from robeval/core/records.py -->

A run is a folder: `manifest.json` and Parquet parts in `records/`. Every row is one decision about one image, so every
number of a table can be traced to its images. Any Parquet reader opens them: `pandas.read_parquet("RUN/records")`.
Schema version {schema}.
"""

EXIT_CODES = """# Exit codes and error codes

<!-- made by docs/generate.py from the source -->

A command ends with one of these codes. Scripts may rely on them.

| exit | meaning |
|---|---|
| 0 | complete |
| 1 | a fault of robeval itself; `robeval-error.log` holds the details |
{exits}
| 130, 143 | stopped by a signal (Ctrl-C, kill); what was decided is saved and the same command goes on |

A message has at most four lines: what is wrong, with a short code for searching, then where, why it matters, and what
to do. With `--json` the same is one JSON document on stdout. `...` stands for what the message fills in.

| code | exit | message |
|---|---|---|
{codes}
"""

MEANING = {
    "UsageError": "wrong command, option or setting",
    "FileRefused": "a file is missing, damaged, or would run code",
    "ContractBroken": "the model or the data break what robeval needs of them",
    "MachineError": "disk, memory, device or rights",
    "Incomplete": "stopped before the end; the same command goes on",
    "GateFailed": "a threshold that the user set was not met",
    "Contradicted": "an attack landed inside a proof: one of the two is wrong, both records are kept",
}


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def records() -> str:
    """The page of columns."""
    page = RECORDS.format(schema=SCHEMA)
    for record in (AttackRecord, Certificate, Diagnosis):
        page += f"\n## {record.__name__}\n\n{(record.__doc__ or '').strip()}\n\n"
        page += "| column | type | unit | meaning |\n|---|---|---|---|\n"
        page += "".join(
            f"| {' | '.join(cell(part) for part in (f'`{n}`', t, u, d))} |\n" for n, t, u, d in describe(record)
        )
    return page


def template(node: ast.expr) -> str:
    """A message as its source writes it, with ``...`` for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(v) if isinstance(v, ast.Constant) else "..." for v in node.values)
    if isinstance(node, ast.BinOp):
        return template(node.left) + template(node.right)
    return "..."


def raised(tree: ast.AST) -> Iterator[tuple[str, int, str]]:
    """(code, exit code, message) of every error that a source file can make."""
    defaults: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            late = zip(reversed(node.args.args), reversed(node.args.defaults), strict=False)
            named = [*late, *((a, d) for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if d)]
            defaults |= {a.arg: d.value for a, d in named if isinstance(d, ast.Constant) and isinstance(d.value, str)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            kind = getattr(errors, node.func.id, None)
            if isinstance(kind, type) and issubclass(kind, errors.RobevalError):
                code = next((k.value for k in node.keywords if k.arg == "code"), None)
                name = code.value if isinstance(code, ast.Constant) else defaults.get(getattr(code, "id", ""), "")
                yield str(name), kind.exit_code, template(node.args[0])
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for match in re.finditer(r"(?:note|warning)\[([A-Z]\d\d[a-z]?)\]", node.value):
                yield match[1], 0, "(a note; the command goes on)"


def exit_codes() -> str:
    """The page of exit codes and of every error code in the source."""
    root, rows = DOCS.parent, set()
    for top in ("robeval", "attacks", "bounds"):
        for path in sorted((root / top).rglob("*.py")):
            rows |= {row for row in raised(ast.parse(path.read_text(encoding="utf-8"))) if row[0]}
    exits = {getattr(errors, name).exit_code: text for name, text in MEANING.items()}
    return EXIT_CODES.format(
        exits="\n".join(f"| {code} | {text} |" for code, text in sorted(exits.items())),
        codes="\n".join(f"| {code} | {out} | {cell(text)} |" for code, out, text in sorted(rows)),
    )


PAGES = {"records.md": records, "exit-codes.md": exit_codes}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
