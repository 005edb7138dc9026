"""Environments of one's own: the docs' example, the registry, `SimpleSuite`, the Gymnasium adapter."""

import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy
import pytest
import tomli_w

from empo2 import cli, config
from empo2.envs.base import known_suites, suite
from empo2.envs.simple import Guarded, SimpleSuite
from empo2.errors import ConfigError, MissingPart
from empo2.types import Task
from runs import smoke

DOCS = Path(__file__).parents[1] / "docs" / "own-environment.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def here(tmp_path: Path, monkeypatch) -> Path:
    """An empty current folder, whose modules are forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def guess(here: Path) -> Path:
    """The docs' example in the current folder, with the method that is added on the way."""
    whole, method, *_ = blocks("python")
    whole = whole.replace("import SimpleSuite\n", "import SimpleSuite, replayed\n")
    whole = whole.replace("\n\nsuite =", f"\n{method}\n\nsuite =")
    assert method in whole
    (here / "guess.py").write_text(whole, encoding="utf-8")
    return here


# ---------------------------------------------------------------- the docs' example


def test_the_example_is_about_twenty_lines():
    lines = [line for line in blocks("python")[0].splitlines() if line.strip()]
    assert len(lines) <= 20


def test_the_example_keeps_the_contract(guess, capsys):
    assert cli.main(["check-env", "guess:suite"]) == 0
    told = capsys.readouterr().out
    assert "guess keeps the contract" in told
    assert "1 of 1 tasks, each ends in success" in told


def test_the_example_keeps_it_without_worked_examples(here, capsys):
    (here / "guess.py").write_text(blocks("python")[0], encoding="utf-8")
    assert cli.main(["check-env", "guess:suite"]) == 0
    assert "set prompt.examples = 0" in capsys.readouterr().out


def test_every_number_has_a_worked_example(guess):
    environment = suite("guess:suite").open()
    for variation in range(60):
        task = Task(environment="guess", name="default", variation=variation)
        seen = [turn[0] for turn in environment.worked_example(task).turns]
        assert seen[0] == "I have a number from 1 to 20."
        assert "Yes!" not in seen


def test_the_example_is_played_as_told(guess, capsys, monkeypatch):
    replies = iter(["ten", *map(str, range(1, 21))])
    monkeypatch.setattr("builtins.input", lambda prompt: next(replies, ":quit"))
    assert cli.main(["play", "guess:suite"]) == 0
    told = capsys.readouterr().out
    assert "Guess my number." in told
    assert "(not a valid action) Say a number." in told
    assert "score 1, solved" in told


def test_the_example_is_trained(guess, capsys):
    """The docs' command, with the tiny model."""
    command = blocks("sh")[1].strip()
    _, _, _, *flags = command.split()
    status = cli.main(["train", "smoke", "--run", "run", "--train.steps", "2", "--env.variations", "", *flags])
    assert status == 0, capsys.readouterr().err
    assert (guess / "run" / "metrics.jsonl").read_text().count("\n") == 2
    trajectories = next((guess / "run" / "trajectories").iterdir())
    assert "I have a number from 1 to 20." in _text(trajectories)


def _text(path: Path) -> str:
    import gzip

    return gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text(encoding="utf-8")


def test_the_gymnasium_recipe_of_the_docs_keeps_the_contract(here, capsys):
    recipe = next(block for block in blocks("toml") if "FrozenLake" in block)
    (here / "lake.toml").write_text(recipe, encoding="utf-8")
    assert cli.main(["check-env", "lake.toml"]) == 0
    assert "gymnasium keeps the contract" in capsys.readouterr().out
    small = config.to_dict(smoke(("train.steps", 1), ("env.variations", ""), ("model.max_tokens", 3000)))
    for section, values in config.read_recipe(str(here / "lake.toml")).items():
        small[section] |= values
    (here / "small.toml").write_text(tomli_w.dumps(small), encoding="utf-8")
    assert cli.main(["train", "small.toml", "--run", "run"]) == 0


# ---------------------------------------------------------------- names


