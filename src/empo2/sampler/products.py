"""Attention of sampling in bfloat16 on a processor, out of large matrix products instead of torch's small tiles.

A whole row of scores is at hand, so nothing has to be joined by log-sum-exps. Each product is summed in float32 and
rounded to bfloat16, as transformers' eager attention has it.
"""

import torch
from torch import Tensor

ROWS = 512  #: queries at a time, of each key head: their scores then stay in the processor's cache


def attend_chunk(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """The last n of S tokens look at all up to themselves: q [H, n, D], k and v [H_kv, S, D] → [H, n, D]."""
    heads, own, dim = query.shape
    groups, past = heads // keys.shape[0], keys.shape[1] - own
    grouped = query.unflatten(0, (-1, groups))
    out = torch.empty_like(grouped)
    size = max(ROWS // groups, 1)
    for start in range(0, own, size):
        block, seen = slice(start, min(start + size, own)), past + min(start + size, own)
        scores = _scores(grouped[:, :, block].flatten(1, 2), keys[:, :seen].transpose(1, 2), scale)
        rows = block.stop - start
        later = torch.full((rows, rows), -torch.inf, dtype=scores.dtype).triu_(1)
        scores.unflatten(1, (groups, rows))[..., -rows:] += later
        out[:, :, block] = torch.bmm(scores.softmax(-1), values[:, :seen]).view(-1, groups, rows, dim)
    return out.flatten(0, 1)


def attend_batch(
    query: Tensor, shared: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], mask: Tensor, scale: float
) -> Tensor:
    """One token a row looks at a prefix that all rows share and at what its own row has: q [B, H, 1, D] → the same.

    ``shared``: keys and values [H_kv, P, D], P may be 0; ``own``: [B, H_kv, S, D]; ``mask`` [B, 1, 1, S] is added to
    the scores of the latter.
    """
    (batch, heads, _, dim), (key_heads, prefix, _), length = query.shape, shared[0].shape, own[0].shape[2]
    groups = heads // key_heads
    grouped = query.view(batch, key_heads, groups, dim)
    keys, values = (tensor.contiguous().flatten(0, 1) for tensor in own)
    scores = query.new_empty(batch, key_heads, groups, prefix + length)
    of_own = _scores(grouped.flatten(0, 1), keys.transpose(1, 2), scale)
    torch.add(of_own.view(batch, key_heads, groups, length), mask, out=scores[..., prefix:])
    if prefix:
        of_shared = _scores(grouped.transpose(0, 1).flatten(1, 2), shared[0].transpose(1, 2), scale)
        scores[..., :prefix] = of_shared.view(key_heads, batch, groups, prefix).transpose(0, 1)
    weights = scores.softmax(-1)
    out = torch.bmm(weights[..., prefix:].flatten(0, 1), values).view(batch, key_heads, groups, dim)
    if prefix:
        found = torch.bmm(weights[..., :prefix].transpose(0, 1).flatten(1, 2), shared[1])
        out += found.view(key_heads, batch, groups, dim).transpose(0, 1)
    return out.view(query.shape)


def _scores(left: Tensor, right: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(left.new_empty(1), left, right, beta=0, alpha=scale)
