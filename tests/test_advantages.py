"""Returns and group advantages: against the slow oracle, against verl, and their properties."""

import json
import math
from pathlib import Path
from statistics import stdev

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from empo2.advantages import episode_return, group_advantages, novelty_share
from empo2.algorithms import group_relative, has_signal
from empo2.config import AdvantageConfig, Config, EnvConfig, from_dict, read_recipe
from empo2.types import Completion, Ending, EpisodeKey, Mode, Rendering, Task, Trajectory, TrajectoryGroup, Turn

GOLDEN = json.loads((Path(__file__).parent / "golden" / "losses.json").read_text())["verl_advantages"]
TASK = Task(environment="toy", name="find", variation=0)
# multiples of 1/64, whose sums are exact: two ways of adding them cannot differ by a bit that a tiny std blows up
RETURNS = st.lists(st.integers(-6400, 6400).map(lambda value: value / 64), min_size=2, max_size=10)


def trajectory(rewards, novelties, episode: int = 0, valid: tuple[bool, ...] = ()) -> Trajectory:
    turns = tuple(
        Turn(
            observation="",
            state="",
            tips=(),
            prompt=Rendering(keep=0, new=(1,)),
            plain=Rendering(keep=0, new=(1,)),
            completion=Completion(token_ids=(2,), logprobs=(-0.5,), text="", truncated=False),
            action="",
            parsed=True,
            valid=known,
            reward=reward,
            novelty=novelty,
        )
        for reward, novelty, known in zip(rewards, novelties, valid or [True] * len(rewards), strict=True)
    )
    return Trajectory(
        task=TASK,
        mode=Mode.PLAIN,
        key=EpisodeKey(1, 0, episode),
        policy_version=0,
        turns=turns,
        final_state="",
        ending=Ending.TERMINATED,
        score=sum(rewards),
        success=False,
    )


# ---------------------------------------------------------------- returns


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.floats(-100, 100), st.floats(0, 1)), max_size=30), st.sampled_from([0.0, 0.01, 1.0, 1 / 3])
)
def test_return_equals_the_oracles(turns, scale):
    rewards, novelties = [r for r, _ in turns], [n for _, n in turns]
    expected = oracles.episode_return(rewards, novelties, scale)
    assert episode_return(trajectory(rewards, novelties), scale) == pytest.approx(expected, abs=1e-10)


def test_every_invalid_action_costs_the_penalty():
    episode = trajectory([50.0, 0.0, 0.0], [0.0] * 3, valid=(True, False, False))
    assert episode_return(episode, 0.01, 0.125) == 0.25
    assert episode_return(episode, 0.01) == 0.5


def test_novelty_is_not_scaled():
    assert episode_return(trajectory([100.0, 50.0], [0.5, 0.25]), 0.01) == 2.25


def test_the_same_score_in_other_portions_is_exactly_the_same_return():
    """Scores of whole points in two portions: added up portion by portion, a quarter of them would differ in the last
    bit, and a group of equal scores would look like one with a signal."""
    for score in range(1, 101):
        whole = episode_return(trajectory([float(score)], [0.0]), 0.01)
        for part in range(0, score, 3):
            assert episode_return(trajectory([float(part), float(score - part)], [0.0, 0.0]), 0.01) == whole


def test_the_same_rewards_and_novelties_in_another_order_are_exactly_the_same_return():
    rewards, novelties = [6.0, 58.0, 36.0, 0.0], [1.0, 1 / 3, 1 / 7, 1 / 3]
    forward = episode_return(trajectory(rewards, novelties), 0.01)
    assert episode_return(trajectory(rewards[::-1], novelties), 0.01) == forward
    assert episode_return(trajectory(rewards, novelties[::-1]), 0.01) == forward


# ---------------------------------------------------------------- advantages


@settings(deadline=None, max_examples=80)
@given(RETURNS, st.booleans(), st.sampled_from([0.0, 1e-6, 0.1, 50.0]))
def test_advantages_equal_the_oracles(returns, use_std, floor):
    expected = oracles.group_advantages(returns, std_floor=floor, use_std=use_std)
    found = group_advantages(returns, normalize_by_std=use_std, std_floor=floor)
    assert found == pytest.approx(expected, rel=1e-10, abs=1e-10)