def test_environments_of_other_packages_are_known_by_name(guess, monkeypatch, capsys):
    point = metadata.EntryPoint("guessing", "guess:suite", "empo2.environments")
    shadow = metadata.EntryPoint("toy", "guess:suite", "empo2.environments")

    def entry_points(**wanted: Any) -> Any:
        assert wanted == {"group": "empo2.environments"}
        return metadata.EntryPoints([point, shadow])

    monkeypatch.setattr("empo2.envs.base.metadata.entry_points", entry_points)
    assert suite("guessing").name == "guess"
    assert suite("toy").name == "toy", "a built-in name stays what it is"
    assert list(known_suites())[-1] == "guessing"
    assert cli.main(["envs"]) == 0
    assert "guessing: 1 tasks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gues", {}, "there is no environment 'gues'; known: scienceworld, webshop"),
        ("no_such_module:suite", {}, "there is no module 'no_such_module', installed or in this folder"),
        ("guess.inner:suite", {}, "there is no module 'guess.inner'"),
        ("guess:sweet", {}, "the module 'guess' has no 'sweet'"),
        (":suite", {}, "':suite' is no MODULE:ATTRIBUTE"),
        ("./guess:suite", {}, "is no MODULE:ATTRIBUTE"),
        (".guess:suite", {}, "is no MODULE:ATTRIBUTE"),
        ("guess:Guess", {}, r"it has no name, per_worker, .*; `SimpleSuite` makes one"),
        ("guess:suite", {"size": 3}, "takes no env.options; remove {'size': 3}"),
        ("toy", {"size": 3}, "cannot be made of env.options = {'size': 3}"),
        ("gymnasium", {}, "missing a required argument: 'id'"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(guess, name, options, message):
    with pytest.raises(ConfigError, match=message):
        suite(name, **options)


def test_what_a_module_of_ones_own_lacks_is_no_wrong_name(here):
    (here / "broken.py").write_text("import not_installed_at_all\n", encoding="utf-8")
    with pytest.raises(ModuleNotFoundError, match="not_installed_at_all"):
        suite("broken:suite")


def test_what_fails_inside_a_module_of_ones_own_is_shown(here):
    (here / "failing.py").write_text("import random\nX = random.no_such_function\n", encoding="utf-8")
    with pytest.raises(AttributeError, match="no_such_function"):
        suite("failing:suite")


def test_a_stray_module_here_does_not_hide_a_built_in_environments_library(here, monkeypatch):
    (here / "regex.py").write_text("raise RuntimeError('not this one')\n", encoding="utf-8")
    suite("webshop")
    assert str(here) not in sys.path


def test_an_attribute_of_an_attribute(here):
    (here / "nested.py").write_text("class All:\n    from empo2.envs.toy import ToySuite as suite\n", encoding="utf-8")
    assert suite("nested:All.suite").name == "toy"


def test_one_name_for_several_tasks_is_refused():
    with pytest.raises(ConfigError, match=re.escape("write ('walk',)")):
        SimpleSuite(name="e", make=Endless, instructions_text="Go.", tasks="walk")


def test_options_make_a_suite(here):
    (here / "sized.py").write_text(
        "from empo2.envs.toy import ToySuite\n"
        "class Sized(ToySuite):\n"
        "    def __init__(self, size, tag='x'):\n"
        "        self.name = f'sized-{size}-{tag}'\n",
        encoding="utf-8",
    )
    assert suite("sized:Sized", size=4).name == "sized-4-x"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{ id = 'A', n = [1, 2] }", {"id": "A", "n": [1, 2]}),
        ("id = 'A', deep = { on = true }", {"id": "A", "deep": {"on": True}}),
        ("", {}),
    ],
)
def test_options_are_read_from_the_command_line(text, found):
    recipe = smoke(("env.options", text))
    assert recipe.env.options == found
    assert config.from_dict(config.to_dict(recipe)) == recipe


@pytest.mark.parametrize("value", ["id = ", "7", ["a"], "{} x"])
def test_options_that_are_no_table_are_refused(value):
    with pytest.raises(ConfigError, match="table"):
        smoke(("env.options", value))


