"""The attention of a pack's prefix tree, in several looks, against one softmax over all pairs with a mask."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from empo2 import attention
from empo2.attention import AttendSegments, visible
from empo2.sequences import Segment, pack
from empo2.types import Span, SpanKey, TrainingSequence

CPU = torch.device("cpu")
KEY_HEADS, HEADS, WIDTH = 2, 4, 8


def dense(query, key, value, segments, scale):
    """softmax(q kᵀ · scale) v over the pairs that see each other, written out."""
    groups = query.shape[1] // key.shape[1]
    k, v = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ k.transpose(-1, -2) * scale).masked_fill(~visible(segments), float("-inf"))
    return scores.softmax(-1) @ v


def inputs(tokens: int, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(1, tokens, heads, WIDTH, generator=generator, dtype=dtype).transpose(1, 2).requires_grad_()
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


def compare(segments, *, dtype: torch.dtype, tolerance: float) -> None:
    tensors = inputs(segments[-1].stop, dtype)
    found = AttendSegments(segments, CPU)(0, *tensors, 0.3)
    expected = dense(*tensors, segments, 0.3)
    direction = torch.randn(expected.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    for ours, theirs in zip(
        torch.autograd.grad(found, tensors, direction), torch.autograd.grad(expected, tensors, direction), strict=True
    ):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def packed(rows: list[list[int]]) -> tuple[Segment, ...]:
    """The segments of one pack of these ids."""
    sequences = [
        TrainingSequence(
            token_ids=tuple(ids),
            spans=(Span(start=1, stop=len(ids), key=SpanKey(0, n, 0), advantage=1.0, sampler_logprobs=None),),
        )
        for n, ids in enumerate(rows)
    ]
    (found,) = pack(sequences, 10**6)
    return found.segments


DEEP = packed([[1] * 40 + [2] * n + [n] * 3 for n in (2, 5, 30, 60)] + [[1] * 90, [7] * 20, [7] * 20 + [3]])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_deep_tree(dtype, tolerance):
    assert max(len(segment.context) for segment in DEEP) >= 2
    compare(DEEP, dtype=dtype, tolerance=tolerance)


@given(st.lists(st.lists(st.integers(0, 1), min_size=3, max_size=5), min_size=1, max_size=6))
@settings(deadline=None, max_examples=40)
def test_any_tree(rows):
    """Each drawn number stands for 18 equal tokens, so that common prefixes become segments."""
    compare(packed([[n for n in row for _ in range(18)] for row in rows]), dtype=torch.float64, tolerance=1e-12)


def test_nothing_that_is_masked_is_looked_at():
    seen = sum(
        (look.queries.stop - look.queries.start) * (look.keys.stop - look.keys.start)
        if not look.causal
        else (look.queries.stop - look.queries.start) * (look.queries.stop - look.queries.start + 1) // 2
        for look in attention._looks(DEEP)
    )
    assert seen == int(visible(DEEP).sum())


def test_segments_out_of_order_are_refused():
    first = Segment(start=0, stop=4)
    broken = [first, Segment(start=4, stop=6, context=((0, 4),)), Segment(start=6, stop=8)]
    broken.append(Segment(start=8, stop=9, context=((0, 4),)))
    with pytest.raises(ValueError, match="do not follow each other"):
        AttendSegments(broken, CPU)


def test_in_bfloat16_the_looks_are_joined_in_float32():
    tensors = inputs(DEEP[-1].stop, torch.bfloat16)
    found = AttendSegments(DEEP, CPU)(0, *tensors, 0.3)
    exact = dense(*(tensor.double() for tensor in tensors), DEEP, 0.3)
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).abs().max() <= 2**-7 * exact.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = AttendSegments(DEEP, CPU)(0, tensors[0].float(), tensors[1].float(), tensors[2], 0.3)
    assert torch.equal(mixed, found)


def norm_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


LONG = packed([[1] * 700 + [n] * length for n, length in ((2, 40), (3, 150), (4, 600))])  # several blocks of each kind


@pytest.mark.parametrize("segments", [DEEP, LONG])
@pytest.mark.parametrize("sharpness", [1.0, 6.0])
def test_gradients_in_bfloat16(segments, sharpness):
    """Large scores, up to 40 with ``sharpness`` 6, must not lose bits. torch's kernel is off by 1.2 % here."""
    tensors = [(t.detach() * sharpness).requires_grad_() for t in inputs(segments[-1].stop, torch.bfloat16)]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = dense(*exact, segments, 0.3)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = torch.autograd.grad(AttendSegments(segments, CPU)(0, *tensors, 0.3), tensors, direction)
    for ours, theirs in zip(found, torch.autograd.grad(expected, exact, direction.double()), strict=True):
        assert norm_error(ours, theirs) <= 0.015


@pytest.mark.parametrize("count", [1, 3, attention.FEW, attention.FEW + 1])
@pytest.mark.parametrize("few_calls", [False, True])
def test_sequences_without_a_common_prefix(count, few_calls, monkeypatch):
    monkeypatch.setattr(attention, "in_few_calls", lambda _: few_calls)
    segments = packed([[n] * (20 + n) for n in range(count)])
    assert len(segments) == count
    assert AttendSegments(segments, CPU)._apart == (few_calls and count <= attention.FEW)
    compare(segments, dtype=torch.float64, tolerance=1e-12)


def test_a_shared_prefix_is_masked_where_calls_are_dear(monkeypatch):
    monkeypatch.setattr(attention, "in_few_calls", lambda _: True)
    compare(DEEP, dtype=torch.float64, tolerance=1e-12)
