"""What can go wrong, in the user's terms, and the exit code that each kind of failure has.

RobevalError
├── UsageError        2  wrong command, option or setting
├── FileRefused       3  a file is missing, damaged, or would run code
├── ContractBroken    4  the model or the data break what robeval needs of them
├── MachineError      5  disk, memory, device, rights
├── Incomplete        6  stopped before the end; the same command resumes
├── GateFailed        7  a threshold that the user set was not met
└── Contradicted      8  an attack landed inside a proof: one of the two is wrong

Exit code 0 is a complete run, 1 a fault of robeval itself, 130 and 143 are signals.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RobevalError(Exception):
    """A failure told in at most four lines: what, where, why it matters, what to do.

    Args:
        what: One sentence, what is wrong.
        code: Short stable code such as ``M01``, for scripts and for searching.
        where: File, image id, layer or option.
        why: Why it matters, when that is not obvious.
        do: One command or edit that mends it.
    """

    exit_code = 1

    def __init__(self, what: str, *, code: str, where: str = "", why: str = "", do: str = ""):
        super().__init__(what)
        self.what, self.code, self.where, self.why, self.do = what, code, where, why, do

    def lines(self) -> list[str]:
        """The message as it is printed, at most four lines."""
        head = f"robeval: error[{self.code}] {self.what}"
        tail = [("where", self.where), ("why", self.why), ("do", self.do)]
        return [head] + [f"  {name}: {text}" for name, text in tail if text]

    def __str__(self) -> str:
        return "\n".join(self.lines())


class UsageError(RobevalError):
    exit_code = 2


class FileRefused(RobevalError):
    exit_code = 3


class ContractBroken(RobevalError):
    exit_code = 4


class MachineError(RobevalError):
    exit_code = 5


class Incomplete(RobevalError):
    exit_code = 6


class GateFailed(RobevalError):
    exit_code = 7


class Contradicted(RobevalError):
    exit_code = 8


def unknown(kind: str, name: str, known: Iterable[str], code: str = "A04") -> UsageError:
    """The error for a name that does not exist, with the closest names that do."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return UsageError(f'unknown {kind} "{name}"{hint}', code=code, do=f"choose from: {', '.join(known)}")
