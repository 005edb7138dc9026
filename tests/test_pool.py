"""Worker processes that die, hang, differ or fail: what the pool brings back, and what it raises."""

import os
import signal
import subprocess
import sys
import time

import pytest

from empo2.envs import pool as pool_module
from empo2.envs.pool import MAX_ATTEMPTS, EnvironmentPool, PoolCounters
from empo2.errors import EnvironmentCrashed, EpisodeDiverged
from empo2.types import StepResult, Task
from pool_suites import FaultySuite, children, wait_until_gone


def task(variation: int = 0, name: str = "plain") -> Task:
    return Task(environment="faulty", name=name, variation=variation)


def reset(pool: EnvironmentPool, slot: int, name: str = "plain") -> int:
    """Begin an episode of variation ``slot``; its worker's process id."""
    pool.start_reset(slot, task(slot, name), seed=10)
    observation, info = pool.receive_reset(slot)
    assert observation.startswith(f"{slot}/10")
    return info["pid"]


def step(pool: EnvironmentPool, slot: int, action: str) -> StepResult:
    pool.start_step(slot, action)
    return pool.receive_step(slot)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    assert not wait_until_gone([pid], 10)


def undisturbed(slot: int, actions: list[str]) -> tuple[str, float, str]:
    """What FaultyEnvironment answers to the last action if nothing goes wrong."""
    return " ".join([f"{slot}/10", *actions]), len(actions) + 1.0, actions[-1]


def seen(result: StepResult) -> tuple[str, float, str]:
    return result.observation, result.reward, result.info["state"]


def test_a_killed_worker_is_replaced_and_its_episode_goes_on(tmp_path):
    with EnvironmentPool(FaultySuite(tmp_path), 2) as pool:
        pids = [reset(pool, slot) for slot in (0, 1)]
        step(pool, 0, "a")
        kill(pids[0])
        assert seen(step(pool, 0, "b")) == undisturbed(0, ["a", "b"])
        assert seen(step(pool, 0, "die once")) == undisturbed(0, ["a", "b", "die once"])
        assert step(pool, 0, "end").terminated
        assert step(pool, 1, "a").info["pid"] == pids[1], "the other worker was left alone"
        assert pool.counters == PoolCounters(crashes=2, replays=2)


def test_a_worker_killed_during_its_reset(tmp_path):
    with EnvironmentPool(FaultySuite(tmp_path), 1) as pool:
        kill(reset(pool, 0))
        reset(pool, 0)
        assert seen(step(pool, 0, "a")) == undisturbed(0, ["a"])
        assert pool.counters == PoolCounters(crashes=1), "nothing was there to replay"


def test_a_simulator_that_reports_its_own_death_is_replaced(tmp_path):
    with EnvironmentPool(FaultySuite(tmp_path), 1) as pool:
        pid = reset(pool, 0)
        result = step(pool, 0, "crash once")
        assert seen(result) == undisturbed(0, ["crash once"])
        assert result.info["pid"] != pid
        assert pool.counters == PoolCounters(crashes=1, replays=1)


def test_a_hung_step_is_counted_and_replayed(tmp_path):
    with EnvironmentPool(FaultySuite(tmp_path), 1, call_timeout_s=3) as pool:
        pid = reset(pool, 0)
        step(pool, 0, "a")
        assert seen(step(pool, 0, "hang once")) == undisturbed(0, ["a", "hang once"])
        assert pool.counters == PoolCounters(timeouts=1, replays=1)
        assert not wait_until_gone([pid], 0)


def test_a_replay_that_differs_ends_the_episode(tmp_path):
    with EnvironmentPool(FaultySuite(tmp_path), 1) as pool:
        kill(reset(pool, 0, "pid"))
        pool.start_step(0, "a")
        with pytest.raises(EpisodeDiverged, match="faulty/pid/0: a replay in a fresh environment differs at reset"):
            pool.receive_step(0)
        assert pool.counters == PoolCounters(crashes=1, divergences=1)
        reset(pool, 0, "pid")
        assert step(pool, 0, "a").observation.startswith("0/10 a")