def test_an_environment_with_settings_of_its_own_takes_no_options(capsys):
    assert cli.main(["check-env", "webshop", "--env.options", "page = 'text'"]) == 2
    assert "webshop has settings of its own (catalogue, num_products" in capsys.readouterr().err


# ---------------------------------------------------------------- SimpleSuite


class Endless:
    closed = 0

    def reset(self, task, seed):
        return f"{task.name} {task.variation}", {}

    def step(self, action):
        return action, 0.0, action == "end", action == "cut", {}

    def close(self):
        self.closed += 1

    def worked_example(self, task):
        return None


def test_variations_are_numbered_through_the_splits():
    made = SimpleSuite(name="e", make=Endless, instructions_text="Go.", tasks=("a", "b"), train=3, dev=0, test=2)
    assert [made.variations("a", split) for split in ("train", "dev", "test")] == [(0, 1, 2), (), (3, 4)]


@pytest.mark.parametrize("ending", ["end", "cut"])
def test_no_step_before_the_beginning_and_after_the_end(ending):
    inside = Endless()
    environment = Guarded(inside)
    with pytest.raises(RuntimeError, match="call reset"):
        environment.step("x")
    environment.reset(Task(environment="e", name="a", variation=0), 0)
    environment.step("x")
    environment.step(ending)
    with pytest.raises(RuntimeError, match="call reset"):
        environment.step("x")
    environment.reset(Task(environment="e", name="a", variation=0), 0)
    environment.step("x")
    environment.close()
    environment.close()
    assert inside.closed == 1
    assert environment.worked_example(None) is None
    assert not hasattr(environment, "no_such_thing")


# ---------------------------------------------------------------- Gymnasium

gymnasium = pytest.importorskip("gymnasium")


def lake(**options: Any) -> Any:
    return suite("gymnasium", id="FrozenLake-v1", **options)


TASK = Task(environment="gymnasium", name="FrozenLake-v1", variation=3)


def test_named_actions_observations_and_the_end():
    straight = lake(
        actions=("left", "down", "right", "up"), kwargs={"is_slippery": False}, task="Reach G.", success_score=1.0
    )
    assert straight.instructions().endswith("Actions: left, down, right, up.")
    environment = straight.open()
    names = ("left", "down", "right", "up")
    assert environment.reset(TASK, 0) == ("0", {"state": "0", "task": "Reach G.", "actions": names})
    going = {"valid": True, "success": False, "actions": names}
    assert environment.step(" Down ") == ("4", 0.0, False, False, {"state": "4", **going})
    unknown = {"state": "4", "valid": False, "success": False, "actions": names}
    for nonsense in ("1", "jump", "down now", ""):
        assert environment.step(nonsense) == ("No such action.\n4", 0.0, False, False, unknown)
    for action in ("down", "right", "down", "right"):
        assert not environment.step(action)[2]
    last = environment.step("right")
    assert last == ("15", 1.0, True, False, {"state": "15", "valid": True, "success": True, "actions": ()})
    with pytest.raises(RuntimeError, match="call reset"):
        environment.step("left")
    environment.close()
    environment.close()


def test_falling_is_no_success():
    """CartPole pays for every step, and its end is a failure; only a score that was asked for counts."""
    cart = suite("gymnasium", id="CartPole-v1").open()
    cart.reset(TASK, 0)
    for _ in range(50):
        _, _, terminated, _, info = cart.step("0")
        if terminated:
            break
    assert terminated
    assert not info["success"]


def test_a_drawing_is_shown_and_the_state_is_the_observation():
    drawn = lake(kwargs={"is_slippery": False, "render_mode": "ansi"}, observation="render").open()
    seen, info = drawn.reset(TASK, 0)
    assert seen.startswith("[S]FFF\n")
    assert info["state"] == "0"
    assert drawn.step("1")[4]["state"] == "4"
    with pytest.raises(ConfigError, match="render\\(\\) of FrozenLake-v1 gives no text but NoneType; set kwargs"):
        lake(observation="render").open().reset(TASK, 0)


