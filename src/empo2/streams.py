"""Counter-based random streams: every draw is a pure function of its name.

A draw is named by the run's seed, a purpose and integer coordinates, e.g. ``uniform(7, "token", step, group, episode,
turn, token)``. No generator object exists, so adding a worker, an evaluation or a log line moves no other draw, and a
resumed run has no generator state to restore.
"""

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def _digest(seed: int, purpose: str, coordinates: tuple[int, ...]) -> int:
    name = f"{seed}/{purpose}/" + "/".join(map(str, coordinates))
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def uniform(seed: int, purpose: str, *coordinates: int) -> float:
    """One draw from [0, 1) with 53 random bits, a pure function of the arguments."""
    return (_digest(seed, purpose, coordinates) >> 11) * 2.0**-53


def derived_seed(seed: int, purpose: str, *coordinates: int) -> int:
    """A 32-bit seed for something that takes one of its own (an environment's reset)."""
    return _digest(seed, purpose, coordinates) >> 32


def shuffled(items: Sequence[Item], seed: int, purpose: str, *coordinates: int) -> list[Item]:
    """The items in an order that depends on nothing but the name."""
    order = list(items)
    random.Random(_digest(seed, purpose, coordinates)).shuffle(order)
    return order
