"""Random streams: a draw is a function of its name. And the one place where a draw becomes a token."""

import math
import random
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from empo2 import streams
from empo2.sampler.local import draw

# purposes are words, as all of the package's are: "token" and "train/token", never "token/7"
PURPOSES = st.lists(st.sampled_from(["train", "eval", "token", "tip", "mode", "mini-batch"]), min_size=1).map("/".join)
NAMES = st.tuples(
    st.integers(0, 2**32), PURPOSES, st.lists(st.integers(0, 10**6), min_size=1, max_size=5).map(tuple)
)  # (seed, purpose, coordinates)


def value(name) -> float:
    seed, purpose, coordinates = name
    return streams.uniform(seed, purpose, *coordinates)


# ---------------------------------------------------------------- names


def test_the_draws_of_these_names_never_change():
    """Other numbers here mean that no earlier run can be repeated."""
    assert streams.uniform(0, "train/token", 1, 0, 0, 0, 0) == 0.7759084705998055
    assert streams.uniform(7, "mode/tips", 3) == 0.2354579880257197
    assert streams.derived_seed(0, "train/environment", 1, 0) == 4050391733
    assert streams.shuffled("abcdef", 0, "tasks", 0) == list("aedbfc")


@settings(deadline=None, max_examples=30)
@given(st.lists(NAMES, min_size=2, max_size=12), st.randoms(use_true_random=False))
def test_draws_do_not_depend_on_the_order_of_the_calls(names, order):
    first = {name: value(name) for name in names}
    shuffled = list(names)
    order.shuffle(shuffled)
    assert {name: value(name) for name in shuffled} == first


@settings(deadline=None, max_examples=50)
@given(st.lists(NAMES, min_size=2, max_size=20, unique=True))
def test_different_names_give_different_draws(names):
    assert len({value(name) for name in names}) == len(names)


def test_neighbouring_names_are_unrelated():
    grid = np.array([[streams.uniform(0, "token", step, turn) for turn in range(100)] for step in range(100)])
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.03
    other_seed = np.array([[streams.uniform(1, "token", step, turn) for turn in range(100)] for step in range(100)])
    assert abs(np.corrcoef(grid.ravel(), other_seed.ravel())[0, 1]) < 0.03


def test_global_generators_are_neither_read_nor_moved():
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    first = (streams.uniform(0, "a", 1), streams.derived_seed(0, "a", 1), streams.shuffled(range(9), 0, "a", 1))
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    random.seed(5)
    assert first == (streams.uniform(0, "a", 1), streams.derived_seed(0, "a", 1), streams.shuffled(range(9), 0, "a", 1))


# ---------------------------------------------------------------- distributions


def test_draws_lie_in_0_to_1_and_fill_it_evenly():
    values = np.array([streams.uniform(3, "train/token", index) for index in range(20_000)])
    assert values.min() >= 0.0
    assert values.max() < 1.0
    counts = np.histogram(values, bins=50, range=(0, 1))[0]
    chi_square = ((counts - 400) ** 2 / 400).sum()
    assert chi_square < 85.4  # 49 degrees of freedom: one in a thousand is above


def test_the_largest_digest_stays_below_1(monkeypatch):
    monkeypatch.setattr(streams, "_digest", lambda *_: 2**64 - 1)
    assert streams.uniform(0, "x") == 1 - 2**-53
    assert streams.derived_seed(0, "x") == 2**32 - 1


def test_shuffled_returns_every_order_equally_often_and_leaves_its_input():
    items = ["a", "b", "c"]
    counts = Counter(tuple(streams.shuffled(items, 0, "order", index)) for index in range(6000))
    assert items == ["a", "b", "c"]
    assert set(counts) == set(permutations(items))
    assert all(abs(count - 1000) < 4 * math.sqrt(6000 * 1 / 6 * 5 / 6) for count in counts.values())


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(), max_size=20), st.integers(0, 99))
def test_shuffled_keeps_every_item(items, step):
    assert sorted(streams.shuffled(items, 0, "order", step)) == sorted(items)


# ---------------------------------------------------------------- a draw becomes a token


def slow_logprob(logits: list[float], temperature: float, token: int) -> float:
    scaled = [logit / (temperature or 1.0) for logit in logits]
    largest = max(scaled)
    return scaled[token] - largest - math.log(sum(math.exp(logit - largest) for logit in scaled))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 0.4, 1.0, 3.0]), st.integers(1, 60))
def test_draw_takes_the_oracles_token_and_reports_its_log_prob(seed, temperature, vocabulary):
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 3, (5, vocabulary)).astype(np.float32)
    uniforms = generator.random(5).tolist()
    tokens, logprobs = draw(torch.from_numpy(logits), temperature, uniforms)
    for row, token, logprob, uniform in zip(logits.tolist(), tokens, logprobs, uniforms, strict=True):
        assert token == oracles.sample_token(row, temperature, uniform)
        assert logprob == pytest.approx(slow_logprob(row, temperature, token), abs=1e-10)


@pytest.mark.parametrize("vocabulary", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_a_slice_holds_its_left_end_and_not_its_right(vocabulary, temperature):
    """Equal logits: token k's slice is k / V to (k + 1) / V. With two tokens, 0.5 is the second one's."""
    logits = [1.5] * vocabulary
    edges = [token / vocabulary for token in range(vocabulary)]
    below = [(token + 1) / vocabulary - 1e-12 for token in range(vocabulary)]
    for uniforms in (edges, below):
        tokens, _ = draw(torch.tensor([logits] * vocabulary), temperature, uniforms)
        assert tokens == list(range(vocabulary))
        assert tokens == [oracles.sample_token(logits, temperature, uniform) for uniform in uniforms]


def test_tokens_without_probability_are_never_drawn():
    """Neither at the left end, nor in the middle, nor where rounding leaves the draw beyond the last slice."""
    impossible = -math.inf
    logits = [impossible, -2000.0, 0.3, impossible, 1.1, impossible, -2000.0]
    for uniform in (0.0, 0.3, 0.32, 1 - 2**-53):
        (token,), (logprob,) = draw(torch.tensor([logits], dtype=torch.float64), 1.0, [uniform])
        assert token == oracles.sample_token(logits, 1.0, uniform)
        assert token in (2, 4)
        assert math.isfinite(logprob)


def test_temperature_0_takes_the_lowest_id_of_equals_with_its_log_prob_at_temperature_1():
    tokens, logprobs = draw(torch.tensor([[0.0, 2.0, 1.0, 2.0]]), 0.0, [0.0])
    assert tokens == [1]
    assert logprobs[0] == pytest.approx(2 - math.log(1 + 2 * math.e**2 + math.e), abs=1e-10)


def test_a_rows_draw_does_not_depend_on_the_other_rows():
    generator = np.random.default_rng(0)
    logits, uniforms = torch.from_numpy(generator.normal(0, 3, (8, 50))), generator.random(8).tolist()
    together = draw(logits, 0.7, uniforms)
    alone = [draw(logits[row : row + 1], 0.7, uniforms[row : row + 1]) for row in range(8)]
    assert together == ([t for (t,), _ in alone], [p for _, (p,) in alone])


def test_drawn_shares_approach_the_probabilities():
    logits = [0.0, math.log(2.0), math.log(3.0), math.log(4.0)]
    uniforms = [streams.uniform(0, "token", index) for index in range(10_000)]
    tokens, _ = draw(torch.tensor([logits] * 10_000), 1.0, uniforms)
    counts = Counter(tokens)
    assert [counts[token] / 10_000 for token in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.02)