@settings(deadline=None, max_examples=80)
@given(RETURNS, st.booleans())
def test_advantages_of_a_group_sum_to_zero(returns, use_std):
    assert math.fsum(group_advantages(returns, normalize_by_std=use_std, std_floor=1e-3)) == pytest.approx(0, abs=1e-9)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=10), st.booleans(), st.data())
def test_permuting_a_group_permutes_its_advantages_exactly(returns, use_std, data):
    order = data.draw(st.permutations(range(len(returns))))
    found = group_advantages(returns, normalize_by_std=use_std, std_floor=1e-6)
    permuted = group_advantages([returns[i] for i in order], normalize_by_std=use_std, std_floor=1e-6)
    assert permuted == tuple(found[i] for i in order)


@settings(deadline=None, max_examples=50)
@given(st.floats(-1e6, 1e6), st.integers(2, 16), st.booleans(), st.sampled_from([0.0, 1e-6]))
def test_equal_returns_give_exact_zeros(value, size, use_std, floor):
    """0.1 + 0.1 + 0.1 is not 0.3: a rounded mean would leave 1e-17 for the floor to blow up."""
    advantages = group_advantages([value] * size, normalize_by_std=use_std, std_floor=floor)
    assert advantages == (0.0,) * size
    assert not has_signal([advantages])


@settings(deadline=None, max_examples=50)
@given(RETURNS)
def test_with_a_std_the_units_of_the_return_do_not_matter(returns):
    """Except for the floor, which is in them. Powers of two, so that scaling rounds nothing."""
    found = group_advantages(returns, normalize_by_std=True, std_floor=1e-6)
    scaled = group_advantages([64 * value for value in returns], normalize_by_std=True, std_floor=64e-6)
    assert scaled == pytest.approx(found, rel=1e-10)


def test_the_std_is_unbiased_and_the_floor_is_the_smallest_divisor():
    """Returns 0 and 2: mean 1, std sqrt(2) with N - 1 (it would be 1 with N)."""
    assert group_advantages([0.0, 2.0], normalize_by_std=True, std_floor=0.0)[1] == pytest.approx(1 / math.sqrt(2))
    assert group_advantages([0.0, 2.0], normalize_by_std=True, std_floor=4.0) == (-0.25, 0.25)
    assert group_advantages([0.0, 2.0], normalize_by_std=False, std_floor=4.0) == (-1.0, 1.0)


@pytest.mark.parametrize(("ours", "theirs"), [(True, "normalised"), (False, "centred")])
@pytest.mark.parametrize("name", ["binary", "spread", "equal"])
def test_advantages_equal_verls(name, ours, theirs):
    """verl divides by std + 1e-6 where we divide by max(std, floor): a relative difference of 1e-6 / std.

    Not compared: verl's group of a single rollout, which keeps its reward as advantage; ours have two or more.
    """
    rows = [row for row, group in enumerate(GOLDEN["group"]) if group == name]
    returns = [GOLDEN["rewards"][row] for row in rows]
    expected = [GOLDEN[theirs][row][0] for row in rows]  # the same on every token of a row
    found = group_advantages(returns, normalize_by_std=ours, std_floor=1e-6)
    if name == "equal":
        assert found == tuple(expected) == (0.0,) * 4
        return
    epsilon = GOLDEN["epsilon"] / stdev(returns) if ours else 0.0
    assert found == pytest.approx(expected, rel=1.01 * epsilon + 1e-12)
    assert [value / (1 + epsilon) for value in found] == pytest.approx(expected, rel=1e-12)


# ---------------------------------------------------------------- a whole group


def group_of(*episodes) -> TrajectoryGroup:
    return TrajectoryGroup(
        task=TASK, trajectories=tuple(trajectory(*turns, episode=i) for i, turns in enumerate(episodes))
    )


