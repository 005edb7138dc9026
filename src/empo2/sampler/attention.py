"""Attention of sampling: each token looks at its own slot of the cache, and at a shared prefix in one call for all."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from empo2.attention import in_few_calls
from empo2.sampler.cache import Compacted, KVCache
from empo2.sampler.products import attend_batch, attend_chunk

MOST_SPREAD = 2  #: rows of the cache that are looked at for each one that is needed, so that none is copied
MOST_PADDED = 4096  #: tokens, padding included, of a batch of chunks that have several each


@dataclass(frozen=True)
class Chunk:
    """Tokens ``start`` to ``stop`` of a forward pass belong to ``slot``, after ``past`` tokens in its cache."""

    slot: int
    start: int
    stop: int
    past: int


class AttendCache:
    """Writes a pass's keys and values into the cache, and lets each chunk see its own slot only.

    The first ``shared`` tokens are the same in all the chunks' slots: all tokens of the pass look at them in one call,
    then each chunk at the rest of its own slot, and the two results are joined by their log-sum-exps. The chunks are
    a batch if they have one token each, and, where calls are dear, up to ``MOST_PADDED`` tokens. ``compacted``, if
    given, begins after ``shared`` and has all the slots.
    """

    def __init__(
        self,
        cache: KVCache,
        chunks: Sequence[Chunk],
        shared: int,
        device: torch.device,
        compacted: Compacted | None = None,
    ) -> None:
        self._cache, self._chunks, self._shared, self._copy = cache, chunks, shared, compacted
        self.longest = max(c.past + c.stop - c.start for c in chunks)
        sizes = [chunk.stop - chunk.start for chunk in chunks]
        self._width = max(sizes)
        self._batched = self._width == 1 or (in_few_calls(device) and self._width * len(chunks) <= MOST_PADDED)
        dtype = cache.keys[0].dtype
        self._in_products = uses_products(dtype, device)
        if self._batched:
            end = compacted.stop if compacted else self.longest
            rows = [compacted.row[chunk.slot] if compacted else chunk.slot for chunk in chunks]
            self._slots, members = _rows_of(rows, device)
            self._num_rows = max(members) + 1
            self._one_each = self._width == 1 and members == list(range(self._num_rows))
            seen = torch.full((self._num_rows, self._width), end)
            for member, chunk, size in zip(members, chunks, sizes, strict=True):
                seen[member] = chunk.past + torch.arange(self._width).clamp(max=size - 1)
            seen = seen.to(device)
            self._masks = [_additive(torch.arange(shared, end, device=device) > seen[:, None, :, None], dtype)]
            pairs = zip(members, chunks, sizes, strict=True)
            places = [(member, row, chunk.slot) for member, chunk, size in pairs for row in range(size)]
            self._member, self._row, self._slot = torch.tensor(places, device=device).unbind(1)
            self._place = seen[self._member, self._row]
            self._copied = torch.tensor(rows) if compacted else None
        elif not self._in_products:
            self._masks = [_additive(~_seen(chunk, shared, device), dtype) for chunk in chunks]

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        self._write(keys, key)
        self._write(values, value)
        if self._copy:
            for copy, new in ((self._copy.keys[layer], key), (self._copy.values[layer], value)):
                copy[self._copied, :, self._place - self._shared] = new[0].transpose(0, 1)
        if self._in_products:
            return self._large_products(layer, query, scale)
        out, weight = self._rests(query, keys, values, scale)
        if not self._shared:
            return out
        slot = self._chunks[0].slot
        first, first_weight = _attend(
            query, keys[None, slot, :, : self._shared], values[None, slot, :, : self._shared], None, scale
        )
        share = torch.sigmoid(first_weight - weight)[..., None].to(out.dtype)
        return torch.lerp(out, first, share)

    def _write(self, cached: Tensor, new: Tensor) -> None:
        if self._batched:
            cached[self._slot, :, self._place] = new[0].transpose(0, 1)
            return
        for chunk in self._chunks:
            end = chunk.past + chunk.stop - chunk.start
            cached[chunk.slot, :, chunk.past : end] = new[0, :, chunk.start : chunk.stop]

    def _rests(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Attention to what follows the shared prefix: output [1, H, N, D], log-sum-exp [1, H, N]."""
        start = self._shared
        if self._batched:
            rows = keys[self._slots, :, start : self.longest], values[self._slots, :, start : self.longest]
            out, weight = _attend(self._spread(query), *rows, self._masks[0], scale)
            return self._in_order(out), self._in_order(weight)
        parts = []
        for chunk, mask in zip(self._chunks, self._masks, strict=True):
            seen = slice(start, chunk.past + chunk.stop - chunk.start)
            rows = keys[None, chunk.slot, :, seen], values[None, chunk.slot, :, seen]
            parts.append(_attend(query[:, :, chunk.start : chunk.stop], *rows, mask, scale))
        return torch.cat([out for out, _ in parts], dim=2), torch.cat([weight for _, weight in parts], dim=2)

    def _large_products(self, layer: int, query: Tensor, scale: float) -> Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        if self._batched:
            slot, seen = self._chunks[0].slot, slice(self._shared, self.longest)
            shared = keys[slot, :, : self._shared], values[slot, :, : self._shared]
            if self._copy:
                own = self._copy.keys[layer][self._slots], self._copy.values[layer][self._slots]
            else:
                own = keys[self._slots, :, seen], values[self._slots, :, seen]
            return self._in_order(attend_batch(self._spread(query), shared, own, self._masks[0], scale))
        parts = []
        for chunk in self._chunks:
            end = chunk.past + chunk.stop - chunk.start
            tokens = query[0, :, chunk.start : chunk.stop]
            parts.append(attend_chunk(tokens, keys[chunk.slot, :, :end], values[chunk.slot, :, :end], scale))
        return torch.cat(parts, dim=1)[None]

    def _spread(self, query: Tensor) -> Tensor:
        """[1, H, N, D] → rows of slots [B, H, width, D], padded with zeros."""
        if self._one_each:
            return query.transpose(0, 2)
        spread = query.new_zeros(self._num_rows, query.shape[1], self._width, query.shape[3])
        spread[self._member, :, self._row] = query[0].transpose(0, 1)
        return spread

    def _in_order(self, found: Tensor) -> Tensor:
        """Of rows of slots [B, H, width, …] → [1, H, N, …]."""
        if self._one_each:
            return found.transpose(0, 2)
        return found[self._member, :, self._row].transpose(0, 1)[None]


