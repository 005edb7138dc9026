"""A model as its difference from another: what is kept, and that who adds it has the same model."""

import pytest
import torch
from torch import Tensor

from empo2.lowrank import added, difference


def states(rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state dict and the same after a change of that rank; the second matrix and the second vector stay."""
    draw = torch.Generator().manual_seed(1)
    before = {
        "wide": torch.randn(6, 40, generator=draw),
        "same": torch.randn(5, 5, generator=draw),
        "tall": torch.randn(40, 6, generator=draw),
        "norm": torch.randn(6, generator=draw),
        "bias": torch.randn(3, generator=draw),
    }
    after = {name: tensor.clone() for name, tensor in before.items()}
    for name in ("wide", "tall"):
        rows, columns = before[name].shape
        after[name] += torch.randn(rows, rank, generator=draw) @ torch.randn(rank, columns, generator=draw)
    after["norm"] += 1 / 3
    return before, after


def test_a_change_of_low_rank_is_kept_and_only_what_changed():
    before, after = states(rank=2)
    kept = difference(before, after, 2)
    shapes = {name: tuple(tensor.shape) for name, tensor in kept.items()}
    assert shapes == {"wide.B": (6, 2), "wide.A": (2, 40), "tall.B": (40, 2), "tall.A": (2, 6), "norm": (6,)}
    assert {kept[name].dtype for name in ("wide.B", "wide.A", "tall.B", "tall.A")} == {torch.bfloat16}
    made = added(before, kept)
    for name in ("wide", "tall"):
        change = after[name] - before[name]
        assert (made[name] - after[name]).norm() < 2**-7 * change.norm(), "the rounding of bfloat16"
    for name in ("same", "bias", "norm"):
        assert torch.equal(made[name], after[name])


def test_of_a_change_of_higher_rank_the_largest_part_is_kept():
    """What is left out is what the best approximation of that rank leaves out (Eckart and Young)."""
    before, after = states(rank=5)
    change = after["wide"] - before["wide"]
    least = torch.linalg.svdvals(change)[3:].norm()
    off = (added(before, difference(before, after, 3))["wide"] - after["wide"]).norm()
    assert least < off < 1.02 * least


def test_who_adds_it_has_the_same_model_to_the_last_bit():
    before, after = states(rank=4)
    kept = difference(before, after, 2)
    first, second = added(before, kept), added({name: tensor.clone() for name, tensor in before.items()}, kept)
    assert all(torch.equal(first[name], second[name]) for name in before)
    again = added(before, difference(before, first, 2))
    assert (again["wide"] - first["wide"]).norm() < 2**-7 * (first["wide"] - before["wide"]).norm()


def test_a_difference_of_another_model_is_refused():
    before, after = states(rank=1)
    kept = difference(before, after, 1)
    del before["wide"]
    with pytest.raises(KeyError, match="wide"):
        added(before, kept)
