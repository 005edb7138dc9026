"""The one attention function under trainer and sampler.

transformers hands every attention layer's q, k, v to the function registered here, together with the keyword
arguments of the model's call. Both users lay their tokens end to end in one row, [1, N], so nothing is padded, and pass
an ``attend`` object that knows which tokens see which.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from empo2 import attention_products
from empo2.errors import UsageError
from empo2.sequences import Segment

NAME = "empo2"  #: value of ``attn_implementation``
FEW_PAIRS = 10_000  #: of queries and keys that attention by products is not worth its calls for
FEW = 8  #: sequences without a common prefix that get a call each where calls are dear: no pair of theirs is masked


class Attend(Protocol):
    """q [1, H, N, D], k and v [1, H_kv, N, D] of layer ``layer`` → output [1, H, N, D]."""

    longest: int  #: tokens that the longest sequence sees

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor: ...


@torch.compiler.disable
def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    window, attend = kwargs.get("sliding_window"), kwargs["attend"]
    if window is not None and attend.longest > window:
        raise UsageError(
            f"the model attends to a sliding window of {window} tokens, shorter than an episode of "
            f"{attend.longest}; set model.max_tokens to {window} or use a model with full attention"
        )
    out = attend(module.layer_idx, query, key, value, scaling)
    return out.transpose(1, 2).contiguous(), None


def register() -> None:
    """Make ``attn_implementation="empo2"`` known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)


def in_few_calls(device: torch.device) -> bool:
    """Whether one attention over many masked pairs is faster than many small ones: a GPU waits for its calls."""
    return device.type != "cpu"


def visible(segments: Sequence[Segment]) -> Tensor:
    """True where a token of a pack may look, [N, N]."""
    mask = torch.zeros(segments[-1].stop, segments[-1].stop, dtype=torch.bool)
    for segment in segments:
        rows = mask[segment.start : segment.stop]
        rows[:, segment.start : segment.stop] = True
        rows.tril_(segment.start)
        for start, stop in segment.context:
            rows[:, start:stop] = True
    return mask


class AttendSegments:
    """Training: each segment sees its context (shared prefixes) and itself causally, and no other segment."""

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self._lengths = [segment.stop - segment.start for segment in segments]
        self._apart = in_few_calls(device) and len(segments) <= FEW and not any(s.context for s in segments)
        self._visible = visible(segments).to(device) if in_few_calls(device) and not self._apart else None
        self._looks = _looks(segments)
        self.longest = max(s.stop - s.start + sum(stop - start for start, stop in s.context) for s in segments)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if self._apart:
            pieces = zip(*(tensor.split(self._lengths, 2) for tensor in (query, key, value)), strict=True)
            attend = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True, scale=scale)
            return torch.cat([attend(q, k, v) for q, k, v in pieces], dim=2)
        if self._visible is None:
            if torch.is_autocast_enabled(query.device.type):
                dtype = torch.get_autocast_dtype(query.device.type)
                query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
            out: Tensor = _TreeAttention.apply(query, key, value, self._looks, scale)
            return out
        groups = query.shape[1] // key.shape[1]  # repeated, not enable_gqa: the kernels that take a mask do not
        k, v = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return F.scaled_dot_product_attention(query, k, v, attn_mask=self._visible, scale=scale)


@dataclass(frozen=True)
class _Look:
    """All tokens of ``queries`` look at ``keys``: at all of them, or ``causal``, at those up to themselves."""

    queries: slice
    keys: slice
    causal: bool


def _looks(segments: Sequence[Segment]) -> list[_Look]:
    """Each segment at itself; then, at each segment, all those together that have it in their context.

    As a pack lays its tree out depth first, the latter follow each other.
    """
    looks = [_Look(slice(s.start, s.stop), slice(s.start, s.stop), causal=True) for s in segments]
    seen_by: dict[tuple[int, int], slice] = {}
    for segment in segments:
        for part in segment.context:
            before = seen_by.get(part, slice(segment.start, segment.start))
            if before.stop != segment.start:
                raise ValueError(f"the segments that see {part} do not follow each other: {segments}")
            seen_by[part] = slice(before.start, segment.stop)
    return looks + [_Look(queries, slice(*part), causal=False) for part, queries in seen_by.items()]


