"""Which variations an evaluation plays, and what it calls them."""

from pathlib import Path

import pytest

from empo2 import evaluate
from empo2.assemble import Parts, assemble
from empo2.errors import UsageError
from empo2.types import Task
from runs import smoke


@pytest.fixture
def make_parts():
    opened: list[Parts] = []

    def make(*changes) -> Parts:
        opened.append(assemble(smoke(*changes), ":memory:", with_learner=False))
        return opened[-1]

    yield make
    for parts in opened:
        parts.close()


def played(parts: Parts, monkeypatch, run) -> list[list[str]]:
    """Tasks of each call of `run_episodes`, without playing them."""
    calls: list[list[str]] = []

    def record(parts: Parts, tasks: list[Task], **_) -> list:
        calls.append([f"{task.name}/{task.variation}" for task in tasks])
        return []

    monkeypatch.setattr(evaluate, "run_episodes", record)
    run(parts)
    return calls


TWO_NAMES = (("env.tasks", "coin-3,coin-5"), ("env.num_variations", 3), ("eval.num_variations", 2))


def test_each_task_name_is_evaluated_unseen_and_trained(make_parts, monkeypatch):
    parts = make_parts(*TWO_NAMES, ("eval.train_variations", 2))
    assert played(parts, monkeypatch, lambda parts: evaluate.evaluate(parts, parts.config)) == [
        ["coin-3/80", "coin-3/81", "coin-5/80", "coin-5/81"],
        ["coin-3/0", "coin-3/1", "coin-5/0", "coin-5/1"],
    ]


def test_what_was_trained_is_never_called_unseen(make_parts, monkeypatch):
    parts = make_parts(*TWO_NAMES, ("eval.split", "train"), ("eval.train_variations", 1))
    assert played(parts, monkeypatch, lambda parts: evaluate.evaluate(parts, parts.config)) == [
        ["coin-3/3", "coin-3/4", "coin-5/3", "coin-5/4"],
        ["coin-3/0", "coin-5/0"],
    ]


@pytest.mark.parametrize(("split", "first"), [("train", 0), ("dev", 60), ("test", 80)])
def test_a_split_is_evaluated_as_far_as_asked(make_parts, monkeypatch, split, first):
    def run(parts: Parts) -> None:
        evaluate.evaluate_split(parts, parts.config, split=split, num_variations=2, episodes=1, with_memory=False)

    expected = [f"{name}/{first + n}" for name in ("coin-3", "coin-5") for n in range(2)]
    assert played(make_parts(*TWO_NAMES), monkeypatch, run) == [expected]


def test_nothing_to_evaluate_is_no_result(make_parts):
    parts = make_parts()
    with pytest.raises(UsageError, match="nothing to evaluate"):
        evaluate.evaluate_split(parts, parts.config, split="test", num_variations=0, episodes=1, with_memory=False)


def test_the_same_episodes_before_and_after(make_parts, tmp_path: Path):
    """An evaluation of the same weights gives the same result, and leaves memory and novelty alone."""
    parts = make_parts()
    first = evaluate.evaluate(parts, parts.config)
    assert evaluate.evaluate(parts, parts.config) == first
    assert parts.memory.size() == parts.novelty.distinct_states() == 0
