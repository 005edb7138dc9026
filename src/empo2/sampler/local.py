"""Sampling in this process, with prefixes reused across turns and across the episodes of a group.

Each slot (live episode) has a row of a preallocated KV cache and the ids that are in it. A request's prompt is compared
with its own slot and with the others; the longest common prefix is kept or copied, the rest is computed. All rows lie
end to end in one forward pass, so nothing is padded and a finished episode cannot be seen by another.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from empo2 import streams
from empo2.attention import causal_mask
from empo2.sequences import common_prefix
from empo2.types import Completion, SampleRequest, SamplingParams, TokenIds

WORTH_COPYING = 16  #: tokens by which another slot's prefix must be longer than the own one


@dataclass(frozen=True)
class _Chunk:
    """Tokens ``start`` to ``stop`` of a forward pass belong to ``slot``, after ``past`` tokens in its cache."""

    slot: int
    start: int
    stop: int
    past: int


class _KVCache:
    """Keys and values of every slot: per layer [slots, H_kv, capacity, D]; grows as episodes do."""

    def __init__(self, config: Any, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        heads = config.num_key_value_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._shape = (num_slots, heads, 0, dim)
        self._options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.keys = [torch.zeros(self._shape, **self._options) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(self._shape, **self._options) for _ in range(config.num_hidden_layers)]

    def reserve(self, length: int) -> None:
        slots, heads, capacity, dim = self.keys[0].shape
        if length <= capacity:
            return
        more = torch.Size((slots, heads, max(length, capacity + 512) - capacity, dim))
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = torch.cat([tensor, torch.zeros(more, **self._options)], dim=2)

    def copy(self, source: int, target: int, start: int, stop: int) -> None:
        for tensor in (*self.keys, *self.values):
            tensor[target, :, start:stop] = tensor[source, :, start:stop]


class _AttendCache:
    """Writes a pass's keys and values into the cache, and lets each chunk see its own slot only."""

    def __init__(self, cache: _KVCache, chunks: Sequence[_Chunk], device: torch.device) -> None:
        self._cache, self._chunks = cache, chunks
        self.longest = max(c.past + c.stop - c.start for c in chunks)
        self._masks = [causal_mask(c.stop - c.start, c.past, device) if c.stop - c.start > 1 else None for c in chunks]

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        parts = []
        for chunk, mask in zip(self._chunks, self._masks, strict=True):
            own, end = slice(chunk.start, chunk.stop), chunk.past + chunk.stop - chunk.start
            keys[chunk.slot, :, chunk.past : end] = key[0, :, own]
            values[chunk.slot, :, chunk.past : end] = value[0, :, own]
            seen_keys, seen_values = keys[None, chunk.slot, :, :end], values[None, chunk.slot, :, :end]
            q = query[:, :, own]
            if q.shape[2] == 1:  # one new token: the heads of a group take the place of query positions
                q = q.reshape(1, seen_keys.shape[1], -1, q.shape[-1])
                out = F.scaled_dot_product_attention(q, seen_keys, seen_values, scale=scale)
                out = out.reshape(1, query.shape[1], 1, -1)
            else:
                out = F.scaled_dot_product_attention(
                    q, seen_keys, seen_values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
                )
            parts.append(out)
        return torch.cat(parts, dim=2)


class LocalSampler:
    """A sampling copy of the policy in this process. ``model`` uses `attention.NAME` and is owned by the sampler."""

    def __init__(self, model: Any, tokenizer: Any, stop_ids: frozenset[int], num_slots: int) -> None:
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._device = next(model.parameters()).device
        self._cache = _KVCache(model.config, num_slots, next(model.parameters()).dtype, self._device)
        self._cached: list[TokenIds] = [()] * num_slots
        self.version = 0
        self.tokens_computed = 0  #: tokens that went through the model
        self.tokens_reused = 0  #: prompt tokens taken from the cache

    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Take over the learner's weights; everything cached belongs to the old ones and is dropped."""
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                parameter.copy_(weights[name])
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
            logits = self._forward([(requests[row].slot, (ids[row][-1],)) for row in live])
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

    def _forward(self, parts: Sequence[tuple[int, TokenIds]]) -> Tensor:
        """Append ids to slots; logits after each part's last id, [len(parts), V], float32."""
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
            attend=_AttendCache(self._cache, chunks, self._device),
            logits_to_keep=torch.tensor([chunk.stop - 1 for chunk in chunks], device=self._device),
        )
        logits: Tensor = out.logits[0].float()
        return logits


def draw(logits: Tensor, temperature: float, uniforms: Sequence[float]) -> tuple[list[int], list[float]]:
    """One token a row from softmax(logits / temperature), by inverse CDF in vocabulary order; ids [B], log-probs [B].

    Temperature 0 takes the most probable token, with its log-prob at temperature 1.
    """
    logprobs = torch.log_softmax(logits.double() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        tokens = logprobs.argmax(-1)
    else:
        cumulative = logprobs.exp().cumsum(-1)
        points = torch.tensor(uniforms, dtype=torch.float64, device=logits.device) * cumulative[:, -1]
        tokens = torch.searchsorted(cumulative, points[:, None], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    chosen = logprobs.gather(-1, tokens[:, None])[:, 0]
    return tokens.tolist(), chosen.tolist()
