"""What diagnostics stored for pictures."""

from __future__ import annotations

import json
from typing import Any

from robeval.reports.groups import Group


def evidence(g: Group, test: str) -> Any:
    """The stored numbers of a test in the diagnosis that counts; none where it did not run."""
    if g.diagnosis is None:
        return None
    path = g.diagnosis.folder / "evidence" / f"{test}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() and not path.is_symlink() else None
