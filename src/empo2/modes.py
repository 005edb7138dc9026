"""Which of the three learning modes each episode of a step is collected in. Pure."""

from typing import Literal

from empo2 import streams
from empo2.types import Mode

Granularity = Literal["per_group", "per_step", "per_episode"]


def draw_modes(
    granularity: Granularity, *, p: float, q: float, seed: int, step: int, num_groups: int, group_size: int
) -> tuple[tuple[Mode, ...], ...]:
    """Modes of one step, [P groups][G episodes].

    With probability ``p`` an episode acts with tips, and of those a share ``q`` is distilled: PLAIN 1 − p, WITH_TIPS
    p (1 − q), DISTILL p q (EMPO² section 4, Algorithm 1). ``granularity`` says what shares one draw.
    """

    def draw(*coordinates: int) -> Mode:
        if streams.uniform(seed, "mode/tips", step, *coordinates) >= p:
            return Mode.PLAIN
        return Mode.DISTILL if streams.uniform(seed, "mode/distill", step, *coordinates) < q else Mode.WITH_TIPS

    coordinates_of = {
        "per_step": lambda group, episode: (),
        "per_group": lambda group, episode: (group,),
        "per_episode": lambda group, episode: (group, episode),
    }[granularity]
    return tuple(
        tuple(draw(*coordinates_of(group, episode)) for episode in range(group_size)) for group in range(num_groups)
    )
