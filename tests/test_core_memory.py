"""Freed memory stays with the process that asks for it."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from robeval.core.memory import keep_freed_memory
if not keep_freed_memory():
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
    """Left alone, glibc takes 9,000 to 265,000 faults here, and now and then none: so it is no measure."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("this C library is not glibc: the setting does nothing here")
    assert int(done.stdout) < 2560  # of 50 rounds of 41 buffers of 256 pages each a few at most are fresh
