"""`empo2 envs`, `empo2 check-env`, `empo2 play`: look at environments, try their contract, play them."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from empo2 import config
from empo2.cli.common import Commands, add_settings, chosen_settings, fetch_missing, quiet_libraries
from empo2.cli.evaluate import last_checkpoint, positive, recipe_of, take_over_memory
from empo2.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from empo2.config import EnvConfig
    from empo2.envs.base import Suite
    from empo2.types import Task

OWN = "an environment's name (`empo2 envs`), MODULE:ATTRIBUTE of your own, or a recipe's .toml file"


def add(commands: Commands) -> None:
    """The commands' flags."""
    command = commands.add_parser("envs", help="list environments, their tasks and splits")
    command.add_argument("name", nargs="?", metavar="NAME", help="one environment only")
    command.set_defaults(command=envs)

    command = commands.add_parser("check-env", help="try whether an environment keeps the contract")
    command.add_argument("subject", metavar="ENV", help=OWN)
    command.add_argument("--task", action="append", default=[], help="this task only (may be repeated)")
    command.add_argument("--turns", type=int, default=20, metavar="N", help="actions an episode (default: 20)")
    add_settings(command)
    command.set_defaults(command=check_env)

    command = commands.add_parser(
        "play",
        help="play an environment, or watch a trained run play",
        description="Play an environment in the terminal, or watch a trained run play, with its tips or without.",
    )
    command.add_argument("subject", metavar="ENV_OR_RUN", help=f"{OWN}; or a run folder, to watch its policy")
    command.add_argument("--task", help="task to play (default: the first)")
    command.add_argument("--variation", type=int, metavar="N", help="variation (default: the first to train on)")
    command.add_argument("--memory", choices=("none", "run"), default="none", help="of a run: show the policy its tips")
    command.add_argument("--episodes", type=int, default=1, metavar="N", help="of a run: episodes (default: 1)")
    add_settings(command)
    command.set_defaults(command=play, recipe=None)


def envs(parsed: argparse.Namespace) -> int:
    from empo2.envs.base import SPLITS, known_suites, panels, suite

    for name in [parsed.name] if parsed.name else known_suites():
        if name == "gymnasium":
            print("gymnasium: any of its environments, as env.options = { id = … } says")
            continue
        try:
            environment = suite(name)
        except ConfigError as error:
            if parsed.name:
                raise
            print(f"{name}: {error}")  # one of another package's, perhaps with options of its own
            continue
        print(f"{name}: {len(environment.task_names())} tasks")
        print(f"  {'task':<52} {'variations to train on':<24} {'dev':<24} {'test':<24}".rstrip())
        for task in environment.task_names():
            found = [environment.variations(task, split) for split in SPLITS]
            told = [f"{len(of)}: {of[0]}…{of[-1]}" if of else "0" for of in found]
            print(f"  {task:<52} {told[0]:<24} {told[1]:<24} {told[2]:<24}".rstrip())
        for panel, tasks in panels(environment).items():
            train, dev, test = (sum(len(environment.variations(task, split)) for task in tasks) for split in SPLITS)
            print(f"  panel {panel!r} for env.tasks: {len(tasks)} tasks, {train}, {dev} and {test} variations:")
            print(f"    {', '.join(tasks)}")
            few = sum(min(len(environment.variations(task, "train")), 5) for task in tasks)
            tested = [len(environment.variations(task, "test")) for task in tasks]
            print(
                f"    the first 5 to train on are {few}, the first 20 to test {sum(min(n, 20) for n in tested)}", end=""
            )
            print(f" ({sum(n < 20 for n in tested)} tasks have fewer)")
    return 0


def check_env(parsed: argparse.Namespace) -> int:
    from empo2.envs.base import check_tasks, suite_of
    from empo2.envs.check import check_environment

    if parsed.turns < 1:
        raise UsageError(f"--turns must be at least 1, got {parsed.turns}")
    settings = _settings(parsed)
    environment = suite_of(settings)
    named = settings.tasks if parsed.task or _is_recipe(parsed) else ()
    check_tasks(environment, named)
    marks = {True: "ok", False: "FAILS", None: "–"}
    failed = False
    for verdict in check_environment(environment, named, turns=parsed.turns, call_timeout_s=settings.call_timeout_s):
        print(f"{marks[verdict.ok]:<6} {verdict.what:<24} {verdict.told}", flush=True)
        failed |= verdict.ok is False
    print(f"{environment.name} {'breaks' if failed else 'keeps'} the contract")
    return 1 if failed else 0


def play(parsed: argparse.Namespace) -> int:
    if (Path(parsed.subject) / "config.toml").exists():
        return _watch(parsed)
    if parsed.memory == "run":
        raise UsageError(f"{parsed.subject} is an environment, not a run, and has no memory; leave out --memory run")
    from empo2.envs.base import suite_of
    from empo2.play import by_hand

    settings = _settings(parsed)
    environment = suite_of(settings)
    environment.check()
    named = settings.tasks if parsed.task or _is_recipe(parsed) else environment.task_names()
    by_hand(environment, _task(parsed, environment, named[0]), print, input)
    return 0


def _watch(parsed: argparse.Namespace) -> int:
    """Episodes of a run's last policy, as they went."""
    from empo2.assemble import assemble, preflight
    from empo2.evaluate import run_episodes
    from empo2.play import told
    from empo2.run import RunFolder

    quiet_libraries()
    positive("--episodes", parsed.episodes)
    run = RunFolder.open(Path(parsed.subject))
    checkpoint = last_checkpoint(run)
    recipe = recipe_of(parsed, run, checkpoint)
    recipe = replace(recipe, env=replace(recipe.env, live=1))
    preflight(recipe)
    fetch_missing(recipe, print)
    parts = assemble(recipe, ":memory:", with_learner=False)
    try:
        if with_memory := parsed.memory == "run":
            take_over_memory(parts, run, checkpoint)
        task = parts.train_tasks[0]
        if parsed.task or parsed.variation is not None:
            task = _task(parsed, parts.suite, parsed.task or task.name)
        for trajectory in run_episodes(
            parts, [task], episodes=parsed.episodes, temperature=recipe.eval.temperature, with_memory=with_memory
        ):
            print(told(trajectory))
    finally:
        parts.close()
    return 0


def _settings(parsed: argparse.Namespace) -> "EnvConfig":
    """The settings that make the environment: a recipe's, or the defaults with its name."""
    from empo2.envs.base import without_panels

    is_recipe = _is_recipe(parsed)
    values: dict[str, Any] = config.read_recipe(parsed.subject) if is_recipe else {"env": {"name": parsed.subject}}
    tasks = parsed.task if isinstance(parsed.task, list) else [parsed.task]
    named = [("env.tasks", tasks)] if any(tasks) else []
    return without_panels(config.from_dict(config.with_overrides(values, [*named, *chosen_settings(parsed)])).env)


def _is_recipe(parsed: argparse.Namespace) -> bool:
    return str(parsed.subject).endswith(".toml")


def _task(parsed: argparse.Namespace, environment: "Suite", name: str) -> "Task":
    """The variation that is asked for, or the first to train on. Raises UsageError if there is none such."""
    from empo2.envs.base import SPLITS, check_tasks
    from empo2.types import Task

    check_tasks(environment, (name,))
    variation = environment.variations(name, "train")[0] if parsed.variation is None else parsed.variation
    if not any(variation in environment.variations(name, split) for split in SPLITS):
        raise UsageError(f"{name} has no variation {variation}; `empo2 envs` lists them")
    return Task(environment=environment.name, name=name, variation=variation)
