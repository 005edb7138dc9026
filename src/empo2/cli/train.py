"""`empo2 train`."""

import argparse
import dataclasses
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from empo2 import config
from empo2.cli.common import Commands, add_settings, chosen_settings, fetch_missing, quiet_libraries
from empo2.config import Config
from empo2.errors import UsageError

if TYPE_CHECKING:
    from empo2.display import Display
    from empo2.run import RunFolder


def add(commands: Commands) -> None:
    """The command's flags."""
    command = commands.add_parser(
        "train",
        help="train on a recipe",
        description="Train on a recipe: evaluation before, training, evaluation after. Shipped recipes: "
        + ", ".join(config.shipped_recipes()),
    )
    command.add_argument(
        "recipe", nargs="?", metavar="RECIPE", help="a .toml file or a shipped recipe (default: default)"
    )
    command.add_argument("--run", type=Path, metavar="DIR", help="run folder (default: runs/RECIPE-TIME)")
    command.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --run, exactly where it was saved; with --train.steps N for longer than planned",
    )
    add_settings(command)
    command.set_defaults(command=execute)


def execute(parsed: argparse.Namespace) -> int:
    name = parsed.recipe or "default"
    if parsed.resume:
        recipe = _resumed_recipe(parsed)
    else:
        recipe = config.from_dict(config.with_overrides(config.read_recipe(name), chosen_settings(parsed)))
    from empo2.assemble import imitated_tasks, make_suite, preflight, resolved
    from empo2.display import Display, curve, solved_line, summary
    from empo2.envs.base import about
    from empo2.run import RunFolder

    quiet_libraries()
    if parsed.resume:
        run = RunFolder.open(parsed.run)
        recipe = _with_threads(recipe, run)
    display = Display(recipe.train.steps)
    preflight(recipe)
    recipe = resolved(recipe)
    fetch_missing(recipe, display.say)
    if known := imitated_tasks(recipe):
        display.say(f"{len(known)} of the tasks were shown in the policy's warm-up ({known[0]}): no exploration there")
    environment = about(make_suite(recipe))
    if not parsed.resume:
        folder = parsed.run or Path("runs") / f"{Path(name).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        run = RunFolder.create(folder, recipe, environment)
    stop = _StopOnInterrupt(display.say)
    with run.locked():
        if not _is_finished(run, recipe.train.steps):
            display.say(f"run folder: {run.path}")
            if parsed.resume:
                run.extend(recipe.train.steps)
                run.note_resumption(recipe, environment)
            _train(recipe, run, display, stop, new=not parsed.resume)
    if stop.asked() and run.checkpoints()[-1].step < recipe.train.steps:
        display.say(f"saved at step {run.checkpoints()[-1].step}; go on with: empo2 train --resume --run {run.path}")
        return 130
    evaluations = run.evaluations()
    if len(evaluations) > 2:
        display.console.print(curve(evaluations))
    display.console.print(summary(evaluations, run.metrics()))
    display.say(solved_line(run.metrics()))
    display.say(f"run folder: {run.path}")
    saved = run.checkpoints()
    display.say(f"trained model: {saved[-1].model if saved else 'deleted'}")
    return 0


def _is_finished(run: "RunFolder", steps: int) -> bool:
    """Whether the last step is saved; or was, and its checkpoints have been deleted since."""
    if run.checkpoints_deleted():
        return any(line["step"] == steps for line in run.evaluations())
    return any(checkpoint.step == steps for checkpoint in run.checkpoints())


def _train(recipe: Config, run: "RunFolder", display: "Display", stop: "_StopOnInterrupt", *, new: bool) -> None:
    """Assemble the recipe and train it; a new run whose recipe is refused here leaves no folder behind."""
    from empo2.assemble import assemble
    from empo2.train import train

    try:
        parts = assemble(recipe, run.store, with_learner=True)
    except UsageError:
        if new:
            run.discard()  # nothing has run: the mended recipe may use the same folder
        raise
    try:
        with display, stop:
            parts.collector.on_episode = lambda done, total: display.doing(f"episode {done} of {total}")
            train(parts, run, display, stop.asked)
    finally:
        parts.close()


def _resumed_recipe(parsed: argparse.Namespace) -> Config:
    from empo2.run import RunFolder

    if parsed.run is None:
        raise UsageError("--resume needs the run to go on with; add --run DIR")
    settings = chosen_settings(parsed)
    if parsed.recipe or any(name != "train.steps" for name, _ in settings):
        raise UsageError(
            "--resume goes on with the run's own recipe; leave out the recipe and --section.field settings "
            "(but for --train.steps, which trains it for longer)"
        )
    recipe = RunFolder.open(parsed.run).config()
    longer = config.from_dict(config.with_overrides(config.to_dict(recipe), settings))
    if longer.train.steps < recipe.train.steps:
        raise UsageError(f"{parsed.run} is a run of {recipe.train.steps} steps; --train.steps can only make it longer")
    if longer != recipe and recipe.learner.schedule != "constant":
        raise UsageError(
            f"{parsed.run} cannot be made longer: its learning rate falls until step {recipe.train.steps} "
            f"(learner.schedule = {recipe.learner.schedule}); start a new run with --train.steps"
        )
    return longer


def _with_threads(recipe: Config, run: "RunFolder") -> Config:
    """The recipe with the thread count the run began with: another one changes the last bits of every sum."""
    threads = run.provenance()["threads"]
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, threads=threads))


class _StopOnInterrupt:
    """Ctrl-C once: finish the step, save, end. Twice: end at once."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._asked = False

    def asked(self) -> bool:
        return self._asked

    def __enter__(self) -> "_StopOnInterrupt":
        self._before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _interrupt(self, *_: object) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        self._say("Ctrl-C: the step under way is finished and saved first (once more: end at once)")
