"""What is kept in memory below torch."""

import os
import platform
import subprocess
import sys

import pytest

from empo2.allocator import keep_few_products
from empo2.precision import has_bf16_instructions

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


KINDS = """
import ctypes
import sys
import torch
from empo2.allocator import keep_few_products

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena a b c d e f used g h".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
torch.set_num_threads(1)
if sys.argv[1] == "few":
    keep_few_products()
weight = torch.ones(1536, 576, dtype=torch.bfloat16)
torch.nn.functional.linear(torch.ones(3, 576, dtype=torch.bfloat16), weight)
before = libc.mallinfo2().used
for rows in range(4, 404):
    torch.nn.functional.linear(torch.ones(rows, 576, dtype=torch.bfloat16), weight)
print((libc.mallinfo2().used - before) / 2**20)
"""


def held_for_products(argument: str) -> float:
    """MB that a process holds after 400 kinds of product; what other tests have set is not handed on."""
    unset = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}
    command = [sys.executable, "-c", KINDS, argument]
    return float(subprocess.run(command, capture_output=True, check=True, env=unset).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="measured by glibc")
@pytest.mark.skipif(not has_bf16_instructions(), reason="oneDNN multiplies bfloat16 on processors that have it")
def test_few_kinds_of_product_are_kept():
    everything = held_for_products("default")
    assert everything > 50
    assert held_for_products("few") < 0.5 * everything


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    keep_few_products()
    assert os.environ["LRU_CACHE_CAPACITY"] == "7"
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "128"