class _TreeAttention(torch.autograd.Function):
    """Attention of q [1, H, N, D] to k, v [1, H_kv, N, D] in several looks, on a processor: nothing masked is computed.

    The looks are joined by their log-sum-exps, in float32 or better. With the joint output and log-sum-exp, the
    gradients of each look are their exact share (as in Ring Attention, Liu et al. 2023). Tokens of one key head's
    query heads look at a context together, so no key is repeated.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, looks: list[_Look], scale: float) -> Tensor:
        exact = torch.promote_types(query.dtype, torch.float32)
        out, weight = torch.empty_like(query, dtype=exact), query.new_empty(query.shape[:3], dtype=exact)
        for look in looks:
            q, k, v = query[:, :, look.queries], key[:, :, look.keys], value[:, :, look.keys]
            by_products = q.dtype == torch.bfloat16 and q.shape[2] * k.shape[2] >= FEW_PAIRS
            found, found_weight = (_by_products if by_products else _by_flash)(q, k, v, look.causal, scale)
            if look.causal:
                out[:, :, look.queries], weight[:, :, look.queries] = found, found_weight
                continue
            before = weight[:, :, look.queries]
            out[:, :, look.queries].lerp_(found.to(exact), torch.sigmoid(found_weight - before)[..., None])
            weight[:, :, look.queries] = torch.logaddexp(before, found_weight)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, weight)
        ctx.looks, ctx.scale = looks, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, out, weight = ctx.saved_tensors
        grads = [torch.zeros_like(tensor, dtype=weight.dtype) for tensor in (query, key, value)]
        of_look = _gradients_by_products if query.dtype == torch.bfloat16 else _gradients_by_flash
        for look in ctx.looks:
            g, q, o, w = (tensor[:, :, look.queries] for tensor in (grad, query, out, weight))
            k, v = (tensor[:, :, look.keys] for tensor in (key, value))
            found = of_look(g, q, o, w, k, v, look.causal, ctx.scale)
            for total, part, tokens in zip(grads, found, (look.queries, look.keys, look.keys), strict=True):
                total[:, :, tokens] += part
        of_query, of_key, of_value = (g.to(t.dtype) for g, t in zip(grads, (query, key, value), strict=True))
        return of_query, of_key, of_value, None, None


def _by_flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    if causal:
        found, weight = _flash(
            q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 0.0, True, scale=scale
        )
    else:
        found, weight = _flash(_by_key_head(q, groups), k, v, 0.0, False, scale=scale)
    return found.reshape(q.shape), weight.reshape(q.shape[:3])


def _by_products(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    found, weight = attention_products.attend(q[0].unflatten(0, (k.shape[1], -1)), k[0], v[0], causal, scale)
    return found.view(q.shape), weight.view(q.shape[:3])


def _gradients_by_flash(
    grad: Tensor, q: Tensor, out: Tensor, weight: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    if causal:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        of_q, of_k, of_v = _flash_backward(grad, q, k, v, out, weight, 0.0, True, scale=scale)
        return of_q, of_k.unflatten(1, (-1, groups)).sum(2), of_v.unflatten(1, (-1, groups)).sum(2)
    grad, folded, out, weight = (_by_key_head(tensor, groups) for tensor in (grad, q, out, weight))
    of_q, of_k, of_v = _flash_backward(grad, folded, k, v, out, weight, 0.0, False, scale=scale)
    return of_q.reshape(q.shape), of_k, of_v


def _gradients_by_products(
    grad: Tensor, q: Tensor, out: Tensor, weight: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    heads = (k.shape[1], -1)
    grad, folded, out, weight = (tensor[0].unflatten(0, heads) for tensor in (grad, q, out, weight))
    of_q, of_k, of_v = attention_products.gradients(grad, folded, k[0], v[0], out, weight, causal, scale)
    return of_q.view(q.shape), of_k[None], of_v[None]


def _by_key_head(tensor: Tensor, groups: int) -> Tensor:
    """[1, H, n, …] → [1, H_kv, groups · n, …]: the query heads of one key head end to end."""
    return tensor.unflatten(1, (-1, groups)).flatten(2, 3)


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
