"""WebShop's reward of a purchase, with its parts, and the repaired one that can be asked for.

reward = (attributes hit + options hit + price within the limit) / (attributes + options + 1) · type
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from empo2.envs.webshop.goals import Goal
from empo2.envs.webshop.products import Product

SURE = 85  #: a fuzzy score above it is a hit
COLOURS = (
    "alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown burgundy camel camo "
    "caramel champagne charcoal cheetah chestnut chocolate christmas coffee cognac copper coral cranberry cream "
    "crystal dark denim eggplant elephant espresso fuchsia gold granite grape graphite grass gray green grey heather "
    "indigo ivory ivy khaki lavender lemon leopard light lilac lime magenta maroon mauve merlot midnight mint mocha "
    "multicolor mushroom mustard natural navy nude olive orange peach pewter pink plum purple rainbow red rose royal "
    "rust sand sapphire seashell silver skull slate steel stone stonewash sunflower tan taupe teal tiger turquoise "
    "violet walnut wheat white wine yellow"
).split()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """``options`` is None where the goal has none, as in the original."""

    total: float
    type: float
    attributes: float
    options: float | None
    price: bool


def reward(
    bought: Product,
    asked: Product,
    goal: Goal,
    price: float,
    chosen: Iterable[str],
    nouns: tuple[Sequence[str], Sequence[str]],
    *,
    fixed: bool = False,
) -> Reward:
    """``price``: the drawn one; ``chosen``: option values; ``nouns``: of the titles of what was bought and asked for.

    ``fixed``: a goal's option is compared by its value, as a person's is; in the original that of a synthetic goal is
    compared as a pair with its name, so that some goals cannot be reached.
    """
    wanted, values = _wanted(goal, fixed=fixed), [_colour_in(value) for value in chosen]
    hit_attributes = sum(_has(bought, attribute) for attribute in goal.attributes)
    hit_options = sum(_any_close(option, values) for option in wanted)
    within = price <= goal.limit
    kind = type_score(bought, asked, *nouns)
    return Reward(
        total=(hit_attributes + hit_options + within) / (len(goal.attributes) + len(wanted) + 1) * kind,
        type=kind,
        attributes=hit_attributes / len(goal.attributes) if goal.attributes else 0.0,
        options=hit_options / len(wanted) if wanted else None,
        price=within,
    )


def type_score(bought: Product, asked: Product, bought_nouns: Sequence[str], asked_nouns: Sequence[str]) -> float:
    """1 for the same kind of product, less where query, category and the titles' nouns say otherwise."""
    shared = _parts(bought.product_category) & _parts(asked.product_category)
    title = len({*bought_nouns} & {*asked_nouns}) / len(asked_nouns) if asked_nouns else 0.2
    if title == 0:
        return 0.0
    if title < 0.1:
        return 0.1
    same = bought.query == asked.query or len(shared) >= 2 or title > 0.2
    return 1.0 if same else 0.5


def fuzzy(one: str, other: str) -> int:
    """thefuzz's `token_set_ratio`, 0 to 100; a set of words that the other holds gives 100."""
    from rapidfuzz.fuzz import token_set_ratio
    from rapidfuzz.utils import default_process

    one, other = (default_process(re.sub(r"[\x80-\xff]", "", text)) for text in (one, other))
    return round(token_set_ratio(one, other)) if one and other else 0


def _any_close(text: str, others: Iterable[str]) -> bool:
    return any(fuzzy(text, other) > SURE for other in others)


def _has(product: Product, attribute: str) -> bool:
    if _any_close(attribute, product.attributes):
        return True
    texts = product.title, " ".join(product.bullets), product.description
    return any(attribute in text.lower() for text in texts)


def _wanted(goal: Goal, *, fixed: bool) -> list[str]:
    """The goal's options as they are compared. Of a synthetic goal that is the pair of name and value, as Python
    prints it, unless one of the two is a colour's word: so a value that only holds one cannot always be hit."""
    if not isinstance(goal.options, Mapping):
        return [_colour_in(value) for value in goal.options]
    if fixed:
        return [_colour_in(value) for value in goal.options.values()]
    return [next((c for c in COLOURS if c in pair), str(pair)) for pair in goal.options.items()]


def _colour_in(value: str) -> str:
    return next((colour for colour in COLOURS if colour in value), value)


def _parts(category: str) -> set[str]:
    return {part.strip() for part in category.split("›")}