def uses_products(dtype: torch.dtype, device: torch.device) -> bool:
    return dtype == torch.bfloat16 and not in_few_calls(device)


def _rows_of(slots: Sequence[int], device: torch.device) -> tuple[slice | Tensor, list[int]]:
    """What to take of a cache to have these slots, and where each then is.

    Slots that lie close together are a view, with some rows too many; picking rows would copy them.
    """
    first, last = min(slots), max(slots)
    if last - first < MOST_SPREAD * len(slots):
        return slice(first, last + 1), [slot - first for slot in slots]
    return torch.tensor(slots, device=device), list(range(len(slots)))


def _seen(chunk: Chunk, shared: int, device: torch.device) -> Tensor:
    """True where a new token of the chunk may look, [1, 1, new, past − shared + new]."""
    own = chunk.stop - chunk.start
    mask = torch.ones(own, chunk.past - shared + own, dtype=torch.bool, device=device).tril_(chunk.past - shared)
    return mask[None, None]


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of q [B, H, N, D] to k, v [B, H_kv, S, D]: output like q, and its log-sum-exp [B, H, N], float32.

    The heads that share keys take the place of further query positions, so keys are never repeated. ``mask``: [B, 1,
    N, S] (N or B may be 1), added to the scores.
    """
    batch, heads, tokens, dim = q.shape
    groups = k.shape[1]
    grouped = q.reshape(batch, groups, heads // groups * tokens, dim)
    if mask is not None:
        mask = mask.repeat(1, 1, heads // groups, 1)
    out, weight = (_flash_cpu if q.device.type == "cpu" else _plain_attention)(grouped, k, v, mask, scale)
    return out.reshape(batch, heads, tokens, dim), weight.reshape(batch, heads, tokens).float()


def _flash_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    out, weight = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)
    return out, weight


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    scores = (q @ k.transpose(-1, -2)).float() * scale
    scores = scores if mask is None else scores + mask
    weight = scores.logsumexp(-1)
    return torch.exp(scores - weight[..., None]).to(v.dtype) @ v, weight
