"""Each metric moves when its cause is forced, so that none is a constant."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from empo2 import metrics
from empo2.collect import CollectCounters
from empo2.envs.pool import PoolCounters
from empo2.learner import UpdateStats
from empo2.types import Completion, Ending, EpisodeKey, Mode, Rendering, Task, Tip, Trajectory, TrajectoryGroup, Turn
from empo2.update import StepUpdate
from runs import run_training, smoke

TASK = Task(environment="toy", name="coin-3", variation=0)


def turn(**changes) -> Turn:
    made = Turn(
        observation="o",
        state="s",
        tips=(),
        prompt=Rendering(keep=0, new=(1,)),
        plain=Rendering(keep=0, new=(1,)),
        completion=Completion(token_ids=(2,), logprobs=(-1.0,), text="go", truncated=False),
        action="go",
        parsed=True,
        valid=True,
        reward=0.0,
    )
    return replace(made, **changes)


def episode(number: int = 0, turns: tuple[Turn, ...] | None = None, **changes) -> Trajectory:
    made = Trajectory(
        task=TASK,
        mode=Mode.PLAIN,
        key=EpisodeKey(1, 0, number),
        policy_version=0,
        turns=turns or (turn(), turn()),
        final_state="f",
        ending=Ending.TERMINATED,
        score=0.0,
        success=False,
    )
    return replace(made, **changes)


BASE = (episode(0), episode(1))
TIP = Tip(text="t", score=1.0, similarity=0.9, source=EpisodeKey(0, 0, 0))
TRUNCATED = replace(turn().completion, truncated=True)
SURE = replace(turn().completion, logprobs=(-0.25,))
TIPPED = replace(BASE[1], mode=Mode.WITH_TIPS, turns=(turn(tips=(TIP,), candidates=3, entries=4), turn()))


def collected(*episodes: Trajectory, returns: tuple[float, ...] | None = None) -> dict[str, float]:
    group = TrajectoryGroup(task=TASK, trajectories=episodes)
    return metrics.of_collection([group], [list(returns or [0.0] * len(episodes))])


@pytest.mark.parametrize(
    ("name", "changed", "value"),
    [
        ("mode_with_tips", (BASE[0], TIPPED), 1),
        ("mode_distill", (BASE[0], replace(BASE[1], mode=Mode.DISTILL)), 1),
        ("mode_plain", (BASE[0], TIPPED), 1),
        ("num_episodes", (*BASE, episode(2)), 3),
        ("score_mean", (BASE[0], replace(BASE[1], score=50.0)), 25.0),
        ("success_rate", (BASE[0], replace(BASE[1], success=True)), 0.5),
        ("valid_action_rate", (BASE[0], episode(1, (turn(valid=False), turn()))), 0.75),
        ("truncated_rate", (BASE[0], episode(1, (turn(completion=TRUNCATED), turn()))), 0.25),
        ("unparsed_rate", (BASE[0], episode(1, (turn(parsed=False), turn()))), 0.25),
        ("turns_mean", (BASE[0], episode(1, (turn(),) * 4)), 3.0),
        ("token_limit_rate", (BASE[0], replace(BASE[1], ending=Ending.TOKEN_LIMIT)), 0.5),
        ("entropy_sampled", (BASE[0], episode(1, (turn(completion=SURE),) * 2)), 0.625),
        ("novelty_mean", (BASE[0], episode(1, (turn(novelty=1.0), turn()))), 0.25),
        ("tips_written", (BASE[0], replace(BASE[1], tip="Look first.")), 1),
        ("tips_retrieved_mean", (BASE[0], TIPPED), 0.5),
        ("tip_candidate_share", (BASE[0], TIPPED), 0.75),
        ("score_with_tips", (BASE[0], replace(TIPPED, score=8.0)), 8.0),
        ("episode_restarts", (BASE[0], replace(BASE[1], restarts=2)), 2),
        ("score_std_in_group", (BASE[0], replace(BASE[1], score=2.0)), pytest.approx(2**0.5)),
    ],
)
def test_collection_metrics_move(name, changed, value):
    assert collected(*BASE).get(name) != value
    assert collected(*changed)[name] == value


def test_the_sampled_entropy_is_that_of_episodes_without_tips():
    told = replace(TIPPED, turns=(turn(completion=SURE),))
    assert collected(BASE[0], told)["entropy_sampled"] == 1.0
    assert collected(told, told)["entropy_sampled"] is None
    two = replace(turn().completion, token_ids=(2, 3), logprobs=(-1.0, -4.0))
    mixed = episode(1, (turn(), turn(completion=two)))
    assert collected(told, mixed)["entropy_sampled"] == 2.0, "tokens count alike"


def test_return_and_the_share_of_novelty_in_it():
    explored = (BASE[0], episode(1, (turn(novelty=0.75), turn(novelty=0.25))))
    assert collected(*BASE)["novelty_share_of_advantage"] == 0
    assert collected(*BASE, returns=(0.0, 1.0))["novelty_share_of_advantage"] == 0
    assert collected(*explored, returns=(0.0, 1.0))["novelty_share_of_advantage"] == 1
    assert collected(*explored, returns=(0.0, 2.0))["novelty_share_of_advantage"] == 0.5
    assert collected(*BASE, returns=(0.0, 1.0))["return_mean"] == 0.5


STATS = UpdateStats(
    loss=0.0,
    entropy=0.0,
    ratio_mean=1.0,
    ratio_max=1.0,
    clip_fraction=0.0,
    masked_fraction=0.0,
    kl=0.0,
    grad_norm=0.0,
    num_tokens=10,
    num_held=10,
    num_computed=20,
    sampler_gap_mean=0.0,
    sampler_gap_max=0.0,
    skipped=False,
)


def updated(*stats: UpdateStats, skipped_groups: int = 0) -> dict[str, float | None]:
    return metrics.of_update(
        StepUpdate(updates=stats, num_zero_groups=skipped_groups + 1, num_skipped_groups=skipped_groups, num_computed=5)
    )


def test_update_metrics_are_weighted_by_tokens():
    other = replace(STATS, num_tokens=30, loss=4.0, entropy=2.0, ratio_mean=2.0, ratio_max=9.0, clip_fraction=1.0)
    other = replace(other, masked_fraction=0.5, kl=0.4, num_held=30, grad_norm=2.0, skipped=True)
    found = updated(STATS, other, skipped_groups=3)
    expected = {
        "zero_advantage_groups": 4,
        "skipped_groups": 3,
        "updates": 2,
        "updates_skipped": 1,
        "loss": 2.0,
        "entropy": 1.5,
        "ratio_mean": 1.75,
        "ratio_max": 9.0,
        "clip_fraction": 0.75,
        "masked_token_fraction": 0.375,
        "grad_norm": 1.0,
        "tokens_trained": 40,
        "tokens_computed": 45,
    }
    assert {key: found[key] for key in expected} == expected
    assert found["kl"] == pytest.approx(0.3)


def test_the_kl_is_that_of_the_tokens_that_the_term_holds():
    """Null where it holds none: nothing was measured."""
    none = replace(STATS, num_held=0)
    assert updated(replace(STATS, kl=0.4), none, replace(STATS, kl=0.1, num_held=5))["kl"] == pytest.approx(0.3)
    assert updated(none)["kl"] is None


def test_the_sampler_gap_is_that_of_the_first_update():
    late = replace(STATS, sampler_gap_mean=1.0, sampler_gap_max=2.0)
    assert updated(STATS, late)["sampler_gap_max"] == 0
    assert updated(late, STATS)["sampler_gap_max"] == 2.0


def test_a_step_without_any_signal_says_so():
    found = updated(skipped_groups=2)
    assert {key: found[key] for key in metrics.OF_UPDATES} == dict.fromkeys(metrics.OF_UPDATES), "none is 0"
    assert (found["skipped_groups"], found["updates"], found["tokens_trained"]) == (2, 0, 0)
    assert list(found) == list(updated(STATS)), "the columns stay"


def test_first_successes():
    solved = replace(BASE[1], success=True)
    assert collected(*BASE)["solved_tasks"] == []
    assert collected(BASE[0], solved)["solved_tasks"] == [str(TASK)]
    lines = [
        {"step": 1, "solved_tasks": []},
        {"step": 2, "solved_tasks": ["b"]},
        {"step": 3, "solved_tasks": ["a", "b"]},
    ]
    assert metrics.first_successes(lines) == {"b": 2, "a": 3}


def test_faults_are_those_of_the_step():
    before = PoolCounters(crashes=2, timeouts=1, replays=4)
    now = PoolCounters(crashes=3, timeouts=3, replays=6)
    assert metrics.of_faults(now, before) == {"environment_crashes": 3, "environment_replays": 2}


def test_time_metrics_add_up():
    counters = CollectCounters(action_tokens=30, tip_tokens=12, tip_seconds=2.0, environment_seconds=0.5)
    found = metrics.of_time(counters, {"collect": 10.0, "remember": 1.0, "train": 5.0, "other": 2.0})
    assert found["tokens_sampled"] == 42
    parts = {name: found[f"seconds_{name}"] for name in ("collect", "tips", "train", "other")}
    assert parts == {"collect": 8.0, "tips": 3.0, "train": 5.0, "other": 2.0}
    assert sum(parts.values()) == found["seconds_total"] == 18.0


def test_a_stopwatch_gives_each_lap_to_the_part_named_at_its_end(monkeypatch: pytest.MonkeyPatch):
    times = iter([1.0, 3.0, 3.5, 7.5])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(times))
    watch = metrics.Stopwatch()
    for part in ("collect", "other", "collect"):
        watch.lap(part)
    assert watch.seconds == {"collect": 6.0, "other": 0.5}


def test_infinity_is_written_as_text():
    assert metrics.finite_or_text({"a": float("inf"), "b": float("nan"), "c": 1.0}) == {
        "a": "inf",
        "b": "nan",
        "c": 1.0,
    }


def test_settings_move_their_metrics(tmp_path):
    """Whole runs: what a recipe switches shows in the metrics."""
    short = [("train.steps", 2), ("eval.num_variations", 1), ("eval.train_variations", 0), ("eval.episodes", 1)]
    loud = run_training(tmp_path / "a", smoke(*short, ("modes.p", 1.0), ("modes.q", 1.0), ("loss.kl", 0.1))).metrics()
    quiet = run_training(
        tmp_path / "b", smoke(*short, ("modes.p", 0.0), ("novelty.coefficient", 0.0), ("loss.delta", 0.0))
    ).metrics()
    unsolved = run_training(tmp_path / "c", smoke(*short, ("memory.show_min_score", 1000.0))).metrics()
    assert all(line["tips_written"] == line["memory_entries"] == 0 for line in unsolved)
    assert all(line["tips_written"] > 0 for line in loud)
    assert all(line["mode_distill"] == line["num_episodes"] for line in loud)
    assert all(line["mode_plain"] == line["num_episodes"] for line in quiet)
    assert loud[1]["tips_retrieved_mean"] > 0
    assert loud[1]["masked_token_fraction"] > 0
    assert quiet[1]["tips_retrieved_mean"] == quiet[1]["tips_written"] == quiet[1]["masked_token_fraction"] == 0
    assert quiet[1]["novelty_mean"] == 0
    assert quiet[1]["distinct_states"] > 0, "counted where it earns nothing as well, to compare exploration"
    assert loud[0]["distinct_states"] <= loud[1]["distinct_states"]
    assert loud[1]["kl"] > 0
    assert "eval_score_mean" in loud[-1]
    assert "eval_score_mean" not in loud[0]
    of_modes = {"score_plain", "score_with_tips", "score_distill"}
    measured = {key for line in (*loud, *quiet) for key in line if not key.startswith("eval_")}
    assert documented_keys("metrics.jsonl") == measured | of_modes
    evaluated = {key.removeprefix("eval_").removeprefix("train_") for key in loud[-1] if key.startswith("eval_")}
    assert evaluated <= documented_keys("metrics.jsonl") | {"episodes"}


def documented_keys(section: str) -> set[str]:
    """The keys named in the first column of a section's table in docs/run-folder.md."""
    page = (Path(__file__).parents[1] / "docs" / "run-folder.md").read_text()
    text = page.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", text, flags=re.M))))
