"""Which solved episodes stand in a task's prompt."""

import pytest

from empo2.errors import ConfigError
from empo2.examples import gather
from empo2.types import Task, WorkedExample

LENGTHS = {0: 3, 1: 3, 2: 9, 3: 3, 4: 3, 5: 9, 6: 3, 7: None}  #: variation → turns of its solution


class Suite:
    name = "house"

    def variations(self, task_name: str, split: str) -> tuple[int, ...]:
        assert split == "train"
        return tuple(LENGTHS)


class Pool:
    """Solves what has a length."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def worked_example(self, task: Task) -> WorkedExample | None:
        self.asked.append(task.variation)
        length = LENGTHS[task.variation]
        return None if length is None else WorkedExample(task_text=str(task.variation), turns=(("", "go"),) * length)


def tasks(*variations: int) -> list[Task]:
    return [Task(environment="house", name="find", variation=v) for v in variations]


def shown(trained: list[Task], count: int, of: int = 99) -> list[str]:
    examples = gather(Suite(), Pool(), trained, count=count, max_turns=4)  # type: ignore[arg-type]
    return [example.task_text for example in examples.of(*tasks(of))]


def test_the_last_untrained_variations_are_shown_short_ones_first():
    assert shown(tasks(0, 1), 2) == ["6", "4"]
    assert shown(tasks(0, 1), 4) == ["6", "4", "3", "5"]
    assert shown(tasks(3, 4, 6), 3) == ["1", "0", "5"]
    assert shown(tasks(0, 1), 0) == []


def test_no_more_are_solved_than_needed():
    pool = Pool()
    gather(Suite(), pool, tasks(0), count=2, max_turns=4)  # type: ignore[arg-type]
    assert pool.asked == [7, 6, 5, 4]


def test_where_others_are_too_few_trained_ones_help_but_never_their_own_task():
    trained = tasks(0, 1, 2, 3, 4, 6)
    assert shown(trained, 2) == ["5", "0"]
    assert shown(trained, 2, of=0) == ["5", "1"]
    assert shown(tasks(*LENGTHS), 1, of=0) == ["1"]
    assert shown(tasks(*LENGTHS), 1, of=5) == ["0"]


def test_too_few_all_the_same():
    with pytest.raises(ConfigError, match=r"house/find/0 can be shown 6 worked episodes .* asks for 7"):
        shown(tasks(*LENGTHS), 7)
