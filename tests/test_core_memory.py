"""Freed memory stays with the process that asks for it."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from robeval.core.memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(77)
torch.set_num_threads(1)
def work():
    x = torch.rand(1, 1 << 18)
    for _ in range(20):
        x = x * 1.0 + x
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_kept_memory_costs_no_page_faults() -> None:
    faults = {}
    for how in ("keep", "default"):
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=False)
        if done.returncode == 77:
            pytest.skip("this C library is not glibc: the setting does nothing here")
        faults[how] = int(done.stdout)
    assert faults["keep"] < 2560  # 50 rounds of 41 buffers of 256 pages each: a few at most are fresh
    assert faults["keep"] < faults["default"]
