"""`empo2 evaluate`."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from empo2 import config
from empo2.cli.common import Commands, add_settings, chosen_settings, fetch_missing, quiet_libraries
from empo2.config import Config
from empo2.errors import UsageError

if TYPE_CHECKING:
    from empo2.assemble import Parts
    from empo2.run import Checkpoint, RunFolder


def add(commands: Commands) -> None:
    """The command's flags."""
    command = commands.add_parser(
        "evaluate", help="evaluate a run or a model", description="Evaluate a run's last checkpoint, or a model."
    )
    command.add_argument("subject", metavar="RUN_OR_MODEL", help="a run folder, a model folder or a model name")
    command.add_argument("--recipe", metavar="R", help="recipe that says where to act (default: the run's, or default)")
    command.add_argument("--split", choices=("train", "dev", "test"), default="test", help="variations (default: test)")
    command.add_argument("--variations", type=int, metavar="N", help="variations of the split (default: the recipe's)")
    command.add_argument(
        "--memory", choices=("none", "run"), default="none", help="show the run's tips (default: none)"
    )
    command.add_argument("--episodes", type=int, metavar="N", help="episodes a variation (default: the recipe's)")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    add_settings(command)
    command.set_defaults(command=execute)


def execute(parsed: argparse.Namespace) -> int:
    from empo2.assemble import assemble, preflight, resolved
    from empo2.envs.base import about
    from empo2.evaluate import evaluate_split
    from empo2.run import RunFolder

    quiet_libraries()
    positive("--episodes", parsed.episodes)
    positive("--variations", parsed.variations)
    folder = Path(parsed.subject)
    run = RunFolder.open(folder) if (folder / "config.toml").exists() else None
    checkpoint = last_checkpoint(run) if run else None  # chosen once: the run may save another one any time
    recipe = recipe_of(parsed, run, checkpoint)
    preflight(recipe)
    recipe = resolved(recipe)
    fetch_missing(recipe, lambda text: print(text, file=sys.stderr))
    parts = assemble(recipe, ":memory:", with_learner=False)
    try:
        if parsed.memory == "run" and run and checkpoint:
            take_over_memory(parts, run, checkpoint)
        result = evaluate_split(
            parts,
            recipe,
            split=parsed.split,
            num_variations=parsed.variations or recipe.eval.num_variations,
            episodes=parsed.episodes or recipe.eval.episodes,
            with_memory=parsed.memory == "run",
        )
    finally:
        parts.close()
    told = {"model": recipe.model.path, "environment": {"name": recipe.env.name, **about(parts.suite)}}
    print_evaluation({**told, **result}, as_json=parsed.json)
    return 0


def take_over_memory(parts: "Parts", run: "RunFolder", checkpoint: "Checkpoint") -> None:
    """The run's tips, as far as this checkpoint's policy could have seen them."""
    from empo2.store import copy_into

    copy_into(parts.connection, run.store)
    parts.memory.rewind(checkpoint.step)


def last_checkpoint(run: "RunFolder") -> "Checkpoint":
    """Raises UsageError if there is none."""
    if checkpoints := run.checkpoints():
        return checkpoints[-1]
    if run.checkpoints_deleted():
        raise UsageError(
            f"{run.path} holds no checkpoint any more (an experiment deletes those of its finished cells; "
            "keep_checkpoints = true in its file keeps them); train it anew in another folder"
        )
    raise UsageError(
        f"{run.path} holds no checkpoint yet; train it further with: empo2 train --resume --run {run.path}"
    )


def recipe_of(parsed: argparse.Namespace, run: "RunFolder | None", checkpoint: "Checkpoint | None") -> Config:
    """The named recipe, or the run's, with the run's checkpoint or the named model as policy."""
    if run is None or checkpoint is None:
        if parsed.memory == "run":
            raise UsageError(f"{parsed.subject} is a model, not a run, and has no memory; leave out --memory run")
        values, policy = config.read_recipe(parsed.recipe or "default"), parsed.subject
    else:
        values = config.read_recipe(parsed.recipe) if parsed.recipe else config.to_dict(run.config())
        policy = str(checkpoint.model)
    recipe = config.from_dict(config.with_overrides(values, [("model.path", policy), *chosen_settings(parsed)]))
    if parsed.memory == "run" and run and recipe.model.embedder != run.config().model.embedder:
        raise UsageError(
            f"the run's memory was written with model.embedder = {run.config().model.embedder}, not "
            f"{recipe.model.embedder}; leave --model.embedder out"
        )
    return recipe


def positive(flag: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise UsageError(f"{flag} must be at least 1, got {value}")


def print_evaluation(result: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    from rich.console import Console
    from rich.table import Table

    from empo2.display import score

    memory = f"with the run's memory ({result['memory_entries']} entries)" if result["memory"] == "run" else "no memory"
    table = Table(title=f"{result['split']} split, {memory}", title_justify="left")
    with_memory = ["tips in scope"] if result["memory"] == "run" else []
    table.add_column("task", no_wrap=True)
    for column in ("episodes", "score", "success %", "valid actions %", "turns", *with_memory):
        table.add_column(column, justify="right")
    for row in [*result["tasks"], {"task": "mean", **result}]:
        rates = [
            f"{row['success_rate'] * 100:.1f}",
            f"{row['valid_action_rate'] * 100:.0f}",
            f"{row['turns_mean']:.1f}",
        ]
        tips = [str(row["memory_entries"])] if with_memory else []
        table.add_row(row["task"], str(row["episodes"]), score(row["score_mean"]), *rates, *tips)
    Console().print(table)
    if len(result["environment"]) > 1:
        print(", ".join(f"{key} {value}" for key, value in result["environment"].items()))
