"""Sampling in this process, with prefixes reused across turns and across the episodes of a group.

Each slot (live episode) has a row of a preallocated KV cache and the ids that are in it. A request's prompt is compared
with its own slot and with the others; the longest common prefix is kept or copied, the rest is computed. All rows lie
end to end in one forward pass, so nothing is padded and a finished episode cannot be seen by another.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from empo2 import streams
from empo2.errors import TrainingDiverged
from empo2.sampler.attention import AttendCache, Chunk, uses_products
from empo2.sampler.cache import Compacted, KVCache
from empo2.sampler.packed import can_pack, load_packed, pack_linears
from empo2.sequences import common_prefix
from empo2.types import Completion, SampleRequest, SamplingParams, TokenIds

WORTH_SHARING = 64  #: tokens of a common prefix that are attended to in one call for all rows
WORTH_COPYING = 16  #: tokens by which another slot's prefix must be longer than the own one


class LocalSampler:
    """A sampling copy of the policy in this process. ``model``: with `empo2.attention.NAME`, owned by the sampler."""

    def __init__(self, model: Any, tokenizer: Any, stop_ids: frozenset[int], num_slots: int) -> None:
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
        self._cache = KVCache(model.config, num_slots, dtype, self._device)
        self._packed = pack_linears(model) if can_pack(dtype, self._device) else []
        self._cached: list[TokenIds] = [()] * num_slots
        self._compacted = Compacted(self._cache) if uses_products(dtype, self._device) else None
        self.version = 0
        self.tokens_computed = 0  #: tokens that went through the model
        self.tokens_reused = 0  #: prompt tokens taken from the cache

    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Take over the learner's weights; everything cached belongs to the old ones and is dropped."""
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                parameter.copy_(weights[name])
        load_packed(self._packed, weights)
        self.forget()
        self.version = version

    def forget(self) -> None:
        """Drop all cached prefixes and their memory: what is sampled next depends on nothing sampled before."""
        self._cached = [()] * len(self._cached)
        self._cache.release()
        if self._compacted:
            self._compacted.release()

    @torch.inference_mode()
    def sample(self, requests: Sequence[SampleRequest], params: SamplingParams) -> list[Completion]:
        """Continue each prompt until a stop id or ``params.max_tokens``. Two requests must not share a slot."""
        if not requests:
            return []
        self._cache.reserve(max(len(request.prompt) for request in requests) + params.max_tokens)
        logits = self._prefill(requests)
        if self._compacted:
            slots = [request.slot for request in requests]
            stop = max(len(request.prompt) for request in requests) + params.max_tokens
            self._compacted.fill(slots, self._common(slots), stop)
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
            logits = self._forward([(requests[row].slot, (ids[row][-1],)) for row in live], self._compacted)
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

    def _forward(self, parts: Sequence[tuple[int, TokenIds]], compacted: Compacted | None = None) -> Tensor:
        """Append ids to slots; logits after each part's last id, [len(parts), V], float32."""
        shared = compacted.start if compacted else self._common([slot for slot, _ in parts])
        chunks: list[Chunk] = []
        ids: list[int] = []
        positions: list[int] = []
        for slot, new in parts:
            past = len(self._cached[slot])
            chunks.append(Chunk(slot, len(ids), len(ids) + len(new), past))
            ids += new
            positions += range(past, past + len(new))
            self._cached[slot] += new
        self.tokens_computed += len(ids)
        out = self._model(
            input_ids=torch.tensor([ids], device=self._device),
            position_ids=torch.tensor([positions], device=self._device),
            use_cache=False,
            attend=AttendCache(self._cache, chunks, shared, self._device, compacted),
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
