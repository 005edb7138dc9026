"""Runs of the smoke recipe inside a test process, and what two runs must share to count as the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from empo2 import config
from empo2.assemble import Parts, assemble
from empo2.config import Config
from empo2.run import RunFolder
from empo2.train import train


class Silent:
    def evaluated(self, step: int, result: dict[str, Any]) -> None:
        pass

    def stepped(self, step: int, result: dict[str, Any]) -> None:
        pass


def smoke(*overrides: tuple[str, Any]) -> Config:
    return config.from_dict(config.with_overrides(config.read_recipe("smoke"), overrides))


def run_training(
    folder: Path, recipe: Config, *, stop_after: int | None = None, meddle: Callable[[Parts, int], None] | None = None
) -> RunFolder:
    """Train in this process; ``stop_after`` ends after a step as Ctrl-C does; ``meddle`` is called after each step."""
    run = RunFolder.open(folder) if (folder / "config.toml").exists() else RunFolder.create(folder, recipe)
    parts = assemble(recipe, run.store, with_learner=True)

    class Observer(Silent):
        step = 0

        def stepped(self, step: int, result: dict[str, Any]) -> None:
            self.step = step
            if meddle:
                meddle(parts, step)

    observer = Observer()
    try:
        train(parts, run, observer, lambda: observer.step == stop_after)
    finally:
        parts.close()
    return run


def fingerprint(run: RunFolder) -> dict[str, Any]:
    """Everything that must be equal: metrics without seconds, and the last checkpoint's hashes."""
    faults = ("environment_crashes", "environment_replays")  # what happened on the way, not what came of it
    metrics = [
        {key: value for key, value in line.items() if not key.startswith("seconds_") and key not in faults}
        for line in run.metrics()
    ]
    return {"metrics": metrics, "sha256": run.checkpoints()[-1].state()["sha256"]}


def without_evaluation(print_of_run: dict[str, Any]) -> dict[str, Any]:
    metrics = [{k: v for k, v in line.items() if not k.startswith("eval_")} for line in print_of_run["metrics"]]
    return {**print_of_run, "metrics": metrics}


def dumps(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True)
