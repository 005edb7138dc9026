"""The collector: batches, restarts, token limits; on the toy house with the tiny random model."""

from dataclasses import replace
from pathlib import Path

import pytest

from empo2.assemble import Parts, assemble, preflight
from empo2.collect import CollectRules
from empo2.errors import ConfigError, EpisodeDiverged, UsageError
from empo2.memory import NewTip, scope_of
from empo2.types import EpisodeKey, EpisodePlan, Mode, Task, Trajectory
from runs import smoke

RULES = CollectRules(purpose="train", seed=3, temperature=1.0, max_turns=4, tip_tokens=6)


def plans(count: int, step: int = 1) -> list[EpisodePlan]:
    return [
        EpisodePlan(
            task=Task(environment="toy", name="coin-3", variation=index % 2),
            mode=Mode.PLAIN,
            key=EpisodeKey(step, 0, index),
        )
        for index in range(count)
    ]


@pytest.fixture
def parts(request, tmp_path: Path):
    made = assemble(smoke(*getattr(request, "param", [])), ":memory:", with_learner=False)
    yield made
    made.close()


def collected(changes: list[tuple[str, object]], count: int = 7) -> list[Trajectory]:
    made: Parts = assemble(smoke(*changes), ":memory:", with_learner=False)
    try:
        return made.collector.collect(plans(count), RULES)
    finally:
        made.close()


def essence(trajectory: Trajectory) -> tuple:
    """All but log-probs, whose last bits depend on the batch."""
    turns = [(turn.observation, turn.prompt, turn.completion.token_ids, turn.reward) for turn in trajectory.turns]
    return turns, trajectory.tip, trajectory.score, trajectory.ending


@pytest.mark.parametrize(
    "changes",
    [
        [("env.live", 1)],
        [("env.live", 3), ("collect.overlap", True)],
        [("env.live", 3), ("collect.overlap", False)],
        [("env.live", 3), ("collect.deterministic", False)],
        [("env.live", 20), ("collect.deterministic", False)],
    ],
    ids=str,
)
def test_an_episode_does_not_depend_on_which_others_share_its_batch(changes):
    expected = collected([("env.live", 7)])
    found = collected(changes)
    assert [t.key for t in found] == [plan.key for plan in plans(7)]
    assert list(map(essence, found)) == list(map(essence, expected))


def test_a_replay_that_differs_begins_the_episode_again_with_the_same_draws(parts: Parts):
    expected = parts.collector.collect(plans(3), RULES)
    receive, calls = parts.pool.receive_step, iter(range(1000))

    def diverges_once(slot: int):
        result = receive(slot)
        if next(calls) == 4:
            raise EpisodeDiverged("made up")
        return result

    parts.pool.receive_step = diverges_once  # type: ignore[method-assign]
    found = parts.collector.collect(plans(3), RULES)
    assert sum(t.restarts for t in found) == 1
    assert list(map(essence, found)) == list(map(essence, expected))


def test_a_first_prompt_that_does_not_fit_is_refused(parts: Parts):
    parts.collector.prompt_rules = replace(parts.collector.prompt_rules, max_tokens=40)
    with pytest.raises(UsageError, match=r"leaves no room for an action within model.max_tokens = 40"):
        parts.collector.collect(plans(1), RULES)


def test_nothing_stays_cached_whether_collecting_ends_or_fails(parts: Parts):
    parts.collector.collect(plans(3), RULES)
    assert not any(parts.collector.sampler._cached)  # type: ignore[attr-defined]

    def fails(slot: int):
        assert any(parts.collector.sampler._cached)  # type: ignore[attr-defined]
        raise UsageError("made up")

    parts.pool.receive_step = fails  # type: ignore[method-assign]
    with pytest.raises(UsageError, match="made up"):
        parts.collector.collect(plans(3), RULES)
    assert not any(parts.collector.sampler._cached)  # type: ignore[attr-defined]


def test_tokens_and_time_are_counted(parts: Parts):
    found = parts.collector.collect(plans(3), RULES)
    counters = parts.collector.counters
    assert counters.action_tokens == sum(len(turn.completion.token_ids) for t in found for turn in t.turns)
    assert counters.tip_tokens == sum(t.tip_tokens for t in found) > 0
    assert counters.tip_seconds > 0


def test_only_episodes_whose_tip_would_be_shown_write_one(parts: Parts):
    receive = parts.pool.receive_step

    def one_is_rewarded(slot: int):
        return replace(receive(slot), reward=float(slot == 1))

    parts.pool.receive_step = one_is_rewarded  # type: ignore[method-assign]
    everyone = parts.collector.collect(plans(3), RULES)
    found = parts.collector.collect(plans(3), replace(RULES, tip_min_score=0.5))
    assert [t.score > 0.5 for t in found] == [False, True, False]
    assert [t.tip for t in found] == ["", everyone[1].tip, ""]
    assert parts.collector.counters.tip_tokens == found[1].tip_tokens == everyone[1].tip_tokens > 0
    assert all(t.tip for t in everyone)


OTHER = [("memory.source", "other"), ("memory.threshold", -1.0), ("env.variations", [0, 1, 2])]


@pytest.mark.parametrize("parts", [OTHER], indirect=True)
def test_tips_of_another_task_are_shown_where_the_control_asks_for_them(parts: Parts):
    """Each training task is shown what the next one stored, the last one what the first stored."""
    tasks = parts.train_tasks
    for index, task in enumerate(tasks):
        key = parts.embedder.embed([f"state {index}"])[0]
        text = f"Tip of {task.variation}."
        new = NewTip(
            scope=scope_of(task, "variation"),
            key=key,
            state="",
            text=text,
            score=1.0,
            source=EpisodeKey(1, index, 0),
            turn=0,
        )
        parts.memory.commit(1, [new])
    shown = [EpisodePlan(task=task, mode=Mode.DISTILL, key=EpisodeKey(2, i, 0)) for i, task in enumerate(tasks)]
    found = parts.collector.collect(shown, RULES)
    assert [t.turns[0].tips[0].text for t in found] == ["Tip of 1.", "Tip of 2.", "Tip of 0."]


@pytest.mark.parametrize("change", [("env.variations", [0]), ("memory.scope", "name")], ids=str)
def test_the_control_needs_two_memories(change):
    for attempt in (preflight, lambda recipe: assemble(recipe, ":memory:", with_learner=False)):
        with pytest.raises(ConfigError, match="needs tasks with memories of their own"):
            attempt(smoke(("memory.source", "other"), change))
