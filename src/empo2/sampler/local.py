"""Sampling in this process, with prefixes reused across turns and across the episodes of a group.

Each slot (live episode) has a row of a preallocated KV cache and the ids that are in it. A request's prompt is compared
with its own slot and with the others; the longest common prefix is kept or copied, the rest is computed. All rows lie
end to end in one forward pass, so nothing is padded and a finished episode cannot be seen by another.
"""

import math
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from empo2 import streams
from empo2.attention import in_few_calls
from empo2.errors import TrainingDiverged
from empo2.sampler.packed import can_pack, load_packed, pack_linears
from empo2.sampler.products import attend_batch, attend_chunk
from empo2.sequences import common_prefix
from empo2.types import Completion, SampleRequest, SamplingParams, TokenIds

WORTH_SHARING = 64  #: tokens of a common prefix that are attended to in one call for all rows
MOST_SPREAD = 2  #: rows of the cache that are looked at for each one that is needed, so that none is copied
MOST_PADDED = 4096  #: tokens, padding included, of a batch of chunks that have several each
WORTH_COPYING = 16  #: tokens by which another slot's prefix must be longer than the own one


@dataclass(frozen=True)
class _Chunk:
    """Tokens ``start`` to ``stop`` of a forward pass belong to ``slot``, after ``past`` tokens in its cache."""

    slot: int
    start: int
    stop: int
    past: int


class _KVCache:
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

    @torch.inference_mode()
    def clear(self) -> None:
        """Zero everything: masked positions are multiplied by 0, and 0 · NaN of diverged weights would be NaN."""
        for tensor in (*self.keys, *self.values):
            tensor[:, :, : self._length].zero_()

    def copy(self, source: int, target: int, start: int, stop: int) -> None:
        for tensor in (*self.keys, *self.values):
            tensor[target, :, start:stop] = tensor[source, :, start:stop]


def _untouched(size: int, dtype: torch.dtype) -> Tensor:
    """Zeros [size] that take no memory before they are written to."""
    return torch.frombuffer(mmap.mmap(-1, size * dtype.itemsize), dtype=dtype)


class _Gathered:
    """What some slots have from token ``start`` to ``stop``, copied to lie end to end for all tokens that are sampled.

    A large product copies an operand that does not, and would do so for each token: a third of a decoding step.
    """

    def __init__(self, cache: _KVCache) -> None:
        self._cache = cache
        self._memory = [torch.zeros(0, dtype=cache.keys[0].dtype) for _ in (*cache.keys, *cache.values)]
        self.keys: list[Tensor] = []  #: per layer [slots, H_kv, stop − start, D]
        self.values: list[Tensor] = []

    def gather(self, slots: Sequence[int], start: int, stop: int) -> None:
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


class _AttendCache:
    """Writes a pass's keys and values into the cache, and lets each chunk see its own slot only.

    The first ``shared`` tokens are the same in all the chunks' slots: all tokens of the pass look at them in one call,
    then each chunk at the rest of its own slot, and the two results are joined by their log-sum-exps. The chunks are
    a batch if they have one token each, and, where calls are dear, up to ``MOST_PADDED`` tokens. ``gathered``, if
    given, begins after ``shared`` and has all the slots.
    """

    def __init__(
        self,
        cache: _KVCache,
        chunks: Sequence[_Chunk],
        shared: int,
        device: torch.device,
        gathered: _Gathered | None = None,
    ) -> None:
        self._cache, self._chunks, self._shared, self._copy = cache, chunks, shared, gathered
        self.longest = max(c.past + c.stop - c.start for c in chunks)
        sizes = [chunk.stop - chunk.start for chunk in chunks]
        self._width = max(sizes)
        self._batched = self._width == 1 or (in_few_calls(device) and self._width * len(chunks) <= MOST_PADDED)
        dtype = cache.keys[0].dtype
        self._by_products = _by_products(dtype, device)
        if self._batched:
            end = gathered.stop if gathered else self.longest
            rows = [gathered.row[chunk.slot] if gathered else chunk.slot for chunk in chunks]
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
            self._copied = torch.tensor(rows) if gathered else None
        elif not self._by_products:
            self._masks = [_additive(~_seen(chunk, shared, device), dtype) for chunk in chunks]

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        self._write(keys, key)
        self._write(values, value)
        if self._copy:
            for copy, new in ((self._copy.keys[layer], key), (self._copy.values[layer], value)):
                copy[self._copied, :, self._place - self._shared] = new[0].transpose(0, 1)
        if self._by_products:
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
            return self._gathered(out), self._gathered(weight)
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
            return self._gathered(attend_batch(self._spread(query), shared, own, self._masks[0], scale))
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

    def _gathered(self, found: Tensor) -> Tensor:
        """Of rows of slots [B, H, width, …] → [1, H, N, …]."""
        if self._one_each:
            return found.transpose(0, 2)
        return found[self._member, :, self._row].transpose(0, 1)[None]


