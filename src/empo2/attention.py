"""The one attention function under trainer and sampler.

transformers hands every attention layer's q, k, v to the function registered here, together with the keyword
arguments of the model's call. Both users lay their tokens end to end in one row, [1, N], so nothing is padded, and pass
an ``attend`` object that knows which tokens see which.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from empo2.errors import UsageError
from empo2.sequences import Segment

NAME = "empo2"  #: value of ``attn_implementation``


class Attend(Protocol):
    """q [1, H, N, D], k and v [1, H_kv, N, D] of layer ``layer`` → output [1, H, N, D]."""

    longest: int  #: tokens that the longest sequence sees

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor: ...


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


def causal_mask(own: int, seen_before: int, device: torch.device) -> Tensor | None:
    """True where a token [own] may look [seen_before + own]; None where the plain causal mask of a square says it."""
    if seen_before == 0:
        return None
    return torch.ones(own, seen_before + own, dtype=torch.bool, device=device).tril_(seen_before)


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
        self.segments = segments
        self._visible = visible(segments).to(device) if in_few_calls(device) else None
        lengths = [sum(stop - start for start, stop in s.context) for s in segments]
        self.longest = max(s.stop - s.start + shared for s, shared in zip(segments, lengths, strict=True))
        if self._visible is None:
            self._masks = [causal_mask(s.stop - s.start, n, device) for s, n in zip(segments, lengths, strict=True)]

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if self._visible is not None:
            groups = query.shape[1] // key.shape[1]  # repeated, not enable_gqa: the kernels that take a mask do not
            k, v = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
            return F.scaled_dot_product_attention(query, k, v, attn_mask=self._visible, scale=scale)
        # split, not slices: the gradient of a slice is a tensor of the whole size, that of a split is one concatenation
        lengths = [segment.stop - segment.start for segment in self.segments]
        pieces = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
        parts = []
        own: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for (q, k, v), segment, mask in zip(pieces, self.segments, self._masks, strict=True):
            own[segment.start, segment.stop] = k, v
            if segment.context:
                shared = [own[part] for part in segment.context]
                k = torch.cat([*(part for part, _ in shared), k], dim=2)
                v = torch.cat([*(part for _, part in shared), v], dim=2)
            parts.append(
                F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
                )
            )
        return torch.cat(parts, dim=2)
