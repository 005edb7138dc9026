"""WebShop as an environment: its goals as variations of two tasks, its pages as observations."""

import random
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from empo2.envs.base import Split, replayed
from empo2.envs.webshop import generate, installed, kept
from empo2.envs.webshop.catalogue import Catalogue, Indexed
from empo2.envs.webshop.pages import PER_PAGE, Form
from empo2.envs.webshop.shop import Visit
from empo2.errors import UsageError
from empo2.types import Task, WorkedExample

TASKS = ("synthetic", "human")  #: goals made from products' instructions; goals that people wrote
FIRST: dict[Split, int] = {"test": 0, "dev": 500, "train": 1500}  #: goal of each split; train has all the rest
INSTRUCTIONS = (
    "You buy in a web shop what the instruction asks for. Reply with one action and nothing else. Actions: "
    "search[words], click[name], where the name is a button, a product's code or an option of the page. Choose the "
    "options that are asked for, then click[buy now]."
)


@dataclass(frozen=True)
class WebShopSuite:
    """Tasks `synthetic` and `human`; goal i of the benchmark is variation i. 0–499 test, 500–1,499 dev, then train."""

    catalogue: str = ""  #: folder of the official files; empty: one that is made up
    num_products: int = 0  #: only the first so many; 0: all (made up: `generate.NUM_PRODUCTS`)
    seed: int = 0  #: of prices and price limits, and of what is made up
    page: Form = "text"
    fixed_reward: bool = False
    show_attributes: bool = False
    limit_goals: int = 0  #: only so many goals, drawn by their weights; 0: all
    name: str = "webshop"
    per_worker: int = 64

    def task_names(self) -> tuple[str, ...]:
        return TASKS

    def variations(self, task_name: str, split: Split) -> tuple[int, ...]:
        first, count = FIRST[split], len(self.goods(task_name).goals)
        last = {"test": FIRST["dev"], "dev": FIRST["train"], "train": count}[split]
        return tuple(range(min(first, count), min(last, count)))

    def instructions(self) -> str:
        return INSTRUCTIONS

    def check(self) -> None:
        installed.check()

    def about(self) -> dict[str, Any]:
        """What a result's catalogue is told apart by."""
        _, about = _kept(self.catalogue, self.num_products, self.seed)
        return {"products": about.num_products, "checksum": about.checksum, "seed": self.seed}

    def goods(self, task_name: str) -> Catalogue:
        return _goods(self, task_name == "human")

    def open(self) -> "WebShopEnvironment":
        return WebShopEnvironment(self)


class WebShopEnvironment:
    """One visit at a time. The reward, 0…1, comes with the purchase, which ends the episode."""

    def __init__(self, suite: WebShopSuite) -> None:
        self._suite = suite
        self._visit: Visit | None = None

    def reset(self, task: Task, seed: int) -> tuple[str, dict[str, Any]]:
        """``seed``: of `search[<r>]`, which shows products at random."""
        goods = self._goods(task)
        self._goal = goods.goals[task.variation]
        self._visit = Visit(goods, self._goal, random.Random(seed), attributes=self._suite.show_attributes)
        return self._seen(), {**self._info(), "task": self._goal.text}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self._visit is None or self._visit.bought is not None:
            raise RuntimeError("step() after the episode ended; call reset() first")
        valid = self._visit.act(action)
        bought = self._visit.bought
        info = {**self._info(), "valid": valid, "success": bought is not None and bought.total == 1}
        if bought is not None:
            info["reward"] = asdict(bought)
        return self._seen(), bought.total if bought else 0.0, bought is not None, False, info

    def close(self) -> None:
        self._visit = None

    def worked_example(self, task: Task) -> WorkedExample | None:
        """The purchase that was asked for, with its options.

        None if searching for what is asked does not find it, an option cannot be clicked, or it is worth less than 1.
        """
        goods = self._goods(task)
        goal = goods.goals[task.variation]
        product = goods.products[goal.place]
        for words in (goal.text, " ".join([*goal.attributes, product.query]), product.title):
            words = words.translate(_NO_BRACKETS)
            hits = goods.hits(words.lower(), random.Random(0))
            if goal.place in hits:
                break
        else:
            return None
        wanted = goal.options.values() if isinstance(goal.options, dict) else goal.options
        actions = [f"search[{words}]", *["click[next >]"] * (hits.index(goal.place) // PER_PAGE)]
        actions += [f"click[{product.asin.lower()}]", *(f"click[{value}]" for value in wanted), "click[buy now]"]
        return replayed(self, task, actions)

    def _goods(self, task: Task) -> Catalogue:
        if task.name not in TASKS:
            raise UsageError(f"there is no {task}; `empo2 envs webshop` lists the tasks and their variations")
        goods = self._suite.goods(task.name)
        if not 0 <= task.variation < len(goods.goals):
            raise UsageError(f"there is no {task}: this catalogue has {len(goods.goals)} {task.name} goals")
        return goods

    def _seen(self) -> str:
        assert self._visit is not None
        return self._visit.page.read(self._suite.page)

    def _info(self) -> dict[str, Any]:
        """The state leaves out the instruction, which is the task's, and what was earned."""
        assert self._visit is not None
        told: dict[str, Any] = {"state": self._visit.page.read("short"), "actions": self._visit.possible()}
        if self._visit.bought is None and not told["actions"] and self._suite.page != "short":
            # Where the search bar stands, nothing can be clicked. Small models, for which `short` is, copy this line.
            told["offer"] = "You can:\nsearch[words]"
        return told


_NO_BRACKETS = str.maketrans("[]\n\r", "    ")


@lru_cache(maxsize=4)
def _goods(suite: WebShopSuite, human: bool) -> Catalogue:
    installed.check()
    parts, _ = _kept(suite.catalogue, suite.num_products, suite.seed)
    return Catalogue(parts, seed=suite.seed, human=human, fixed=suite.fixed_reward, limit_goals=suite.limit_goals)


@lru_cache(maxsize=2)
def _kept(folder: str, num_products: int, seed: int) -> tuple[Indexed, kept.About]:
    if folder:
        return kept.kept(Path(folder), limit=num_products or None)
    return kept.kept(generate.catalogue_folder(num_products or generate.NUM_PRODUCTS, seed))
