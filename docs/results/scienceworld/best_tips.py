"""Does the policy a run began with follow the tips of the run's best episodes?

    python docs/results/scienceworld/best_tips.py RUN

RUN: the folder of a run that kept its memory. In each trained variation of which the memory holds a tip of an episode
with 50 points or more, 8 episodes are played with the weights that the run began with, at the temperature of training:
without tips, shown the best one as it was written, and shown only its list of actions.
"""

import shutil
import sqlite3
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from empo2 import config
from empo2.assemble import assemble
from empo2.config import Config
from empo2.evaluate import run_episodes

GOOD, EPISODES = 50, 8
ONLY_ACTIONS = "UPDATE tips SET text = 'It worked. ' || substr(text, instr(text, 'Actions:'))"


def best_tips(memory: Path, folder: str, change: str | None) -> tuple[Path, set[str]]:
    """A copy of the memory that holds good episodes' tips only, and the scopes that it has any of."""
    copy = Path(shutil.copy(memory, folder))
    with sqlite3.connect(copy) as store:
        store.execute("DELETE FROM tips WHERE score < ?", (GOOD,))
        if change:
            store.execute(change)
        return copy, {scope for (scope,) in store.execute("SELECT DISTINCT scope FROM tips")}


def played(recipe: Config, memory: Path, change: str | None, *, with_tips: bool) -> tuple[int, float, int]:
    """Episodes, their mean score, and how many of them have 50 points or more."""
    with tempfile.TemporaryDirectory() as folder:
        copy, scopes = best_tips(memory, folder, change)
        parts = assemble(recipe, copy, with_learner=False)
        try:
            tasks = [task for task in parts.train_tasks if str(task) in scopes]
            ended = run_episodes(
                parts, tasks, episodes=EPISODES, temperature=recipe.collect.temperature, with_memory=with_tips
            )
        finally:
            parts.close()
    scores = [episode.score for episode in ended]
    return len(scores), sum(scores) / len(scores), sum(score >= GOOD for score in scores)


def main() -> None:
    run = Path(sys.argv[1])
    recipe = config.from_dict(config.read_recipe(str(run / "config.toml")))
    recipe = replace(recipe, memory=replace(recipe.memory, k=1))
    for name, change, with_tips in (
        ("no tips", None, False),
        ("the best tip", None, True),
        ("its actions", ONLY_ACTIONS, True),
    ):
        episodes, score, good = played(recipe, run / "memory.sqlite", change, with_tips=with_tips)
        print(f"{name:14}{score:6.1f}   {good} of {episodes} episodes with {GOOD} points or more", flush=True)


if __name__ == "__main__":
    main()
