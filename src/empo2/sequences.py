"""Trajectories → training sequences → packs for one forward pass. Pure.

A trajectory has two renderings (types.py). `build` follows one of them: while a turn continues the ids before it, the
episode stays one sequence with one span per completion; where it does not, a new sequence begins. `pack` lays
sequences out as a prefix tree.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

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
    trajectory: Trajectory,
    advantages: Sequence[float],
    *,
    plain: bool,
    masks_improbable: bool = False,
    held: bool = True,
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
                TrainingSequence(
                    token_ids=ids[: spans[-1].stop], spans=tuple(spans), masks_improbable=masks_improbable, held=held
                )
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
    trajectory: Trajectory, advantages: Sequence[float], *, masked_modes: frozenset[Mode], held: bool = True
) -> list[TrainingSequence]:
    """What the update trains on: DISTILL without its tips, the other modes as they acted."""
    return build(
        trajectory,
        advantages,
        plain=trajectory.mode.trains_plain,
        masks_improbable=trajectory.mode in masked_modes,
        held=held,
    )


def behavior(trajectory: Trajectory, *, off_policy_ratio: str) -> list[TrainingSequence]:
    """The rendering under which the ratio's denominator is computed (`loss.off_policy_ratio`)."""
    plain = trajectory.mode.trains_plain and off_policy_ratio == "plain"
    return build(trajectory, [0.0] * len(trajectory.turns), plain=plain or trajectory.mode is Mode.PLAIN)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Tokens ``start`` to ``stop`` of a pack, which attend to each other causally and to all of ``context``.

    A pack's segments tile it; a context is a chain of earlier segments, from the first token on.
    """

    start: int
    stop: int
    context: tuple[tuple[int, int], ...] = ()  #: (start, stop) of the segments before it in its sequences


@dataclass(frozen=True, kw_only=True)
class Pack:
    """One forward pass: sequences as a prefix tree without padding, what several begin with only once.

    Three sequences [p q a b], [p q a c d] and [p q a c e]::

        token_ids     p q a b c d e
        position_ids  0 1 2 3 3 4 4
        segments      (0, 3)  (3, 4, context (0, 3))  (4, 5, context (0, 3))  (5, 6, context (0, 3) (4, 5))  …

    Episodes of one task share their prompts, and the turns in which they acted alike. ``logit_positions`` are the
    places, each once, at which something is predicted. For token n of the flat completion tokens, in span order,
    ``targets[n]`` is its id and ``logit_rows[n]`` the index of its place among them.
    """

    token_ids: tuple[int, ...]
    position_ids: tuple[int, ...]
    segments: tuple[Segment, ...]
    sequences: tuple[TrainingSequence, ...]
    logit_positions: tuple[int, ...]
    logit_rows: tuple[int, ...]
    targets: tuple[int, ...]
    places: tuple[tuple[int, ...], ...]  #: of each sequence: where its tokens lie


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


SHORTEST_SEGMENT = 16  #: a prefix is shared from where it has as many tokens more than the one before it


def pack(sequences: Iterable[TrainingSequence], max_tokens: int) -> list[Pack]:
    """Packs of at most ``max_tokens`` tokens (one sequence alone may exceed it), in an order that shares prefixes."""
    packs: list[Pack] = []
    tree = _Tree()
    for sequence in sorted(sequences, key=lambda s: (s.token_ids, s.spans[0].key)):
        if tree.members and tree.num_tokens + tree.cost(sequence) > max_tokens:
            packs.append(tree.lay_out())
            tree = _Tree()
        tree.add(sequence)
    return [*packs, tree.lay_out()] if tree.members else packs


@dataclass(frozen=True)
class _Piece:
    """Tokens ``start`` to ``stop`` of a sequence, stored with ``member``, one of those that begin with them."""

    start: int
    stop: int
    member: int


class _Tree:
    """The sequences of one pack, added in sorted order: one that comes branches off the path of the last one."""

    def __init__(self) -> None:
        self.members: list[TrainingSequence] = []
        self.num_tokens = 0
        self._branches: list[int] = []  # by member: tokens that it takes from those before it
        self._cuts: list[list[int]] = []  # by member: where others branch off its own tokens
        self._path: list[_Piece] = []  # of the last member

    def cost(self, sequence: TrainingSequence) -> int:
        """Tokens that the sequence would add."""
        return len(sequence.token_ids) - self._branch(sequence)

    def add(self, sequence: TrainingSequence) -> None:
        branch, length, member = self._branch(sequence), len(sequence.token_ids), len(self.members)
        path = [piece for piece in self._path if piece.start < branch]
        if path and branch < path[-1].stop:
            last = path.pop()
            self._cuts[last.member].append(branch)
            path.append(_Piece(last.start, branch, last.member))
        self._path = [*path, _Piece(branch, length, member)] if branch < length else path
        self.members.append(sequence)
        self._branches.append(branch)
        self._cuts.append([])
        self.num_tokens += length - branch

    def _branch(self, sequence: TrainingSequence) -> int:
        """Where the sequence leaves the path of the last one; not much behind another such place."""
        if not self.members:
            return 0
        shared = common_prefix(self.members[-1].token_ids, sequence.token_ids)
        last = max((piece.stop for piece in self._path if piece.stop <= shared), default=0)
        return shared if shared - last >= SHORTEST_SEGMENT else last

    def lay_out(self) -> Pack:
        ids: list[int] = []
        positions: list[int] = []
        segments: list[Segment] = []
        path: list[tuple[int, Segment]] = []  # of the last member: segments and their first tokens' places in it
        places: list[tuple[int, ...]] = []
        predicting: list[int] = []
        targets: list[int] = []
        for sequence, branch, cuts in zip(self.members, self._branches, self._cuts, strict=True):
            path = [(start, segment) for start, segment in path if start < branch]
            bounds = [branch, *sorted(cuts), len(sequence.token_ids)]
            for start, stop in pairwise(bounds):
                if start == stop:
                    continue
                context = tuple((segment.start, segment.stop) for _, segment in path)
                path.append((start, Segment(start=len(ids), stop=len(ids) + stop - start, context=context)))
                segments.append(path[-1][1])
                ids += sequence.token_ids[start:stop]
                positions += range(start, stop)
            shared = places[-1][:branch] if branch else ()
            places.append((*shared, *range(len(ids) - len(sequence.token_ids) + branch, len(ids))))
            for span in sequence.spans:
                predicting += places[-1][span.start - 1 : span.stop - 1]
                targets += sequence.token_ids[span.start : span.stop]
        logit_positions = sorted(set(predicting))
        row_of = {position: row for row, position in enumerate(logit_positions)}
        return Pack(
            token_ids=tuple(ids),
            position_ids=tuple(positions),
            segments=tuple(segments),
            sequences=tuple(self.members),
            logit_positions=tuple(logit_positions),
            logit_rows=tuple(row_of[position] for position in predicting),
            targets=tuple(targets),
            places=tuple(places),
        )
