"""What the libraries below keep for later: of freed memory, and of products that they have computed."""

import ctypes
import os
import platform

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST_KEPT = 2**30  #: bytes
NEVER = -1
PRODUCTS_KEPT = 128


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


def keep_few_products() -> None:
    """Have torch's oneDNN keep the last `PRODUCTS_KEPT` kinds of product, not 1,024; to be called before the first.

    A kind is one pair of shapes, of which sequences of all lengths make thousands. In bfloat16 each takes 0.3 MB in
    either of two caches, more than 1 GB after some steps (docs/log.md, 2026-11-29). What the user has set, stays.
    """
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # oneDNN's own, and that of torch's ideep
        os.environ.setdefault(cache, str(PRODUCTS_KEPT))
