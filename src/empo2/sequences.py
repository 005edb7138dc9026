"""Trajectories → training sequences → packs for one forward pass. Pure.

A trajectory has two renderings (types.py). `build` follows one of them: while a turn continues the ids before it, the
episode stays one sequence with one span per completion; where it does not, a new sequence begins. `pack` lays
sequences end to end, a prefix that several share only once.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from empo2.types import Mode, Rendering, Span, SpanKey, TokenIds, TrainingSequence, Trajectory, Turn


def rendering_of(turn: Turn, *, plain: bool) -> Rendering:
    return turn.plain if plain else turn.prompt


def prompts(trajectory: Trajectory, *, plain: bool) -> Iterator[TokenIds]:
    """The whole prompt of each turn, rebuilt from the stored differences."""
    before: TokenIds = ()
    for turn in trajectory.turns:
        rendering = rendering_of(turn, plain=plain)
        prompt = before[: rendering.keep] + rendering.new
        yield prompt
        before = prompt + turn.completion.token_ids


def build(
    trajectory: Trajectory, advantages: Sequence[float], *, plain: bool, masks_improbable: bool = False
) -> list[TrainingSequence]:
    """Training sequences of one trajectory under one rendering; ``advantages``: one per turn.

    Spans carry the sampler's log-probs only where this rendering is the one that was sampled. Turns with an empty
    completion have no span.
    """
    as_sampled = plain == (trajectory.mode is Mode.PLAIN) or all(turn.prompt == turn.plain for turn in trajectory.turns)
    sequences: list[TrainingSequence] = []
    spans: list[Span] = []
    ids: TokenIds = ()

    def close() -> None:
        if spans:
            sequences.append(
                TrainingSequence(token_ids=ids[: spans[-1].stop], spans=tuple(spans), masks_improbable=masks_improbable)
            )

    for index, (turn, advantage) in enumerate(zip(trajectory.turns, advantages, strict=True)):
        rendering = rendering_of(turn, plain=plain)
        if rendering.keep != len(ids):
            close()
            spans = []
        ids = ids[: rendering.keep] + rendering.new
        start = len(ids)
        ids += turn.completion.token_ids
        if turn.completion.token_ids:
            spans.append(
                Span(
                    start=start,
                    stop=len(ids),
                    key=SpanKey(trajectory.key.group, trajectory.key.episode, index),
                    advantage=advantage,
                    sampler_logprobs=turn.completion.logprobs if as_sampled else None,
                )
            )
    close()
    return sequences


def trained(
    trajectory: Trajectory, advantages: Sequence[float], *, masked_modes: frozenset[Mode]
) -> list[TrainingSequence]:
    """What the update trains on: DISTILL without its tips, the other modes as they acted."""
    return build(
        trajectory,
        advantages,
        plain=trajectory.mode.trains_plain,
        masks_improbable=trajectory.mode in masked_modes,
    )


def behavior(trajectory: Trajectory, *, off_policy_ratio: str) -> list[TrainingSequence]:
    """The rendering under which the ratio's denominator is computed (`loss.off_policy_ratio`)."""
    plain = trajectory.mode.trains_plain and off_policy_ratio == "plain"
    return build(trajectory, [0.0] * len(trajectory.turns), plain=plain or trajectory.mode is Mode.PLAIN)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Tokens ``start`` to ``stop`` of a pack, which attend to each other causally and to all of ``context``.

    A pack's segments tile it; a context is an earlier segment.
    """

    start: int
    stop: int
    context: tuple[int, int] | None = None  #: (start, stop) of a shared prefix in the same pack


@dataclass(frozen=True, kw_only=True)
class Pack:
    """One forward pass: sequences end to end without padding, common prefixes once.

    Two sequences [p q a b] and [p q c d] with a prefix of two tokens::

        token_ids     p q a b c d
        position_ids  0 1 2 3 2 3
        segments      (0, 2)  (2, 4, context (0, 2))  (4, 6, context (0, 2))

    ``logit_positions[n]`` is where token n of the flat completion tokens is predicted, ``targets[n]`` its id,
    ``rows[n]`` the index of its sequence among those packed, in span order.
    """

    token_ids: tuple[int, ...]
    position_ids: tuple[int, ...]
    segments: tuple[Segment, ...]
    sequences: tuple[TrainingSequence, ...]
    logit_positions: tuple[int, ...]
    targets: tuple[int, ...]
    rows: tuple[int, ...]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading ids that are equal (found by bisection: comparing slices is fast)."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


SHORTEST_SHARED_PREFIX = 16  #: shorter ones are not worth a segment of their own


def pack(sequences: Iterable[TrainingSequence], max_tokens: int) -> list[Pack]:
    """Packs of at most ``max_tokens`` tokens (one sequence alone may exceed it), in an order that shares prefixes.

    The last token before a sequence's first span always stays in the sequence's own segment, so a shared prefix
    predicts no trained token.
    """
    packs: list[Pack] = []
    family: list[TrainingSequence] = []
    families: list[list[TrainingSequence]] = []
    used = 0
    for sequence in sorted(sequences, key=lambda s: (s.token_ids, s.spans[0].key)):
        joined = [*family, sequence]
        cost = _cost(joined) - _cost(family) if family else len(sequence.token_ids)
        fits_family = bool(family) and cost < len(sequence.token_ids)
        cost = min(cost, len(sequence.token_ids))
        if (families or family) and used + cost > max_tokens:
            packs.append(_lay_out([*families, family] if family else families))
            families, family, used = [], [], 0
            cost, fits_family = len(sequence.token_ids), False
        if fits_family:
            family = joined
        else:
            families += [family] if family else []
            family = [sequence]
        used += cost
    if family:
        packs.append(_lay_out([*families, family]))
    return packs


def _shared_prefix(family: Sequence[TrainingSequence]) -> int:
    first = family[0]
    limit = min(sequence.spans[0].start - 1 for sequence in family)
    shared = min([limit, *(common_prefix(first.token_ids, sequence.token_ids) for sequence in family[1:])])
    return shared if shared >= SHORTEST_SHARED_PREFIX else 0


def _cost(family: Sequence[TrainingSequence]) -> int:
    shared = _shared_prefix(family) if len(family) > 1 else 0
    return sum(len(sequence.token_ids) for sequence in family) - shared * (len(family) - 1)


def _lay_out(families: Sequence[Sequence[TrainingSequence]]) -> Pack:
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    logit_positions: list[int] = []
    targets: list[int] = []
    rows: list[int] = []
    packed: list[TrainingSequence] = []
    for family in families:
        shared = _shared_prefix(family) if len(family) > 1 else 0
        context = (len(ids), len(ids) + shared) if shared else None
        if context:
            segments.append(Segment(start=context[0], stop=context[1]))
            ids += family[0].token_ids[:shared]
            positions += range(shared)
        for sequence in family:
            offset = len(ids) - shared
            segments.append(Segment(start=len(ids), stop=offset + len(sequence.token_ids), context=context))
            ids += sequence.token_ids[shared:]
            positions += range(shared, len(sequence.token_ids))
            for span in sequence.spans:
                logit_positions += range(offset + span.start - 1, offset + span.stop - 1)
                targets += sequence.token_ids[span.start : span.stop]
                rows += [len(packed)] * (span.stop - span.start)
            packed.append(sequence)
    return Pack(
        token_ids=tuple(ids),
        position_ids=tuple(positions),
        segments=tuple(segments),
        sequences=tuple(packed),
        logit_positions=tuple(logit_positions),
        targets=tuple(targets),
        rows=tuple(rows),
    )