def test_observations_are_written_whole_and_plainly():
    from empo2.envs.gym import written

    assert written((numpy.int64(3), [numpy.float32(0.5)], {"a": numpy.bool_(True)})) == "(3, [0.5], {'a': True})"
    assert "..." not in written(numpy.zeros(5000))
    assert written("\x1b[41mS\x1b[0mFF\n") == "[S]FF"


def test_an_end_without_a_score_is_no_success():
    environment = lake(kwargs={"is_slippery": False}).open()
    environment.reset(TASK, 0)
    environment.step("2")
    observation, reward, terminated, truncated, info = environment.step("1")
    assert (observation, reward, terminated, truncated) == ("5", 0.0, True, False)
    assert not info["success"]


def test_a_variation_is_the_seed():
    def walk(variation: int) -> list[str]:
        environment = lake().open()
        environment.reset(Task(environment="gymnasium", name="FrozenLake-v1", variation=variation), 0)
        return [environment.step("3")[0] for _ in range(6)]

    assert walk(3) == walk(3)
    assert len({tuple(walk(variation)) for variation in range(5)}) > 1


def test_the_time_limit_truncates():
    environment = suite("gymnasium", id="CartPole-v1", kwargs={"max_episode_steps": 5}).open()
    environment.reset(TASK, 0)
    steps = [environment.step(str(n % 2)) for n in range(5)]
    assert [step[2:4] for step in steps] == [(False, False)] * 4 + [(False, True)]


@pytest.mark.parametrize(
    ("space", "text", "found"),
    [
        (gymnasium.spaces.Text(5), "hello", "hello"),
        (gymnasium.spaces.Text(5), "hello!", None),
        (gymnasium.spaces.Box(-1, 1, (2,)), "0.5, -1", [0.5, -1]),
        (gymnasium.spaces.Box(-1, 1, (2,)), "0.5 2", None),
        (gymnasium.spaces.Box(-1, 1, (2,)), "0.5", None),
        (gymnasium.spaces.Box(-1, 1, (2,)), "nan 0", None),
        (gymnasium.spaces.MultiDiscrete([3, 2]), "2 1", [2, 1]),
        (gymnasium.spaces.MultiDiscrete([3, 2]), "2 1.5", None),
        (gymnasium.spaces.MultiDiscrete([3, 2]), "3 1", None),
        (gymnasium.spaces.MultiDiscrete([3, 2]), "1e300 1", None),
        (gymnasium.spaces.MultiBinary(3), "1 0 1", [1, 0, 1]),
        (gymnasium.spaces.MultiBinary(3), "one", None),
    ],
    ids=str,
)
def test_replies_are_read_as_actions_of_the_space(space, text, found):
    from empo2.envs.gym import read_action

    read = read_action(space, text, ())
    if found is None or isinstance(found, str):
        assert read == found
    else:
        assert space.contains(read)
        assert read.tolist() == pytest.approx(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"id": "Nope-v1"}, "gymnasium cannot make 'Nope-v1'"),
        ({"id": "FrozenLake-v1", "kwargs": {"colour": 1}}, "gymnasium cannot make 'FrozenLake-v1' of {'colour': 1}"),
        ({"id": "FrozenLake-v1", "actions": ("a", "b")}, "must name each of the 4 actions once"),
        ({"id": "FrozenLake-v1", "actions": ("a", "A", "b", "c")}, "must name each of the 4 actions once"),
        ({"id": "MountainCarContinuous-v0", "actions": ("a",)}, "have no names; leave actions out"),
        ({"id": "FrozenLake-v1", "observation": "picture"}, "neither observation nor render"),
    ],
)
def test_what_gymnasium_cannot_make_is_refused(options, message):
    made = suite("gymnasium", **options)

    def attempt() -> None:
        made.check()
        made.open()

    with pytest.raises(ConfigError, match=re.escape(message)):
        attempt()


def test_a_space_of_no_text_is_refused():
    from empo2.envs.gym import action_names

    with pytest.raises(ConfigError, match="cannot be read from text; wrap"):
        action_names(gymnasium.spaces.Dict({"a": gymnasium.spaces.Discrete(2)}), ())


def test_without_the_package_the_command_that_brings_it_is_told(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPart, match=re.escape("pip install 'empo2[gymnasium]'")):
        lake().check()