def recipe(*, scale: float, floor: float, use_std: bool = True) -> Config:
    return Config(
        env=EnvConfig(reward_scale=scale), advantage=AdvantageConfig(normalize_by_std=use_std, std_floor=floor)
    )


def test_every_turn_of_an_episode_has_the_episodes_advantage():
    group = group_of(([0.0, 100.0], [0.0, 0.0]), ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]), ([50.0], [0.0]))
    advantages = group_relative(group, recipe(scale=0.01, floor=1e-6))
    assert [len(turns) for turns in advantages] == [2, 3, 1]
    expected = oracles.group_advantages([1.0, 0.0, 0.5], std_floor=1e-8, use_std=True)
    for turns, value in zip(advantages, expected, strict=True):
        assert turns == pytest.approx((value,) * len(turns), abs=1e-12)


def test_the_floor_is_in_units_of_the_score():
    """Scores 0 and 2 have a std of sqrt(2) points; a floor of 4 points divides by 4 points, whatever the scale."""
    group = group_of(([0.0], [0.0]), ([2.0], [0.0]))
    for scale in (1.0, 0.01, 10.0):
        first, second = group_relative(group, recipe(scale=scale, floor=4.0))
        assert (*first, *second) == pytest.approx((-0.25, 0.25), abs=1e-12)


def test_a_floor_keeps_a_small_novelty_difference_small():
    """Equal scores, novelty 0.02 apart: +-0.71 as if one had won, +-0.1 with a floor of ten points."""
    group = group_of(([30.0], [0.02]), ([30.0], [0.0]))
    assert group_relative(group, recipe(scale=0.01, floor=1e-6))[0][0] == pytest.approx(math.sqrt(0.5), rel=1e-9)
    assert group_relative(group, recipe(scale=0.01, floor=10.0))[0][0] == pytest.approx(0.1, rel=1e-9)


def test_a_group_of_equal_scores_reached_in_different_ways_has_no_signal():
    group = group_of(([100.0], [0.0]), ([6.0, 58.0, 36.0], [0.0] * 3), ([50.0, 50.0], [0.0] * 2))
    for use_std in (True, False):
        assert not has_signal(group_relative(group, recipe(scale=0.01, floor=0.0, use_std=use_std)))


def test_one_advantage_that_differs_from_zero_is_a_signal():
    assert has_signal([(0.0, 0.0), (0.0, 1e-12)])
    assert not has_signal([(0.0, 0.0), ()])


# ---------------------------------------------------------------- how much of it novelty makes


def slow_share(novelties: list[float], scores: list[float]) -> float:
    def spread(values: list[float]) -> float:
        mean = sum(values) / len(values)
        return sum(abs(value - mean) for value in values)

    return spread(novelties) / (spread(novelties) + spread(scores))


def test_novelty_share_equals_the_slow_loop_and_its_extremes():
    generator = np.random.default_rng(0)
    for _ in range(20):
        novelties, scores = generator.random((2, 6)).tolist()
        returns = [n + s for n, s in zip(novelties, scores, strict=True)]
        assert novelty_share(returns, novelties) == pytest.approx(slow_share(novelties, scores), abs=1e-10)
    assert novelty_share([1.0, 2.0], [0.0, 0.0]) == 0.0
    assert novelty_share([1.0, 2.0], [0.5, 1.5]) == 1.0
    assert novelty_share([1.0, 1.0], [0.5, 0.5]) == 0.0  # nothing differs


def test_in_coin_collector_no_novelty_trains_alone_and_every_mixed_group_does():
    """Novelty of one or more episodes that see nothing but new rooms, beside others that see none."""
    config = from_dict(read_recipe("coin"))
    turns, size = config.env.max_turns, config.collect.group_size
    new, old = ([0.0] * turns, [config.novelty.coefficient] * turns), ([0.0] * turns, [0.0] * turns)
    found = ([*[0.0] * (turns - 1), 1.0], [0.0] * turns)
    for count in range(1, size):
        for one, other, trains in ((new, old, False), (found, new, True), (found, old, True)):
            group = group_of(*[one] * count, *[other] * (size - count))
            assert has_signal(group_relative(group, config), config.advantage.skip_below) is trains