def test_a_divergence_is_not_forgotten_while_the_policy_is_thinking(tmp_path):
    """Slot 0 is between two actions when slot 1's call finds their common worker dead."""
    with EnvironmentPool(FaultySuite(tmp_path, per_worker=2), 2) as pool:
        reset(pool, 0, "pid")
        kill(reset(pool, 1))
        result = step(pool, 1, "a")
        assert seen(result) == undisturbed(1, ["a"])
        assert pool.counters == PoolCounters(crashes=1, replays=1, divergences=1)
        kill(result.info["pid"])
        assert seen(step(pool, 1, "b")) == undisturbed(1, ["a", "b"])
        assert pool.counters == PoolCounters(crashes=2, replays=2, divergences=1), "counted once"
        pool.start_step(0, "b")
        with pytest.raises(EpisodeDiverged):
            pool.receive_step(0)
        reset(pool, 0)
        assert seen(step(pool, 0, "c")) == undisturbed(0, ["c"])


@pytest.mark.parametrize(
    ("action", "reason"), [("die", "its process ended with exit code -9"), ("crash", "the simulator said goodbye")]
)
def test_what_crashes_every_time_is_given_up(tmp_path, action, reason):
    with EnvironmentPool(FaultySuite(tmp_path), 1) as pool:
        reset(pool, 0)
        step(pool, 0, "a")
        pool.start_step(0, action)
        with pytest.raises(EnvironmentCrashed) as caught:
            pool.receive_step(0)
        assert str(caught.value) == (
            f"step ('{action}') of faulty/plain/0 failed {MAX_ATTEMPTS} times, each time in a fresh process: {reason}; "
            "`empo2 doctor` says whether the environment's runtime is in order"
        )
        assert pool.counters == PoolCounters(crashes=MAX_ATTEMPTS, replays=MAX_ATTEMPTS - 1)


def test_what_hangs_every_time_names_the_time_limit(tmp_path):
    with EnvironmentPool(FaultySuite(tmp_path), 1, call_timeout_s=0) as pool:
        pool.start_reset(0, task(), 0)
        with pytest.raises(EnvironmentCrashed, match=r"no answer within env\.call_timeout_s = 0;"):
            pool.receive_reset(0)
        assert pool.counters == PoolCounters(timeouts=MAX_ATTEMPTS)


def test_an_error_in_the_environments_code_is_raised_here(tmp_path):
    with EnvironmentPool(FaultySuite(tmp_path), 1) as pool:
        pid = reset(pool, 0)
        with pytest.raises(LookupError, match="a bug in the environment's own code") as caught:
            step(pool, 0, "err")
        (note,) = caught.value.__notes__
        assert note.startswith("In the environment's process:\nTraceback")
        assert "in _fail\n" in note
        assert reset(pool, 0) == pid, "no reason for another worker"
        assert pool.counters == PoolCounters()


@pytest.mark.parametrize(
    ("action", "error", "text"),
    [
        ("odd", RuntimeError, r"Unpicklable: code 7\nIn the environment's process:(.|\n)*cannot be pickled"),
        (
            "four",
            TypeError,
            r"step must return \(observation, reward, terminated, truncated, info\).*\('0/10 four', 0.0,",
        ),
        ("nan", TypeError, r"reward finite; it returned \('0/10 nan', nan,"),
    ],
)
def test_what_breaks_the_contract_is_raised_in_words(tmp_path, action, error, text):
    with EnvironmentPool(FaultySuite(tmp_path), 1) as pool:
        reset(pool, 0)
        with pytest.raises(error, match=text):
            step(pool, 0, action)
        assert pool.counters == PoolCounters()


def test_a_crash_brings_back_every_episode_of_the_worker(tmp_path):
    """At the kill, slot 0's answer waits unread on our side, slot 1's is asked for, slot 2's is not, slot 3 idles."""
    with EnvironmentPool(FaultySuite(tmp_path, per_worker=4), 5) as pool:
        pids = {reset(pool, slot) for slot in range(5)}
        assert len(pids) == 2
        for slot in range(4):
            step(pool, slot, "a")
        pool.start_step(0, "b")
        pool.start_step(1, "die once")  # after it, the answer to slot 0 is still in the pipe
        pool.start_step(2, "b")
        results = {slot: seen(pool.receive_step(slot)) for slot in (1, 0, 2)}
        results[3] = seen(step(pool, 3, "b"))
        assert results == {slot: undisturbed(slot, ["a", "die once" if slot == 1 else "b"]) for slot in range(4)}
        assert pool.counters == PoolCounters(crashes=1, replays=4)
        assert step(pool, 4, "a").info["pid"] in pids


