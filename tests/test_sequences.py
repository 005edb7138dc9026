"""Trajectories → sequences → packs: each completion token trained once, in its place, seeing the right tokens."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from empo2 import sequences
from empo2.sequences import Pack, Segment, common_prefix, pack
from empo2.types import (
    Completion,
    Ending,
    EpisodeKey,
    Mode,
    Rendering,
    Span,
    SpanKey,
    Task,
    TokenIds,
    TrainingSequence,
    Trajectory,
    Turn,
)
from test_episode import Beat, episodes, play, renderings, rules, said

modes = st.sampled_from(Mode)


def turn(prompt: Rendering, plain: Rendering, ids: TokenIds, *, logprobs: tuple[float, ...] | None = None) -> Turn:
    return Turn(
        observation="",
        state="",
        tips=(),
        prompt=prompt,
        plain=plain,
        completion=Completion(
            token_ids=ids, logprobs=logprobs or tuple(-0.5 * t for t in ids), text="", truncated=False
        ),
        action="",
        parsed=True,
        valid=True,
        reward=0.0,
    )


def trajectory(mode: Mode, *turns: Turn) -> Trajectory:
    return Trajectory(
        task=Task(environment="toy", name="coin-3", variation=0),
        mode=mode,
        key=EpisodeKey(1, 2, 3),
        policy_version=0,
        turns=turns,
        final_state="",
        ending=Ending.TURN_LIMIT,
        score=0.0,
        success=False,
    )


def two_turns(mode: Mode) -> Trajectory:
    """The example of types.py in numbers: turn 1 shows a tip, 60 61."""
    return trajectory(
        mode,
        turn(Rendering(keep=0, new=(1, 2, 3)), Rendering(keep=0, new=(1, 2, 3)), (10, 11)),
        turn(Rendering(keep=5, new=(4, 60, 61, 5)), Rendering(keep=5, new=(4, 5)), (12,)),
    )


def test_prompts_of_both_renderings():
    episode = two_turns(Mode.DISTILL)
    assert list(sequences.prompts(episode, plain=False)) == [(1, 2, 3), (1, 2, 3, 10, 11, 4, 60, 61, 5)]
    assert list(sequences.prompts(episode, plain=True)) == [(1, 2, 3), (1, 2, 3, 10, 11, 4, 5)]


def test_build_in_numbers():
    episode = two_turns(Mode.DISTILL)
    (with_tips,) = sequences.build(episode, [0.5, -0.5], plain=False, masks_improbable=True)
    assert with_tips == TrainingSequence(
        token_ids=(1, 2, 3, 10, 11, 4, 60, 61, 5, 12),
        spans=(
            Span(start=3, stop=5, key=SpanKey(2, 3, 0), advantage=0.5, sampler_logprobs=(-5.0, -5.5)),
            Span(start=9, stop=10, key=SpanKey(2, 3, 1), advantage=-0.5, sampler_logprobs=(-6.0,)),
        ),
        masks_improbable=True,
    )
    (plain,) = sequences.build(episode, [0.5, -0.5], plain=True)
    assert plain == TrainingSequence(
        token_ids=(1, 2, 3, 10, 11, 4, 5, 12),
        spans=(
            Span(start=3, stop=5, key=SpanKey(2, 3, 0), advantage=0.5, sampler_logprobs=None),
            Span(start=7, stop=8, key=SpanKey(2, 3, 1), advantage=-0.5, sampler_logprobs=None),
        ),
    )


def test_a_turn_that_does_not_continue_begins_a_new_sequence():
    """Turn 1 keeps two of five ids; turn 2 continues turn 1. A turn without a completion has no span."""
    new = Rendering(keep=2, new=(7, 8))
    more = Rendering(keep=5, new=(9,))
    first = Rendering(keep=0, new=(1, 2, 3))
    episode = trajectory(
        Mode.PLAIN, turn(first, first, (10, 11)), turn(new, new, (12,)), turn(more, more, (13,)), turn(more, more, ())
    )
    built = sequences.build(replace(episode, turns=episode.turns[:3]), [1.0, 2.0, 3.0], plain=True)
    assert [(s.token_ids, [(p.start, p.stop, p.advantage) for p in s.spans]) for s in built] == [
        ((1, 2, 3, 10, 11), [(3, 5, 1.0)]),
        ((1, 2, 7, 8, 12, 9, 13), [(4, 5, 2.0), (6, 7, 3.0)]),
    ]
    silent = replace(episode, turns=(*episode.turns[:1], turn(Rendering(keep=5, new=(4,)), new, ())))
    (only,) = sequences.build(silent, [1.0, 2.0], plain=False)
    assert only.token_ids == (1, 2, 3, 10, 11)
    assert sequences.build(replace(episode, turns=episode.turns[3:]), [1.0], plain=True) == []


def test_advantages_must_be_one_per_turn():
    with pytest.raises(ValueError, match="zip"):
        sequences.build(two_turns(Mode.PLAIN), [1.0], plain=True)


@pytest.mark.parametrize(
    ("mode", "trained_plain", "masked"),
    [(Mode.PLAIN, True, False), (Mode.WITH_TIPS, False, False), (Mode.DISTILL, True, True)],
)
def test_what_each_mode_trains_on(mode, trained_plain, masked):
    episode = two_turns(mode)
    values = [0.5, -0.5]
    expected = sequences.build(episode, values, plain=trained_plain, masks_improbable=masked)
    assert sequences.trained(episode, values, masked_modes=frozenset({Mode.DISTILL})) == expected
    for sequence in sequences.trained(episode, values, masked_modes=frozenset(Mode)):
        assert sequence.masks_improbable


@pytest.mark.parametrize(
    ("mode", "ratio", "plain"),
    [
        (Mode.PLAIN, "plain", True),
        (Mode.PLAIN, "behavior", True),
        (Mode.WITH_TIPS, "plain", False),
        (Mode.WITH_TIPS, "behavior", False),
        (Mode.DISTILL, "plain", True),
        (Mode.DISTILL, "behavior", False),
    ],
)
def test_rendering_of_the_denominator(mode, ratio, plain):
    episode = two_turns(mode)
    assert sequences.behavior(episode, off_policy_ratio=ratio) == sequences.build(episode, [0.0, 0.0], plain=plain)


@given(beats=episodes, how=renderings, mode=modes)
@settings(max_examples=80, deadline=None)
def test_every_completion_token_is_trained_once_after_its_own_prompt(beats, how, mode):
    """In either rendering, for append-only episodes and fall-backs alike."""
    episode, _ = play(beats, how, mode)
    advantages = [float(index) for index in range(len(episode.turns))]
    for plain in (True, False):
        prompts = list(sequences.prompts(episode, plain=plain))
        spans = [
            (sequence, span)
            for sequence in sequences.build(episode, advantages, plain=plain)
            for span in sequence.spans
        ]
        assert [span.key for _, span in spans] == [SpanKey(0, 0, index) for index in range(len(episode.turns))]
        for (sequence, span), prompt, played in zip(spans, prompts, episode.turns, strict=True):
            assert sequence.token_ids[: span.start] == prompt
            assert sequence.token_ids[span.start : span.stop] == played.completion.token_ids
            assert span.advantage == span.key.turn
            as_sampled = prompts == list(sequences.prompts(episode, plain=mode is Mode.PLAIN))
            assert span.sampler_logprobs == (played.completion.logprobs if as_sampled else None)


@given(beats=episodes, how=renderings)
@settings(max_examples=40, deadline=None)
def test_distilling_without_tips_is_training_plain(beats, how):
    silent = [replace(beat, tips=()) for beat in beats]
    played = [play(silent, how, mode)[0] for mode in Mode]
    plain, *others = [sequences.trained(e, [0.5] * len(e.turns), masked_modes=frozenset()) for e in played]
    assert others == [plain, plain]


# ---------------------------------------------------------------- packs


def make_sequence(prompt: TokenIds, parts: list[tuple[int, int]], episode: int) -> TrainingSequence:
    """``parts``: per turn the lengths of the completion and of what follows it; ids count up from 100."""
    ids, spans = list(prompt), []
    for index, (length, gap) in enumerate(parts):
        start = len(ids)
        ids += range(100 + start, 100 + start + length + gap)
        key = SpanKey(0, episode, index)
        spans.append(Span(start=start, stop=start + length, key=key, advantage=1.0, sampler_logprobs=None))
    return TrainingSequence(token_ids=tuple(ids[: spans[-1].stop]), spans=tuple(spans))


def episode_of(turns: str, index: int) -> TrainingSequence:
    """One letter a turn: an observation of 20 ids and an action of 2, which depend on the letters so far."""
    ids: list[int] = []
    spans = []
    for number in range(len(turns)):
        seen = sum(ord(letter) * 10**place for place, letter in enumerate(turns[:number]))
        ids += range(1000 * seen, 1000 * seen + 20)
        key = SpanKey(0, index, number)
        spans.append(Span(start=len(ids), stop=len(ids) + 2, key=key, advantage=1.0, sampler_logprobs=None))
        ids += [ord(turns[number]), 7]
    return TrainingSequence(token_ids=tuple(ids), spans=tuple(spans))


#: Prompts that share 0 to 40 of their first ids, and some that are equal; completions may be equal too.
prompts = st.tuples(st.integers(0, 40), st.integers(1, 3), st.integers(0, 3)).map(
    lambda p: (*range(p[0]), *([50 + p[1]] * p[1]), *range(60, 60 + p[2]))
)
parts = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=3)
batches = st.lists(st.tuples(prompts, parts), min_size=1, max_size=8).map(
    lambda rows: [make_sequence(prompt, turns, index) for index, (prompt, turns) in enumerate(rows)]
)
trees = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=12).map(
    lambda rows: [episode_of(turns, index) for index, turns in enumerate(rows)]
)


def seen_at(packed: Pack, position: int) -> tuple[TokenIds, tuple[int, ...]]:
    """What the token at ``position`` of a pack attends to: ids and their position ids, itself last."""
    (segment,) = [s for s in packed.segments if s.start <= position < s.stop]
    visible = [*(at for part in segment.context for at in range(*part)), *range(segment.start, position + 1)]
    return tuple(packed.token_ids[i] for i in visible), tuple(packed.position_ids[i] for i in visible)


def check_pack(packed: Pack) -> Counter[tuple[SpanKey, int]]:
    """Each target is predicted from exactly the ids before it; which (turn, token) this pack trains, in span order."""
    assert len(packed.token_ids) == len(packed.position_ids) == packed.segments[-1].stop
    assert [s.start for s in packed.segments] == [0, *(s.stop for s in packed.segments[:-1])]  # no gap, no overlap
    assert {part for s in packed.segments for part in s.context} <= {(s.start, s.stop) for s in packed.segments}
    for sequence, places in zip(packed.sequences, packed.places, strict=True):
        assert seen_at(packed, places[-1]) == (sequence.token_ids, tuple(range(len(places))))
        assert tuple(packed.token_ids[place] for place in places) == sequence.token_ids
    trained = [(s.token_ids, span, at) for s in packed.sequences for span in s.spans for at in range_of(span)]
    assert packed.logit_positions == tuple(sorted({packed.logit_positions[row] for row in packed.logit_rows}))
    for (ids, _, at), row, target in zip(trained, packed.logit_rows, packed.targets, strict=True):
        assert target == ids[at]
        assert seen_at(packed, packed.logit_positions[row]) == (ids[:at], tuple(range(at)))
    return Counter((span.key, at) for _, span, at in trained)


def range_of(span: Span) -> range:
    return range(span.start, span.stop)


@given(batch=batches | trees, max_tokens=st.integers(1, 250), order=st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_packs(batch, max_tokens, order):
    packs = pack(batch, max_tokens)
    trained = sum((check_pack(packed) for packed in packs), Counter())
    assert trained == Counter((span.key, at) for s in batch for span in s.spans for at in range_of(span))
    for packed in packs:
        assert len(packed.token_ids) <= max_tokens or len(packed.sequences) == 1
    for packed, following in pairwise(packs):  # a pack is closed only where the next sequence would not fit
        (joined,) = pack([*packed.sequences, following.sequences[0]], 10_000)
        assert len(joined.token_ids) > max_tokens
    shuffled = list(batch)
    order.shuffle(shuffled)
    assert pack(shuffled, max_tokens) == packs
    assert sum(len(p.token_ids) for p in packs) <= sum(len(s.token_ids) for s in batch)


def test_pack_in_numbers():
    prompt = tuple(range(16))
    one = make_sequence((*prompt, 20), [(2, 0)], episode=0)
    other = make_sequence((*prompt, 21), [(1, 1), (1, 0)], episode=1)
    (packed,) = pack([other, one], 100)
    assert packed.token_ids == (*prompt, 20, 117, 118, 21, 117, 118, 119)
    assert packed.position_ids == (*prompt, 16, 17, 18, 16, 17, 18, 19)
    assert packed.segments == (
        Segment(start=0, stop=16),
        Segment(start=16, stop=19, context=((0, 16),)),
        Segment(start=19, stop=23, context=((0, 16),)),
    )
    assert packed.sequences == (one, other)
    assert packed.logit_positions == (16, 17, 19, 21)
    assert packed.logit_rows == (0, 1, 2, 3)
    assert packed.targets == (117, 118, 117, 119)


def test_episodes_that_acted_alike_share_those_turns():
    """A tree: two episodes are equal, three begin with the same two turns, one differs in the first."""
    (packed,) = pack([episode_of(turns, index) for index, turns in enumerate(("aab", "b", "aac", "aab", "ab"))], 1000)
    check_pack(packed)
    chosen = [episode_of(turns, 0).token_ids for turns in ("aab", "ab", "b")]
    # what is shared goes up to the action; a prefix is not divided a second time within 16 tokens: "aab" and "aac"
    assert len(packed.token_ids) == len(chosen[0]) + 2 + (len(chosen[1]) - 22 - 20) + (len(chosen[2]) - 20)
    assert packed.segments[2].context == ((0, 20), (20, 42))
    assert len(packed.logit_positions) < len(packed.logit_rows) == 2 * (3 + 1 + 3 + 3 + 2)


def test_a_group_shares_its_prompt_once():
    """Eight episodes of one task: the prompt's tokens go through the model once."""
    prompt = tuple(range(64))
    group = [make_sequence((*prompt, 70 + index), [(1 + index, 0)], index) for index in range(8)]
    (packed,) = pack(group, 1000)
    assert len(packed.token_ids) == 64 + sum(1 + 1 + index for index in range(8))
    short = [make_sequence((*prompt[:15], 70 + index), [(3, 0)], index) for index in range(8)]
    assert [len(packed.segments) for packed in pack(short, 1000)] == [8]


def test_packs_of_nothing():
    assert pack([], 100) == []


def test_a_full_pack_makes_room_for_the_next():
    rows = [make_sequence((index,) * 9, [(1, 0)], index) for index in range(5)]
    assert [len(packed.sequences) for packed in pack(rows, 20)] == [2, 2, 1]
    assert [len(packed.sequences) for packed in pack(rows, 19)] == [1] * 5


@given(a=st.lists(st.integers(0, 1), max_size=12), b=st.lists(st.integers(0, 1), max_size=12))
def test_common_prefix(a, b):
    slow = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert common_prefix(a, b) == common_prefix(tuple(a), tuple(b)) == slow


def test_an_episode_grown_by_the_chat_format_is_packed_as_it_was_acted():
    beats = [Beat(observation=f"room {n}", tips=(f"tip {n}",), completion=said("go north")) for n in range(3)]
    episode, seen = play(beats, rules(), Mode.WITH_TIPS)
    (packed,) = pack(sequences.trained(episode, [1.0] * 3, masked_modes=frozenset()), 4096)
    starts = [packed.logit_positions[row] for row in packed.logit_rows[:: len(said("go north"))]]
    assert [seen_at(packed, position)[0] for position in starts] == seen
