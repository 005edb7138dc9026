"""The keys and values that sampling keeps: a row for each slot (live episode), and copies that lie end to end."""

import math
import mmap
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every slot: per layer [slots, H_kv, capacity, D]; grows as episodes do.

    On a processor there is room for twice the length asked for, as memory is taken only for what is written.
    """

    def __init__(self, config: Any, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        heads = config.num_key_value_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._shape = (num_slots, heads, 0, dim)
        self._dtype, self._device = dtype, device
        self._length = 0
        self.keys = [self._zeros(0) for _ in range(config.num_hidden_layers)]
        self.values = [self._zeros(0) for _ in range(config.num_hidden_layers)]

    def _zeros(self, capacity: int) -> Tensor:
        slots, heads, _, dim = self._shape
        shape = slots, heads, capacity, dim
        if self._device.type != "cpu" or not capacity:
            return torch.zeros(shape, dtype=self._dtype, device=self._device)
        return _untouched(math.prod(shape), self._dtype).view(shape)

    def reserve(self, length: int) -> None:
        before, self._length = self._length, max(length, self._length)
        capacity = self.keys[0].shape[2]
        if length <= capacity:
            return
        capacity = 2 * length if self._device.type == "cpu" else max(length, capacity + 512)
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = self._zeros(capacity)
                tensors[layer][:, :, :before] = tensor[:, :, :before]

    def release(self) -> None:
        """Give the memory back. What comes next starts from zeros, never from keys of weights that diverged to NaN."""
        self._length = 0
        self.keys = [self._zeros(0) for _ in self.keys]
        self.values = [self._zeros(0) for _ in self.values]

    def copy(self, source: int, target: int, start: int, stop: int) -> None:
        for tensor in (*self.keys, *self.values):
            tensor[target, :, start:stop] = tensor[source, :, start:stop]


class Compacted:
    """What some slots have from token ``start`` to ``stop``, copied to lie end to end for all tokens that are sampled.

    A large product copies an operand that does not, and would do so for each token: a third of a decoding step.
    """

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self.release()

    def release(self) -> None:
        """Give the memory back."""
        cached = (*self._cache.keys, *self._cache.values)
        self._memory = [torch.zeros(0, dtype=tensor.dtype) for tensor in cached]
        self.keys: list[Tensor] = []  #: per layer [slots, H_kv, stop − start, D]
        self.values: list[Tensor] = []

    def fill(self, slots: Sequence[int], start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        self.row = {slot: row for row, slot in enumerate(slots)}
        picked = torch.tensor(slots)
        _, heads, _, dim = self._cache.keys[0].shape
        shape = len(slots), heads, stop - start, dim
        copies = []
        for place, cached in enumerate((*self._cache.keys, *self._cache.values)):
            if self._memory[place].numel() < math.prod(shape):
                self._memory[place] = _untouched(2 * math.prod(shape), cached.dtype)
            copies.append(self._memory[place][: math.prod(shape)].view(shape))
            torch.index_select(cached[:, :, start:stop], 0, picked, out=copies[-1])
        self.keys, self.values = copies[: len(copies) // 2], copies[len(copies) // 2 :]


def _untouched(size: int, dtype: torch.dtype) -> Tensor:
    """Zeros [size] that take no memory before they are written to."""
    return torch.frombuffer(mmap.mmap(-1, size * dtype.itemsize), dtype=dtype)
