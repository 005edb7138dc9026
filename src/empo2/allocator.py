"""Memory that one update frees is kept for the next."""

import ctypes
import platform

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST_KEPT = 2**30  #: bytes
NEVER = -1


def keep_freed_memory(dtype: torch.dtype) -> None:
    """Have glibc keep what training on a processor frees, where that pays: in bfloat16. Holds for the whole process.

    By default large tensors go back to the system when they are freed, and the next update pays for each of their pages
    anew: up to a third of its time where bfloat16 is multiplied fast, next to nothing in float32, which needs more
    memory besides (docs/log.md, 2026-11-29). The gap that an aligned tensor leaves is too small for the next of its
    size, so that more is held than used. With another C library nothing changes.
    """
    if dtype == torch.float32 or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
    libc.mallopt(M_TRIM_THRESHOLD, NEVER)