def _by_products(dtype: torch.dtype, device: torch.device) -> bool:
    return dtype == torch.bfloat16 and not in_few_calls(device)


def _rows_of(slots: Sequence[int], device: torch.device) -> tuple[slice | Tensor, list[int]]:
    """What to take of a cache to have these slots, and where each then is.

    Slots that lie close together are a view, with some rows too many; picking rows would copy them.
    """
    first, last = min(slots), max(slots)
    if last - first < MOST_SPREAD * len(slots):
        return slice(first, last + 1), [slot - first for slot in slots]
    return torch.tensor(slots, device=device), list(range(len(slots)))


def _seen(chunk: _Chunk, shared: int, device: torch.device) -> Tensor:
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


class LocalSampler:
    """A sampling copy of the policy in this process. ``model`` uses `attention.NAME` and is owned by the sampler."""

    def __init__(self, model: Any, tokenizer: Any, stop_ids: frozenset[int], num_slots: int) -> None:
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
        self._cache = _KVCache(model.config, num_slots, dtype, self._device)
        self._packed = pack_linears(model) if can_pack(dtype, self._device) else []
        self._cached: list[TokenIds] = [()] * num_slots
        self._gathered = _Gathered(self._cache) if _by_products(dtype, self._device) else None
        self.version = 0
        self.tokens_computed = 0  #: tokens that went through the model
        self.tokens_reused = 0  #: prompt tokens taken from the cache

    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Take over the learner's weights; everything cached belongs to the old ones and is dropped."""
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                parameter.copy_(weights[name])
        load_packed(self._packed, weights)
        self._cache.clear()
        self.forget()
        self.version = version

    def forget(self) -> None:
        """Drop all cached prefixes, so that what is sampled next cannot depend on what was sampled before."""
        self._cached = [()] * len(self._cached)

    @torch.inference_mode()
    def sample(self, requests: Sequence[SampleRequest], params: SamplingParams) -> list[Completion]:
        """Continue each prompt until a stop id or ``params.max_tokens``. Two requests must not share a slot."""
        if not requests:
            return []
        self._cache.reserve(max(len(request.prompt) for request in requests) + params.max_tokens)
        logits = self._prefill(requests)
        if self._gathered:
            slots = [request.slot for request in requests]
            stop = max(len(request.prompt) for request in requests) + params.max_tokens
            self._gathered.gather(slots, self._common(slots), stop)
        ids: list[list[int]] = [[] for _ in requests]
        logprobs: list[list[float]] = [[] for _ in requests]
        live = list(range(len(requests)))
        for index in range(params.max_tokens):
            drawn = [
                streams.uniform(params.seed, params.purpose, *requests[row].stream, index)
                if params.temperature
                else 0.0
                for row in live
            ]
            for row, token, logprob in zip(live, *draw(logits, params.temperature, drawn), strict=True):
                ids[row].append(token)
                logprobs[row].append(logprob)
            live = [row for row in live if ids[row][-1] not in self._stop_ids]
            if not live or index + 1 == params.max_tokens:
                break
            logits = self._forward([(requests[row].slot, (ids[row][-1],)) for row in live], self._gathered)
        return [
            Completion(
                token_ids=tuple(tokens),
                logprobs=tuple(values),
                text=self._text(tokens),
                truncated=tokens[-1] not in self._stop_ids,
            )
            for tokens, values in zip(ids, logprobs, strict=True)
        ]

    def _text(self, tokens: list[int]) -> str:
        said = tokens[:-1] if tokens[-1] in self._stop_ids else tokens
        return str(self._tokenizer.decode(said, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _prefill(self, requests: Sequence[SampleRequest]) -> Tensor:
        """Bring every prompt into the cache; logits after its last token, [B, V].

        Of requests that share a prefix no slot holds yet, the first computes it and the others copy it.
        """
        logits: list[Tensor | None] = [None] * len(requests)
        waiting = list(range(len(requests)))
        while waiting:
            now: list[int] = []
            later: list[int] = []
            for row in waiting:
                prompt = requests[row].prompt
                held = max(common_prefix(ids, prompt) for ids in self._cached)
                shared = max((common_prefix(requests[other].prompt, prompt) for other in now), default=0)
                (later if shared > held + WORTH_COPYING else now).append(row)
            for row in now:
                self._reuse(requests[row])
            computed = self._forward(
                [(requests[row].slot, requests[row].prompt[len(self._cached[requests[row].slot]) :]) for row in now]
            )
            for row, row_logits in zip(now, computed, strict=True):
                logits[row] = row_logits
            waiting = later
        return torch.stack([row_logits for row_logits in logits if row_logits is not None])

    def _reuse(self, request: SampleRequest) -> None:
        """Leave in the request's slot the longest prefix of its prompt (less one token) that any slot holds."""
        most = len(request.prompt) - 1
        own = min(common_prefix(self._cached[request.slot], request.prompt), most)
        lengths = [min(common_prefix(ids, request.prompt), most) for ids in self._cached]
        best = max(range(len(lengths)), key=lambda slot: lengths[slot])
        if lengths[best] > own + WORTH_COPYING:
            self._cache.copy(best, request.slot, own, lengths[best])
            own = lengths[best]
        self._cached[request.slot] = request.prompt[:own]
        self.tokens_reused += own

    def _forward(self, parts: Sequence[tuple[int, TokenIds]], gathered: _Gathered | None = None) -> Tensor:
        """Append ids to slots; logits after each part's last id, [len(parts), V], float32."""
        shared = gathered.start if gathered else self._common([slot for slot, _ in parts])
        chunks: list[_Chunk] = []
        ids: list[int] = []
        positions: list[int] = []
        for slot, new in parts:
            past = len(self._cached[slot])
            chunks.append(_Chunk(slot, len(ids), len(ids) + len(new), past))
            ids += new
            positions += range(past, past + len(new))
            self._cached[slot] += new
        self.tokens_computed += len(ids)
        out = self._model(
            input_ids=torch.tensor([ids], device=self._device),
            position_ids=torch.tensor([positions], device=self._device),
            use_cache=False,
            attend=_AttendCache(self._cache, chunks, shared, self._device, gathered),
            logits_to_keep=torch.tensor([chunk.stop - 1 for chunk in chunks], device=self._device),
        )
        logits: Tensor = out.logits[0].float()
        return logits

    def _common(self, slots: Sequence[int]) -> int:
        """Length of the prefix that all these slots hold already; 0 where it is not worth a call of its own."""
        if len(slots) < 2:
            return 0
        first = self._cached[slots[0]]
        shared = min(common_prefix(first, self._cached[slot]) for slot in slots[1:])
        return shared if shared >= WORTH_SHARING else 0


def draw(logits: Tensor, temperature: float, uniforms: Sequence[float]) -> tuple[list[int], list[float]]:
    """One token a row from softmax(logits / temperature), by inverse CDF in vocabulary order; ids [B], log-probs [B].

    Temperature 0 takes the most probable token, with its log-prob at temperature 1. Raises TrainingDiverged for logits
    that are NaN or infinite.
    """
    scaled = logits.to(torch.float64, copy=True).div_(temperature or 1.0)
    largest = scaled.amax(-1, keepdim=True)
    cumulative = scaled.sub_(largest).exp_().cumsum_(-1)
    total = cumulative[:, -1:]
    if temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)  # of the logits: as log-probs, close ones become equal
    else:
        points = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None] * total
        tokens = torch.searchsorted(cumulative, points, right=True).clamp(max=logits.shape[-1] - 1)
    chosen = (logits.gather(-1, tokens).double() / (temperature or 1.0) - largest - total.log())[:, 0].tolist()
    if not all(map(math.isfinite, chosen)):
        raise TrainingDiverged(
            "the policy's logits hold NaN or infinity, so nothing can be sampled; go on from an earlier checkpoint "
            "with a lower learner.lr, or set model.sampler_dtype to float32"
        )
    return tokens[:, 0].tolist(), chosen
