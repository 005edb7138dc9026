"""Learning modes: their shares, and what shares one draw."""

from collections import Counter
from itertools import pairwise

import pytest

import oracles
from empo2 import streams
from empo2.modes import draw_modes
from empo2.types import Mode

GRANULARITIES = ["per_group", "per_step", "per_episode"]


def modes(granularity: str, step: int = 0, *, p: float = 0.25, q: float = 2 / 3, seed: int = 0, groups: int, size: int):
    return draw_modes(granularity, p=p, q=q, seed=seed, step=step, num_groups=groups, group_size=size)


@pytest.mark.parametrize(
    ("mode", "shows_tips", "trains_plain"),
    [(Mode.PLAIN, False, True), (Mode.WITH_TIPS, True, False), (Mode.DISTILL, True, True)],
)
def test_what_a_mode_shows_and_what_it_trains(mode, shows_tips, trains_plain):
    assert (mode.shows_tips, mode.trains_plain) == (shows_tips, trains_plain)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("p", "q"), [(0.25, 2 / 3), (0.7, 0.3)])
def test_shares_approach_1_minus_p_and_p_times_1_minus_q_and_pq(granularity, p, q):
    """10,000 independent draws each: steps, groups of steps, or episodes of groups of steps."""
    steps, groups, size = {"per_step": (10_000, 1, 1), "per_group": (1000, 10, 1), "per_episode": (250, 5, 8)}[
        granularity
    ]
    counts = Counter(
        mode.value
        for step in range(steps)
        for group in modes(granularity, step, p=p, q=q, groups=groups, size=size)
        for mode in group
    )
    shares = {name: count / 10_000 for name, count in counts.items()}
    assert shares == pytest.approx(oracles.expected_mode_shares(p, q), abs=0.015)  # three standard deviations


def test_per_step_all_episodes_of_a_step_share_one_mode():
    drawn = [modes("per_step", step, p=0.5, groups=4, size=3) for step in range(60)]
    assert all(len({mode for group in step for mode in group}) == 1 for step in drawn)
    assert {step[0][0] for step in drawn} == set(Mode)


def test_per_group_the_episodes_of_a_group_share_one_mode_and_groups_differ():
    drawn = [modes("per_group", step, p=0.5, groups=4, size=3) for step in range(60)]
    assert all(len(set(group)) == 1 for step in drawn for group in step)
    assert any(len({group[0] for group in step}) == 3 for step in drawn)
    assert len({tuple(step[group][0] for step in drawn) for group in range(4)}) == 4  # no two groups go together


def test_per_episode_the_episodes_of_a_group_differ():
    drawn = [modes("per_episode", step, p=0.5, groups=2, size=4) for step in range(60)]
    assert any(len(set(group)) == 3 for step in drawn for group in step)
    columns = {tuple(step[group][episode] for step in drawn) for group in range(2) for episode in range(4)}
    assert len(columns) == 8  # no two episodes go together


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_more_groups_or_episodes_change_no_mode_drawn_before(granularity):
    for step in range(40):
        small = modes(granularity, step, p=0.5, groups=3, size=2)
        large = modes(granularity, step, p=0.5, groups=5, size=5)
        assert [len(group) for group in small] == [2, 2, 2]
        assert small == tuple(group[:2] for group in large[:3])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_step_and_seed_name_other_draws(granularity):
    def drawn(seed: int, first: int) -> list:
        return [modes(granularity, step, p=0.5, seed=seed, groups=1, size=1) for step in range(first, first + 40)]

    assert drawn(0, 0) == drawn(0, 0)
    assert drawn(0, 0) != drawn(1, 0)
    assert drawn(0, 0) != drawn(0, 40)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_probabilities_0_and_1_are_certain(granularity):
    def drawn(p: float, q: float) -> set[Mode]:
        return {mode for step in range(200) for g in modes(granularity, step, p=p, q=q, groups=2, size=2) for mode in g}

    assert drawn(0.0, 0.0) == drawn(0.0, 1.0) == {Mode.PLAIN}
    assert drawn(1.0, 0.0) == {Mode.WITH_TIPS}
    assert drawn(1.0, 1.0) == {Mode.DISTILL}


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_probability_0_holds_for_the_smallest_draw_of_all(granularity, monkeypatch):
    monkeypatch.setattr(streams, "uniform", lambda *name: 0.0)
    assert modes(granularity, p=0.0, q=0.5, groups=1, size=1) == ((Mode.PLAIN,),)
    assert modes(granularity, p=0.5, q=0.0, groups=1, size=1) == ((Mode.WITH_TIPS,),)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_larger_p_or_q_only_adds_tips_or_distillation(granularity):
    """Runs that differ in p or q differ in as few episodes as possible."""

    def drawn(p: float, q: float) -> list[Mode]:
        steps = (modes(granularity, step, p=p, q=q, groups=3, size=2) for step in range(200))
        return [mode for groups in steps for group in groups for mode in group]

    for few, many in pairwise([0.1, 0.25, 0.4, 0.7]):
        assert all(b.shows_tips or not a.shows_tips for a, b in zip(drawn(few, 0.5), drawn(many, 0.5), strict=True))
        for a, b in zip(drawn(0.5, few), drawn(0.5, many), strict=True):
            assert a is b or (a, b) == (Mode.WITH_TIPS, Mode.DISTILL)
