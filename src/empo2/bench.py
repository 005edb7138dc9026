"""How fast this machine is and what a step of a recipe costs here: `empo2 bench`.

Measured, not looked up: the largest rate of matrix products and of reading memory that torch reaches, then steps of
training as `empo2 train` takes them, without evaluation and checkpoints.
"""

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

from empo2 import metrics, precision
from empo2.assemble import Parts, assemble, device_of, resolved
from empo2.config import Config
from empo2.run import available_cores, processor
from empo2.train import take_step

CPU_SHAPES = ((4096, 576, 1536), (4096, 1536, 576), (2048, 2048, 2048))
GPU_SHAPES = ((8192, 8192, 8192),)


def matrix_peak(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of the fastest of some products [m, k] · [k, n] that training makes; 2 m k n each."""
    rates = []
    for m, k, n in CPU_SHAPES if device == "cpu" else GPU_SHAPES:
        left, right = torch.ones(m, k, dtype=dtype, device=device), torch.ones(n, k, dtype=dtype, device=device)
        out = torch.empty(m, n, dtype=dtype, device=device)
        rates.append(2 * m * k * n / _seconds(partial(torch.mm, left, right.t(), out=out), device))
    return max(rates)


def read_bandwidth(device: str) -> float:
    """Bytes/s of summing a tensor that no cache holds."""
    many = torch.ones(2**26 if device == "cpu" else 2**29, device=device)
    return many.nbytes / _seconds(many.sum, device)


def _seconds(work: Callable[[], Any], device: str, repeats: int = 7) -> float:
    taken = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        work()
        if device != "cpu":
            torch.accelerator.synchronize()
        taken.append(time.perf_counter() - started)
    return median(taken[2:])


def training_flops(model: Any, tokens: int, logit_places: int, pairs: float) -> float:
    """Operations of forward and backward pass: 6 · weights of the layers · ``tokens``, 6 · weights of the head ·
    ``logit_places``, and attention, 12 · layers · width of all heads · ``pairs`` of tokens that see each other.
    """
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    body = sum(parameter.numel() for parameter in model.get_decoder().layers.parameters())
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * head * pairs
    return 6.0 * body * tokens + 6.0 * config.vocab_size * config.hidden_size * logit_places + attention


def measure_machine(config: Config) -> dict[str, Any]:
    """What the recipe's device can do, with the recipe's number of threads."""
    device = device_of(config)
    torch.set_num_threads(config.train.threads or available_cores())
    dtypes = ["float32"]
    if device != "cpu" or precision.has_bf16_instructions():
        dtypes.append("bfloat16")
    return {
        "device": f"{device} ({torch.cuda.get_device_name(device)})" if device.startswith("cuda") else device,
        "processor": processor(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "matrix_peak_flops": {name: matrix_peak(precision.DTYPES[name], device) for name in dtypes},
        "read_bytes_per_second": read_bandwidth(device),
        "fastest_precision": precision.fastest(device),
    }


def measure_steps(config: Config, steps: int, told: Callable[[int], None] = lambda done: None) -> list[dict[str, Any]]:
    """The metrics of ``steps`` training steps after a first one that warms up; ``told`` hears the steps done.

    Memory and weights go on from step to step as in training; nothing is kept.
    """
    parts = assemble(resolved(config), ":memory:", with_learner=True)
    try:
        parts.pool.warm(parts.train_tasks[0])
        found = []
        for step in range(1, steps + 2):
            found.append(_measured_step(parts, step))
            told(step)
        return found[1:]
    finally:
        parts.close()


def _measured_step(parts: Parts, step: int) -> dict[str, Any]:
    sampler = parts.collector.sampler
    before = [getattr(sampler, name) for name in ("tokens_computed", "tokens_reused")]
    taken = take_step(parts, step, step)
    computed, reused = (
        getattr(sampler, name) - count for name, count in zip(("tokens_computed", "tokens_reused"), before, strict=True)
    )
    return {
        **metrics.of_collection(taken.groups, taken.returns),
        **metrics.of_update(taken.update),
        **metrics.of_time(parts.collector.counters, taken.watch.seconds),
        "sampler_tokens_computed": computed,
        "sampler_tokens_reused": reused,
    }