def test_one_episode_that_always_crashes_leaves_its_neighbours_their_answers(tmp_path):
    with EnvironmentPool(FaultySuite(tmp_path, per_worker=2), 2) as pool:
        for slot in (0, 1):
            reset(pool, slot)
        pool.start_step(0, "die")
        pool.start_step(1, "a")
        assert seen(pool.receive_step(1)) == undisturbed(1, ["a"])
        with pytest.raises(EnvironmentCrashed, match="faulty/plain/0"):
            pool.receive_step(0)
        reset(pool, 0)
        assert seen(step(pool, 1, "b")) == undisturbed(1, ["a", "b"])


def test_an_answer_nobody_waits_for_any_more_is_dropped(tmp_path):
    with EnvironmentPool(FaultySuite(tmp_path), 1) as pool:
        reset(pool, 0)
        pool.start_step(0, "a")
        reset(pool, 0)
        assert seen(step(pool, 0, "b")) == undisturbed(0, ["b"])


def test_warming_starts_every_worker_and_disturbs_no_episode(tmp_path):
    with EnvironmentPool(FaultySuite(tmp_path, per_worker=2), 3) as pool:
        pool.warm(task())
        assert len(pool._workers) == 2
        for slot in range(3):
            reset(pool, slot)
        assert [seen(step(pool, slot, "go")) for slot in range(3)] == [undisturbed(slot, ["go"]) for slot in range(3)]


def test_worked_examples(tmp_path):
    with EnvironmentPool(FaultySuite(tmp_path), 1) as pool:
        assert pool.worked_example(task()) is None
    with EnvironmentPool(FaultySuite(tmp_path, solves=True), 1) as pool:
        assert pool.worked_example(task()) == "example of faulty/plain/0"
        with pytest.raises(AttributeError, match="a bug in worked_example"):
            pool.worked_example(task(1))
        assert pool.worked_example(task(2)) == "example of faulty/plain/2"
        assert pool.counters == PoolCounters(crashes=1)


def test_ctrl_c_is_left_to_the_parent(tmp_path):
    """The terminal sends it to the workers, too; the step under way must be finished."""
    with EnvironmentPool(FaultySuite(tmp_path), 1) as pool:
        pid = reset(pool, 0)
        os.kill(pid, signal.SIGINT)
        assert step(pool, 0, "a").info["pid"] == pid
        assert pool.counters == PoolCounters()


def test_close_ends_everything_and_may_be_called_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(pool_module, "CLOSE_S", 1.0)
    pool = EnvironmentPool(FaultySuite(tmp_path), 3)
    pids = [reset(pool, slot) for slot in range(3)]
    pool.start_step(1, "hang")
    kill(pids[2])
    assert set(pids[:2]) <= children(os.getpid())
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 5
    assert not wait_until_gone(pids, 0)
    assert [path.name for path in tmp_path.glob("closed-*")] == [f"closed-{pids[0]}"], "the only one that could"
    pool.close()


def test_workers_end_when_their_parent_is_killed(tmp_path):
    """One idles, one hangs in a call."""
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from pool_suites import FaultySuite\n"
        "from test_pool import EnvironmentPool, reset\n"
        "pool = EnvironmentPool(FaultySuite(Path(sys.argv[1])), 2)\n"
        "pids = [reset(pool, slot) for slot in (0, 1)]\n"
        "pool.start_step(1, 'hang')\n"
        "print(*pids, flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        idle, hung = map(int, parent.stdout.readline().split())
        parent.kill()
    assert not wait_until_gone([idle], 5)
    assert list(tmp_path.glob("closed-*")) == [tmp_path / f"closed-{idle}"], "it closed its environment"
    assert not wait_until_gone([hung], pool_module.ORPHAN_S + 5)


def test_whoever_has_answered_comes_first(tmp_path):
    with EnvironmentPool(FaultySuite(tmp_path), 3) as pool:
        for slot in range(3):
            reset(pool, slot)
        pool.start_step(0, "hang")
        pool.start_step(1, "go")
        assert pool.answered([0, 1]) == [1]
        assert seen(pool.receive_step(1)) == undisturbed(1, ["go"])
        pool.start_step(2, "die once")
        assert pool.answered([2]) == [2], "its worker died; asking on brings it back"
        assert seen(pool.receive_step(2)) == undisturbed(2, ["die once"])


def test_waiting_for_whoever_answers_has_a_time_limit(tmp_path):
    with EnvironmentPool(FaultySuite(tmp_path), 1, call_timeout_s=0.5) as pool:
        pool.start_reset(0, task(0), seed=10)
        pool.start_step(0, "hang once")
        assert pool.answered([0]) == [0]
