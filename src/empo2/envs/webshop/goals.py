"""What a shopper is asked to buy: prices, limits and goals, drawn from the generator in the original's order."""

import bisect
import itertools
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from empo2.envs.webshop.products import HumanInstruction, Product
from empo2.errors import UsageError

LIMITS = tuple(10.0 * tens for tens in range(1, 100))  #: prices that a limit can be
CONSIDERED = 4  #: limits above the price of which two are drawn
NO_LIMIT = 1_000_000  #: where fewer than two limits lie above the price
ORDER_SEED = 233  #: of the goals' order, whatever the caller's seed


@dataclass(frozen=True, slots=True)
class Goal:
    """One task. ``options``: name → value of a synthetic goal; values only of a person's."""

    place: int  #: of its product in the catalogue
    text: str
    attributes: tuple[str, ...]
    limit: float  #: highest price
    options: Mapping[str, str] | tuple[str, ...]


def draw_price(prices: Sequence[float], rng: random.Random) -> float:
    """Only a product with two prices draws."""
    return rng.uniform(*prices) if len(prices) == 2 else prices[0]


def draw_limit(price: float, rng: random.Random) -> float:
    """The larger of two of the first four limits above the price; nothing is drawn where there are fewer than two."""
    first = bisect.bisect_right(LIMITS, price)
    above = LIMITS[first : first + CONSIDERED]
    return max(rng.sample(above, 2)) if len(above) >= 2 else NO_LIMIT


def num_synthetic(product: Product) -> int:
    """Combinations of option values, 1 without options; 0 without an instruction."""
    return math.prod(map(len, product.options.values())) if product.instruction is not None else 0


def synthetic(product: Product, place: int, limit: float, number: int) -> Goal:
    """Combination ``number`` of the option values: names sorted, the last one's values change fastest."""
    options: dict[str, str] = {}
    for name in sorted(product.options, reverse=True):
        number, chosen = divmod(number, len(product.options[name]))
        options = {name: product.options[name][chosen], **options}
    asked = " with " + ", and ".join(f"{name}: {value}" for name, value in options.items()) if options else ""
    text = f"{product.instruction}{asked}{_price_text(limit)}"
    return Goal(place, text, product.instruction_attributes, limit, options)


def askable(product: Product) -> list[HumanInstruction]:
    """Those of the people's instructions that name attributes."""
    return [instruction for instruction in product.human if instruction.attributes]


def human(product: Product, place: int, limit: float, number: int) -> Goal:
    written = askable(product)[number]
    return Goal(place, f"{written.text.strip('.')}{_price_text(limit)}", written.attributes, limit, written.options)


def order(num_goals: int, rng: random.Random) -> list[int]:
    """Which goal, in the order in which they were made, is goal 0, 1, …; ``rng`` as `ORDER_SEED` leaves it."""
    places = list(range(num_goals))
    rng.shuffle(places)
    return places


def weights(attributes: Sequence[Sequence[str]], counts: Sequence[int]) -> list[float]:
    """Of each product's ``counts`` synthetic goals: the mean over their attributes of 1 / the goals that ask for it."""
    asked: Counter[str] = Counter()
    for names, count in zip(attributes, counts, strict=True):
        for name in names:
            asked[name] += count
    return [
        sum(1 / asked[name] for name in names) / len(names) if names and count else 0.0
        for names, count in zip(attributes, counts, strict=True)
    ]


def limited(weights: Sequence[float], count: int, rng: random.Random) -> list[int]:
    """``count`` different goals, drawn by their weights as the original's `limit_goals` does.

    Its index is one too high: goal 0 is never drawn, goal i has the weight of goal i − 1, the last one that of two.
    Raises UsageError where fewer can be drawn.
    """
    cumulative = [0.0, *itertools.accumulate(weights)]
    last = len(weights) - 1
    can_be_drawn = sum(low < high for low, high in itertools.pairwise([*cumulative[:last], cumulative[-1]]))
    if count > can_be_drawn:
        raise UsageError(f"only {can_be_drawn} of {len(weights)} goals can be drawn, not {count}; set env.limit_goals")
    found: dict[int, None] = {}  # in the order in which they were drawn
    while len(found) < count:
        found[min(bisect.bisect_right(cumulative, rng.uniform(0, cumulative[-1])), last)] = None
    return list(found)


def _price_text(limit: float) -> str:
    return f", and price lower than {limit:.2f} dollars" if limit != NO_LIMIT else ""
