"""One invocation that works on a run: when it started, how it ended, what it cost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from robeval.core.errors import RobevalError
from robeval.store.runstore import RunStore


@contextmanager
def session(store: RunStore, argv: list[str] | None, started: float) -> Iterator[dict[str, Any]]:
    """Notes for the run folder, written however the block ends.

    Args:
        store: The run; closed at the end.
        argv: The command.
        started: ``time.monotonic()`` when the work began.
    """
    notes: dict[str, Any] = {"argv": argv or [], "exit_code": 0}
    try:
        yield notes
    except RobevalError as error:
        notes["exit_code"] = error.exit_code
        raise
    except SystemExit as end:  # a signal that asked for an orderly stop
        notes["exit_code"] = end.code
        raise
    except BaseException as error:
        notes["exit_code"] = 130 if isinstance(error, KeyboardInterrupt) else 1
        raise
    finally:
        notes["seconds"] = round(time.monotonic() - started, 3)
        store.close(notes)
