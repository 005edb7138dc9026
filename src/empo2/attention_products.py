"""Attention in bfloat16 and its gradients out of large matrix products, on a processor.

torch's flash kernel computes its products in small tiles, at a fifth of the speed that oneDNN reaches with large ones.
Here they are large ones with a few passes over their results, in blocks of queries: forward 1.4 to 2.4 times as fast,
backward 1.4 to 3.4 (docs/log.md, 2026-11-29). In float32 it would be slower.

K key heads serve G query heads each: queries are [K, G, n, D], keys and values [K, m, D]. ``causal``: n = m, and a
query sees the keys up to its own place. Sampling, which has no gradients, is faster still (`sampler.products`).
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

CAUSAL_BLOCK, BLOCK = 128, 512  #: queries at a time, of each head: few where a block computes masked pairs, too
LOOKED_AT = 8  #: of so many keys one is looked at to find about how large a row's scores are
FAR = 1e6  #: sum of a row's exponentials for which all keys are looked at: some score is over 8 above those that were
MOST_CORRECTIONS = 3  #: of what is subtracted; one makes it exact but for scores of tens of thousands


def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The output, [K, G, n, D], and its log-sum-exp, [K, G, n], both in float32 or better.

    From a row's scores something near the largest is subtracted before the exponential. The first block of a causal
    look knows key 0 only, as no other is seen by all its queries.
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    out, log_sum = query.new_empty(query.shape, dtype=exact), query.new_empty(query.shape[:3], dtype=exact)
    widened = _widened(key)
    for block, seen in _blocks(query.shape[2], key.shape[1], causal):
        q, keys = query[:, :, block].flatten(1, 2), widened[:, :seen]
        seen_by_all = key[:, : block.start + 1 if causal else seen]
        near = _product(q, seen_by_all[:, ::LOOKED_AT], scale).amax(-1).to(exact)
        weights = _weights(q, near, keys, block, causal, scale)
        total = _sums(weights)
        for _ in range(MOST_CORRECTIONS):
            if float(total.min()) > 0 and float(total.max()) < FAR:
                break
            near += _hide(_less(q, near, keys, scale), block, causal).amax(-1)
            weights = _weights(q, near, keys, block, causal, scale)
            total = _sums(weights)
        found = torch.bmm(weights, value[:, :seen]) / total[..., None]
        out[:, :, block] = found.view(out[:, :, block].shape)
        log_sum[:, :, block] = (near + total.log()).view(log_sum[:, :, block].shape)
    return out, log_sum


def gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sum: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of queries, keys and values, each float32, from that of the output, [K, G, n, D].

    ``out`` [K, G, n, D] and ``log_sum`` [K, G, n], the log-sum-exps in float32, may be those of several looks joined.
    """
    of_query = torch.empty(query.shape, dtype=torch.float32)
    of_key, of_value = (torch.zeros(key.shape, dtype=torch.float32) for _ in range(2))
    keys, values = _widened(key), _widened(value)
    mean = (grad.float() * out).sum(-1)
    for block, seen in _blocks(query.shape[2], key.shape[1], causal):
        q, g = query[:, :, block].flatten(1, 2), grad[:, :, block].flatten(1, 2)
        weights = _weights(q, log_sum[:, :, block].flatten(1), keys[:, :seen], block, causal, scale)
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


def _weights(q: Tensor, subtracted: Tensor, keys: Tensor, block: slice, causal: bool, scale: float) -> Tensor:
    """exp(score − ``subtracted``) of a block's queries [K, G · n, D] at widened keys [K, m, D + 2], [K, G · n, m]."""
    return _hide(_less(q, subtracted, keys, scale), block, causal).exp_()


def _hide(scores: Tensor, block: slice, causal: bool) -> Tensor:
    if causal:
        rows = block.stop - block.start
        scores.unflatten(1, (-1, rows))[..., -rows:] += _later(rows, scores.dtype)
    return scores


def _sums(weights: Tensor) -> Tensor:
    """Of each row. torch adds up in float32 but rounds what it returns to bfloat16: so it is asked for 32 parts."""
    exact, parts = torch.promote_types(weights.dtype, torch.float32), weights.shape[-1] // 32 * 32
    rest = weights[..., parts:].sum(-1).to(exact)
    return rest + weights[..., :parts].unflatten(-1, (32, -1)).sum(-1).sum(-1, dtype=exact)


def _widened(right: Tensor) -> Tensor:
    """[K, m, D] → [K, m, D + 2]: two columns of ones for `_less`."""
    return torch.cat([right, right.new_ones(*right.shape[:2], 2)], dim=-1)


def _less(left: Tensor, subtracted: Tensor, widened: Tensor, scale: float) -> Tensor:
    """left · rightᵀ · scale − ``subtracted`` of each row, [K, n, D] and [K, m, D + 2] → [K, n, m].

    A product is summed in float32, but its result is rounded to the eight bits of bfloat16: of a score of 30 that
    leaves ±0.06. So what is subtracted is part of the product, in two more columns, as its high and its low bits: what
    is rounded is then the smaller, the nearer it is to the score of a pair that weighs much.
    """
    subtracted = subtracted / scale
    high = subtracted.to(left.dtype)
    low = (subtracted - high).to(left.dtype)
    return _product(torch.cat([left, -torch.stack([high, low], dim=-1)], dim=-1), widened, scale)


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(left.new_empty(1), left, right.transpose(1, 2), beta=0, alpha=scale)


@lru_cache(maxsize=CAUSAL_BLOCK)
def _later(rows: int, dtype: torch.dtype) -> Tensor:
    """Added to a block's scores of its own keys: −∞ where the key comes after the query."""
    return torch.full((rows, rows), -torch.inf, dtype=dtype).triu(1)
