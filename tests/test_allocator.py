import platform
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from pathlib import Path
import torch
from empo2.allocator import keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

torch.set_num_threads(1)
if sys.argv[1] != "default":
    keep_freed_memory(getattr(torch, sys.argv[1]))
before = resident()
torch.ones(100 * 2**20, dtype=torch.uint8)
print((resident() - before) / 2**20)
"""


def kept(argument: str) -> float:
    """MB that a process still has of a tensor of 100 MB once it is freed."""
    return float(subprocess.run([sys.executable, "-c", PROGRAM, argument], capture_output=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")
def test_freed_memory_is_kept_in_bfloat16_only():
    assert kept("default") < 10
    assert kept("float32") < 10
    assert kept("bfloat16") > 90
