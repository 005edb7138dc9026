"""Sampling's attention by products against one that is written down pair by pair, in float64."""

import pytest
import torch

from empo2.sampler import products


def slow(query, keys, values, scale):
    """One query [H, D] at k, v [H_kv, S, D] → [H, D]."""
    groups = len(query) // len(keys)
    rows = []
    for head, q in enumerate(query.double()):
        k, v = keys[head // groups].double(), values[head // groups].double()
        rows.append(torch.softmax(k @ q * scale, dim=0) @ v)
    return torch.stack(rows)


def tensors(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize(("heads", "key_heads"), [(6, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize(("past", "own"), [(0, 1), (0, 9), (5, 1), (5, 9)])
@pytest.mark.parametrize("rows", [1, 8, 512])
def test_a_chunk_sees_what_came_before_each_token(monkeypatch, heads, key_heads, past, own, rows):
    monkeypatch.setattr(products, "ROWS", rows)
    query, keys, values = tensors((heads, own, 16), *[(key_heads, past + own, 16)] * 2)
    found = products.attend_chunk(query, keys, values, 0.3)
    for token in range(own):
        seen = slice(0, past + token + 1)
        assert torch.allclose(found[:, token], slow(query[:, token], keys[:, seen], values[:, seen], 0.3), atol=1e-12)


@pytest.mark.parametrize(("heads", "key_heads"), [(6, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("prefix", [0, 7])
def test_a_batch_sees_the_prefix_and_its_own_rows(heads, key_heads, prefix):
    lengths = [1, 4, 6]
    query, cached_keys, cached_values = tensors((3, heads, 1, 16), *[(5, key_heads, 20, 16)] * 2)
    hidden = torch.arange(6) >= torch.tensor(lengths)[:, None, None, None]
    mask = torch.zeros(3, 1, 1, 6, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    rows = slice(1, 4)  # of a larger cache, as sampling has it
    own = tuple(c[rows, :, prefix : prefix + 6] for c in (cached_keys, cached_values))
    shared = tuple(c[0, :, :prefix] for c in (cached_keys, cached_values))
    found = products.attend_batch(query, shared, own, mask, 0.3)
    for row, length in enumerate(lengths):
        keys, values = (
            torch.cat([prefixes, rest[row, :, :length]], dim=1) for prefixes, rest in zip(shared, own, strict=True)
        )
        assert torch.allclose(found[row, :, 0], slow(query[row, :, 0], keys, values, 0.3), atol=1e-12)


def test_in_bfloat16_the_error_is_that_of_rounding():
    query, keys, values = tensors((9, 60, 64), *[(3, 1500, 64)] * 2, dtype=torch.bfloat16)
    found = products.attend_chunk(query, keys, values, 0.125)
    expected = torch.stack(
        [slow(query[:, t], keys[:, : 1441 + t], values[:, : 1441 + t], 0.125) for t in range(60)], dim=1
    )
    assert float((found - expected).norm() / expected.norm()) < 0.01
