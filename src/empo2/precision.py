"""Which precision this machine computes fastest in, measured once.

bfloat16 instructions do not tell: with AMX, or on AMD's Zen 4, bfloat16 is two to eight times as fast as float32; on an
Intel processor whose AMX is switched off it was 0.6 times (docs/log.md).
"""

import json
import time
from statistics import median

import torch

from empo2.cache import cache_folder
from empo2.run import available_cores, processor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def has_bf16_instructions() -> bool:
    """Whether this processor multiplies bfloat16 in hardware (AVX-512 BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def fastest(device: str) -> str:
    """`bfloat16` or `float32`: always bfloat16 on a GPU; on a processor the faster of the two.

    The measurement is kept in the cache folder, so that the same recipe gives the same run again on this machine.
    """
    if device != "cpu":
        return "bfloat16"
    if not has_bf16_instructions():
        return "float32"
    path = cache_folder() / "precision.json"
    machine = f"{processor()}, {available_cores()} cores, torch {torch.__version__}"
    try:
        known: dict[str, str] = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        known = {}
    if known.get(machine) not in DTYPES:
        seconds = {name: _seconds(dtype) for name, dtype in DTYPES.items()}
        known[machine] = min(seconds, key=lambda name: seconds[name])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known, indent=1))
    return known[machine]


def _seconds(dtype: torch.dtype, repeats: int = 7) -> float:
    """Median time of a matrix product of the size that training a small model makes."""
    rows, weight = torch.ones(2048, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
    taken = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        torch.nn.functional.linear(rows, weight)
        taken.append(time.perf_counter() - started)
    return median(taken[2:])
