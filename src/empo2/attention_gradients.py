"""Gradients of attention in bfloat16 out of large matrix products, on a processor.

torch's flash kernel computes its products in small tiles, backward at a fifth of the speed that oneDNN reaches with
large ones. Here they are large ones with a few passes over their results, in blocks of queries: 1.4 to 3.4 times as
fast (docs/log.md, 2026-11-29). In float32 it would be slower, and forward it gains little.
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

CAUSAL_BLOCK, BLOCK = 128, 512  #: queries at a time, of each head: few where a block computes masked pairs, too


def gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, weight: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of q [K, G, n, D], k and v [K, m, D], each float32, from that of the output, [K, G, n, D].

    K key heads serve G query heads each. ``out`` [K, G, n, D] and ``weight`` [K, G, n], the log-sum-exps in float32,
    may be those of several looks joined. ``causal``: n = m, and a query sees the keys up to its own place.
    """
    of_query = torch.empty(query.shape, dtype=torch.float32)
    of_key, of_value = (torch.zeros(key.shape, dtype=torch.float32) for _ in range(2))
    keys, values = _widened(key), _widened(value)
    mean = (grad.float() * out).sum(-1)
    for block, seen in _blocks(query.shape[2], key.shape[1], causal):
        q, g = query[:, :, block].flatten(1, 2), grad[:, :, block].flatten(1, 2)
        weights = _less(q, weight[:, :, block].flatten(1), keys[:, :seen], scale)
        if causal:
            rows = block.stop - block.start
            weights.unflatten(1, (query.shape[1], rows))[..., block.start :] += _hidden()[:rows, :rows]
        weights.exp_()
        of_value[:, :seen] += torch.bmm(weights.transpose(1, 2), g)
        of_scores = _less(g, mean[:, :, block].flatten(1), values[:, :seen], 1.0).mul_(weights)
        of_query[:, :, block] = torch.bmm(of_scores, key[:, :seen]).view(of_query[:, :, block].shape)
        of_key[:, :seen] += torch.bmm(of_scores.transpose(1, 2), q)
    return of_query.mul_(scale), of_key.mul_(scale), of_value


def _blocks(queries: int, keys: int, causal: bool) -> Iterator[tuple[slice, int]]:
    """Queries at a time, and how many keys the last of them sees."""
    size = CAUSAL_BLOCK if causal else BLOCK
    for start in range(0, queries, size):
        stop = min(start + size, queries)
        yield slice(start, stop), stop if causal else keys


def _widened(right: Tensor) -> Tensor:
    """[K, m, D] → [K, m, D + 2]: two columns of ones for `_less`."""
    return torch.cat([right, right.new_ones(*right.shape[:2], 2)], dim=-1)


def _less(left: Tensor, subtracted: Tensor, widened: Tensor, scale: float) -> Tensor:
    """left · rightᵀ · scale − ``subtracted`` of each row, [K, n, D] and [K, m, D + 2] → [K, n, m].

    A product is summed in float32, but its result is rounded to the eight bits of bfloat16: of a score of 30 that
    leaves ±0.06. So what is subtracted is part of the product, in two more columns, as its high and its low bits: what
    is rounded is then small where the pair weighs much.
    """
    subtracted = subtracted / scale
    high = subtracted.to(left.dtype)
    low = (subtracted - high).to(left.dtype)
    left = torch.cat([left, -torch.stack([high, low], dim=-1)], dim=-1)
    return torch.baddbmm(left.new_empty(1), left, widened.transpose(1, 2), beta=0, alpha=scale)


@cache
def _hidden() -> Tensor:
    """Added to a block's scores of its own keys: −∞ where the key comes after the query."""
    return torch.full((CAUSAL_BLOCK, CAUSAL_BLOCK), -torch.inf, dtype=torch.bfloat16).triu(1)
