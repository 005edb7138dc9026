"""A catalogue ready to be shopped in. Indexed once, then mapped from disk; only what is drawn depends on a seed."""

import bisect
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from empo2.envs.webshop import goals
from empo2.envs.webshop.goals import Goal
from empo2.envs.webshop.nouns import nouns
from empo2.envs.webshop.products import Product
from empo2.envs.webshop.reward import Reward, reward
from empo2.envs.webshop.search import MOST_HITS, Postings, SearchIndex


@dataclass(frozen=True)
class Listing:
    """What drawing and counting need of all products, [P] each, without reading them."""

    low: NDArray[np.float64]  #: the price, or the first end of its range
    high: NDArray[np.float64]  #: the other end, NaN where there is one price
    instructed: NDArray[np.bool_]  #: has a synthetic instruction
    num_synthetic: NDArray[np.int64]  #: goals
    num_human: NDArray[np.int64]
    weight: NDArray[np.float64]  #: of each of its synthetic goals


@dataclass(frozen=True)
class Indexed:
    """All that depends on the files alone."""

    products: Sequence[Product]
    listing: Listing
    search: SearchIndex
    by_query: dict[str, list[int]]
    by_category: dict[str, list[int]]


class Indexing:
    """Takes products one by one."""

    def __init__(self) -> None:
        self._postings = Postings()
        self._prices: list[tuple[float, ...]] = []
        self._instructed: list[bool] = []
        self._counts: list[int] = []
        self._human: list[int] = []
        self._attributes: list[tuple[str, ...]] = []
        self._by_query: dict[str, list[int]] = {}
        self._by_category: dict[str, list[int]] = {}

    def add(self, product: Product) -> None:
        place = len(self._prices)
        self._postings.add(product)
        self._prices.append(product.prices)
        self._instructed.append(product.instruction is not None)
        self._counts.append(goals.num_synthetic(product))
        self._human.append(len(goals.askable(product)))
        self._attributes.append(product.instruction_attributes)
        self._by_query.setdefault(product.query, []).append(place)
        self._by_category.setdefault(product.category, []).append(place)

    def done(self, products: Sequence[Product]) -> Indexed:
        listing = Listing(
            low=np.array([prices[0] for prices in self._prices], np.float64),
            high=np.array([prices[1] if len(prices) == 2 else np.nan for prices in self._prices], np.float64),
            instructed=np.array(self._instructed, np.bool_),
            num_synthetic=np.array(self._counts, np.int64),
            num_human=np.array(self._human, np.int64),
            weight=np.array(goals.weights(self._attributes, self._counts), np.float64),
        )
        return Indexed(products, listing, self._postings.index(), self._by_query, self._by_category)


def in_memory(products: Sequence[Product]) -> Indexed:
    indexing = Indexing()
    for product in products:
        indexing.add(product)
    return indexing.done(products)


class Catalogue:
    """``products`` in the files' order; ``goals``: goal i is the benchmark's session i.

    ``limit_goals``: only so many of the goals, drawn as the original does; 0: all.
    """

    def __init__(
        self, parts: Indexed, *, seed: int, human: bool = False, fixed: bool = False, limit_goals: int = 0
    ) -> None:
        rng = random.Random(seed)
        self.products, self._parts, self._fixed = parts.products, parts, fixed
        both = zip(parts.listing.low.tolist(), parts.listing.high.tolist(), strict=True)
        self.prices = [goals.draw_price((low,) if high != high else (low, high), rng) for low, high in both]
        self.goals = Goals(parts, self.prices, rng, human=human, limit=limit_goals)

    def hits(self, text: str, rng: random.Random) -> list[int]:
        """The places of what a search finds, best first. First words `<r>`, `<q>` and `<c>` ask for 50 at random, for
        all with that query and for all of that category; `<a>`, an error in the original, finds nothing."""
        first, *rest = text.split(" ")
        if first == "<r>":
            return rng.sample(range(len(self.products)), min(MOST_HITS, len(self.products)))
        if first == "<q>":
            return self._parts.by_query.get(" ".join(rest).strip(), [])
        if first == "<c>":
            return self._parts.by_category.get(rest[0].strip(), []) if rest else []
        return [] if first == "<a>" else self._parts.search.search(text)

    def reward(self, goal: Goal, bought: int, chosen: Iterable[str]) -> Reward:
        """Of buying the product at place ``bought`` with these option values."""
        product, asked = self.products[bought], self.products[goal.place]
        titles = nouns(product.title), nouns(asked.title)
        return reward(product, asked, goal, self.prices[bought], chosen, titles, fixed=self._fixed)


class Goals(Sequence[Goal]):
    """Made when they are asked for: of a product's millions of option combinations few are ever played."""

    def __init__(
        self, parts: Indexed, prices: Sequence[float], rng: random.Random, *, human: bool, limit: int = 0
    ) -> None:
        self._products, self._make = parts.products, goals.human if human else goals.synthetic
        listing = parts.listing
        #: per limit drawn, the place of its product and where its goals begin in the order in which they are made
        self._places: list[int] = []
        self._starts: list[int] = []
        self._limits: list[float] = []
        self._first: list[int] = []  # the number that the goal at the start has among its product's
        made = 0
        counts = (listing.num_human if human else listing.num_synthetic).tolist()
        for place in np.flatnonzero(listing.num_human if human else listing.instructed).tolist():
            for number in range(counts[place] if human else 1):
                self._places.append(place)
                self._starts.append(made)
                self._limits.append(goals.draw_limit(prices[place], rng))
                self._first.append(number)
                made += 1 if human else counts[place]
        rng = random.Random(goals.ORDER_SEED)
        self._order = goals.order(made, rng)
        if 0 < limit < made:
            of_product = np.ones(len(prices)) if human else listing.weight
            weights = [float(of_product[self._places[self._drawn(goal)]]) for goal in self._order]
            self._order = [self._order[goal] for goal in goals.limited(weights, limit, rng)]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Goal:  # type: ignore[override]
        made = self._order[index]
        drawn = self._drawn(made)
        number = self._first[drawn] + made - self._starts[drawn]
        place = self._places[drawn]
        return self._make(self._products[place], place, self._limits[drawn], number)

    def _drawn(self, made: int) -> int:
        """Which of the limits drawn is that of a goal, counted in the order in which they are made."""
        return bisect.bisect_right(self._starts, made) - 1
