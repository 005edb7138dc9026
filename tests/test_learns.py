"""The method works in small, and only as a whole (the learning problem: learning.py)."""

from typing import Any

import pytest
import torch

import learning

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def taught() -> Any:
    """A policy of 0.1 million parameters that follows tips, taught in other mazes than the goals."""
    torch.set_num_threads(1)
    return learning.imitate(learning.word_tokenizer(), learning.recipe_of("empo2", 0), seed=0, **learning.LESSONS)


@pytest.fixture(scope="module")
def scores(taught: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Arm → tip-free score before and after training (and in between), 0…100."""
    folder = tmp_path_factory.mktemp("arms")
    runs = {arm: learning.train_arm(folder / arm, arm, taught, seed=0) for arm in learning.ARMS}
    return {arm: [line["eval_train_score_mean"] for line in run.evaluations()] for arm, run in runs.items()}


def test_the_policy_is_small_and_cannot_leave_a_maze_without_a_tip(taught: Any, scores: dict[str, list[float]]):
    assert sum(parameter.numel() for parameter in taught.parameters()) <= 1_000_000
    assert all(found[0] <= 5 for found in scores.values())


def test_the_whole_method_leaves_the_mazes_without_tips(scores: dict[str, list[float]]):
    assert scores["empo2"][-1] >= 50


@pytest.mark.parametrize("arm", [arm for arm in learning.ARMS if arm != "empo2"])
def test_with_a_part_taken_out_it_stalls(arm: str, scores: dict[str, list[float]]):
    """PLAIN alone; tips that are never distilled; tips of another maze."""
    assert scores[arm][-1] <= scores["empo2"][-1] / 2
