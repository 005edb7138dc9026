"""One step's updates: which sequences, in which order, with which denominators."""

from dataclasses import dataclass, replace

import pytest
import torch

from empo2 import sequences
from empo2.config import AdvantageConfig, Config, EnvConfig, LearnerConfig, LossConfig, TrainConfig
from empo2.learner import Learner, Logprobs
from empo2.types import EpisodeKey, Mode, SpanKey, TrainingSequence, TrajectoryGroup
from empo2.update import StepUpdate, update_policy
from test_learner import TEMPERATURE, make_learner, plain_model, play_group

UNMASKED = LossConfig(delta=0.0)


def group_of(mode: Mode, *, index: int = 0, shows_tips: bool = True, size: int = 4) -> TrajectoryGroup:
    trajectories = play_group(mode, seed=10 + index, shows_tips=shows_tips, size=size)
    renamed = [replace(t, key=EpisodeKey(1, index, t.key.episode)) for t in trajectories]
    return TrajectoryGroup(task=renamed[0].task, trajectories=tuple(renamed))


def advantages_of(group: TrajectoryGroup) -> tuple[tuple[float, ...], ...]:
    """Per episode 1.5, −0.5, 1.5, …, the same in every turn."""
    return tuple((1.5 - 2 * (e % 2),) * len(t.turns) for e, t in enumerate(group.trajectories))


@dataclass
class Calls:
    """What a step asked of its learner."""

    batches: list[list[TrainingSequence]]
    behaviors: list[Logprobs]
    rates: list[float]
    computed: list[TrainingSequence]  #: sequences given to `logprobs`
    weights: dict[str, torch.Tensor]  #: before the step


def step(
    groups: list[TrajectoryGroup],
    *,
    loss: LossConfig = UNMASKED,
    number: int = 1,
    advantages=None,
    reference=None,
    train: TrainConfig = TrainConfig(steps=4),  # noqa: B008 - frozen
    skip_below: float = 0.0,
    **learner_config,
) -> tuple[StepUpdate, Calls, Learner]:
    """`update_policy` with a learner that is watched."""
    learner = make_learner(loss=loss, reference=reference, **learner_config)
    config = Config(
        train=train,
        env=EnvConfig(name="toy", tasks=("coin-3",)),
        loss=loss,
        advantage=AdvantageConfig(skip_below=skip_below),
        learner=LearnerConfig(**{"max_grad_norm": 1e9, **learner_config}),
    )
    calls = Calls([], [], [], [], {name: value.clone() for name, value in learner.weights().items()})
    update, logprobs = learner.update, learner.logprobs

    def watched_update(batch, behavior, lr):
        calls.batches.append(list(batch))
        calls.behaviors.append(dict(behavior))
        calls.rates.append(lr)
        return update(batch, behavior, lr)

    def watched_logprobs(batch):
        assert not calls.batches, "behavior log-probs must be computed before the first update"
        calls.computed.extend(batch)
        return logprobs(batch)

    learner.update, learner.logprobs = watched_update, watched_logprobs
    result = update_policy(learner, groups, advantages or [advantages_of(g) for g in groups], config, number)
    return result, calls, learner


def direct_logprobs(group: TrajectoryGroup, *, plain: bool) -> Logprobs:
    """Log-probs of every completion after its own prompt: one plain forward pass a turn, no sequences, no packs."""
    model = plain_model(torch.float32, "eager")
    found = {}
    for trajectory in group.trajectories:
        prompts = sequences.prompts(trajectory, plain=plain)
        for index, (turn, prompt) in enumerate(zip(trajectory.turns, prompts, strict=True)):
            said = turn.completion.token_ids
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + said])).logits[0] / TEMPERATURE
            table = torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]
            key = SpanKey(trajectory.key.group, trajectory.key.episode, index)
            found[key] = tuple(table[range(len(said)), said].tolist())
    return found


def assert_same(found: Logprobs, expected: Logprobs) -> None:
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, abs=1e-4)


# ---------------------------------------------------------------- modes


@pytest.mark.parametrize("ratio", ["plain", "behavior"])
@pytest.mark.parametrize("mini_batch", [0, 3])
def test_distilling_without_tips_and_mask_equals_plain(ratio, mini_batch):
    """The same stats and the same weights, bit for bit."""
    loss = replace(UNMASKED, off_policy_ratio=ratio)
    plain, plain_calls, one = step([group_of(Mode.PLAIN, shows_tips=False)], loss=loss, mini_batch=mini_batch, lr=1e-3)
    distilled, calls, other = step(
        [group_of(Mode.DISTILL, shows_tips=False)], loss=loss, mini_batch=mini_batch, lr=1e-3
    )
    assert distilled == plain
    marked = [[replace(sequence, masks_improbable=True) for sequence in batch] for batch in plain_calls.batches]
    assert calls.batches == marked
    weights = other.weights()
    assert all(torch.equal(value, weights[name]) for name, value in one.weights().items())


@pytest.mark.parametrize("mode", Mode)
def test_what_is_trained(mode):
    """DISTILL the rendering without tips, the others what they saw; only DISTILL is masked unless all are."""
    group = group_of(mode)
    _, calls, _ = step([group], loss=LossConfig(delta=0.002))
    expected = [
        sequence
        for trajectory, values in zip(group.trajectories, advantages_of(group), strict=True)
        for sequence in sequences.build(
            trajectory, values, plain=mode is not Mode.WITH_TIPS, masks_improbable=mode is Mode.DISTILL
        )
    ]
    assert sorted(calls.batches[0], key=by_key) == sorted(expected, key=by_key)
    _, calls, _ = step([group], loss=LossConfig(delta=0.002, mask_modes="all"))
    assert all(sequence.masks_improbable for sequence in calls.batches[0])


def by_key(sequence: TrainingSequence) -> SpanKey:
    return sequence.spans[0].key


# ---------------------------------------------------------------- denominators


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("ratio", ["plain", "behavior"])
def test_one_mini_batch_computes_only_denominators_that_differ(mode, ratio):
    """On-policy sequences need no forward pass: their ratio is 1. DISTILL with `behavior` needs the tips rendering."""
    group = group_of(mode)
    result, calls, _ = step([group], loss=replace(UNMASKED, off_policy_ratio=ratio))
    needs_tips = mode is Mode.DISTILL and ratio == "behavior"
    expected = [s for t in group.trajectories for s in sequences.build(t, [0.0] * 3, plain=False)] if needs_tips else []
    assert calls.computed == expected
    assert (result.num_computed > 0) == needs_tips
    assert_same(calls.behaviors[0], direct_logprobs(group, plain=False) if needs_tips else {})
    assert (result.updates[0].ratio_mean == 1.0) == (not needs_tips)


@pytest.mark.parametrize(
    ("mode", "ratio", "plain"),
    [
        (Mode.PLAIN, "plain", True),
        (Mode.WITH_TIPS, "plain", False),
        (Mode.DISTILL, "plain", True),
        (Mode.DISTILL, "behavior", False),
    ],
)
def test_several_mini_batches_use_the_logprobs_of_before_the_first(mode, ratio, plain):
    group = group_of(mode)
    result, calls, _ = step([group], loss=replace(UNMASKED, off_policy_ratio=ratio), mini_batch=2, lr=1e-2)
    direct = direct_logprobs(group, plain=plain)
    assert len(calls.batches) == 2
    if ratio == "plain":  # the first mini-batch is trained by the policy that collected: its ratio is 1 without them
        direct = {span.key: direct[span.key] for sequence in calls.batches[1] for span in sequence.spans}
    for behavior in calls.behaviors:
        assert_same(behavior, direct)
    first, second = result.updates
    assert (first.ratio_mean == 1.0) == (ratio == "plain")
    assert abs(second.ratio_mean - 1) > 1e-3
    assert len(calls.computed) == (len(calls.batches[1]) if ratio == "plain" else len(group.trajectories))


@pytest.mark.parametrize("mini_batch", [0, 2])
def test_num_computed_counts_the_tokens_that_went_through_the_model(mini_batch):
    result, calls, _ = step(
        [group_of(Mode.DISTILL)], loss=replace(UNMASKED, off_policy_ratio="behavior"), mini_batch=mini_batch
    )
    assert result.num_computed == sum(len(packed.token_ids) for packed in sequences.pack(calls.computed, 4096))


def test_the_ratio_of_the_second_mini_batch_is_current_over_collecting_policy():
    """Followed by hand: after the first update, current log-probs against those of the initial weights."""
    group = group_of(Mode.PLAIN)
    result, calls, _ = step([group], mini_batch=2, lr=1e-2)
    by_hand = make_learner(loss=UNMASKED)
    before = by_hand.logprobs(calls.batches[1])
    by_hand.update(calls.batches[0], {}, 1e-2)
    after = by_hand.logprobs(calls.batches[1])
    ratios = torch.tensor([a - b for key in before for a, b in zip(after[key], before[key], strict=True)]).exp()
    assert result.updates[1].ratio_mean == pytest.approx(float(ratios.mean()), rel=1e-3)
    assert result.updates[1].ratio_max == pytest.approx(float(ratios.max()), rel=1e-3)


def test_groups_of_all_modes_in_one_step():
    groups = [group_of(mode, index=index) for index, mode in enumerate(Mode)]
    _, calls, _ = step(groups, loss=replace(UNMASKED, off_policy_ratio="behavior"))
    assert_same(calls.behaviors[0], direct_logprobs(groups[2], plain=False))
    assert {key.group for sequence in calls.batches[0] for key in [by_key(sequence)]} == {0, 1, 2}


# ---------------------------------------------------------------- mini-batches


def test_the_last_partial_mini_batch_is_kept_and_each_sequence_trained_once():
    groups = [group_of(Mode.PLAIN), group_of(Mode.WITH_TIPS, index=1)]
    result, calls, _ = step(groups, mini_batch=3)
    assert [len(batch) for batch in calls.batches] == [3, 3, 2]
    keys = [by_key(sequence) for batch in calls.batches for sequence in batch]
    assert sorted(keys) == [SpanKey(group, episode, 0) for group in range(2) for episode in range(4)]
    assert [u.num_tokens for u in result.updates] == [sum(s.num_trained for s in batch) for batch in calls.batches]


def test_mini_batches_are_drawn_in_an_order_that_seed_and_step_name():
    groups = [group_of(Mode.PLAIN), group_of(Mode.PLAIN, index=1)]

    def order(**named) -> list[SpanKey]:
        return [by_key(s) for batch in step(groups, mini_batch=4, **named)[1].batches for s in batch]

    assert order() == order()
    other = [order(), order(number=2), order(train=TrainConfig(steps=4, seed=1))]
    assert sorted(other[0]) == sorted(other[1]) == sorted(other[2])
    assert len({tuple(keys) for keys in other}) == 3
    assert other[0] != sorted(other[0])


def test_one_mini_batch_holds_everything():
    groups = [group_of(Mode.PLAIN), group_of(Mode.DISTILL, index=1)]
    result, calls, _ = step(groups)
    assert len(result.updates) == 1
    assert len(calls.batches[0]) == 8
    assert len(step(groups, mini_batch=8)[0].updates) == 1


# ---------------------------------------------------------------- groups without advantage


def test_groups_without_advantage_are_left_out_before_any_forward_pass():
    groups = [group_of(Mode.DISTILL), group_of(Mode.DISTILL, index=1)]
    values = [((0.0,) * 3,) * 4, advantages_of(groups[1])]
    behavior = replace(UNMASKED, off_policy_ratio="behavior")
    result, calls, _ = step(groups, loss=behavior, advantages=values)
    alone, alone_calls, _ = step(groups[1:], loss=behavior)
    assert result == replace(alone, num_zero_groups=1, num_skipped_groups=1)
    assert calls.computed == alone_calls.computed
    assert {by_key(sequence).group for sequence in calls.batches[0]} == {1}


def test_groups_with_hardly_any_advantage_are_left_out_where_asked():
    """The size counts, not the sign; at the limit a group is left out."""
    groups = [group_of(Mode.PLAIN, index=index) for index in range(3)]
    values = [(((0.1, -0.1, 0.0),) * 4), ((0.0,) * 3, (-0.2, 0.0, 0.0), *((0.0,) * 3,) * 2), advantages_of(groups[2])]
    result, calls, _ = step(groups, advantages=values, skip_below=0.1)
    assert (result.num_zero_groups, result.num_skipped_groups) == (1, 1)
    assert {by_key(sequence).group for sequence in calls.batches[0]} == {1, 2}
    assert step(groups, advantages=values)[0].num_skipped_groups == 0


def test_a_step_without_any_advantage_updates_nothing():
    group = group_of(Mode.PLAIN)
    result, calls, learner = step([group], advantages=[((0.0,) * 3,) * 4])
    assert result == StepUpdate(updates=(), num_zero_groups=1, num_skipped_groups=1, num_computed=0)
    assert calls.computed == []
    assert all(torch.equal(value, calls.weights[name]) for name, value in learner.weights().items())


@pytest.mark.parametrize("term", ["kl", "entropy"])
def test_a_kl_or_entropy_term_keeps_groups_without_advantage(term):
    reference = make_learner(seed=1).model if term == "kl" else None
    loss = replace(UNMASKED, **{term: 0.1})
    result, calls, learner = step(
        [group_of(Mode.PLAIN)], loss=loss, advantages=[((0.0,) * 3,) * 4], reference=reference
    )
    assert (result.num_zero_groups, result.num_skipped_groups, len(result.updates)) == (1, 0, 1)
    assert any(not torch.equal(value, calls.weights[name]) for name, value in learner.weights().items())


@pytest.mark.parametrize("term", ["kl", "entropy"])
def test_where_it_is_asked_hardly_any_advantage_counts_as_none(term):
    """Such a group is moved by the KL or entropy term alone, as if its advantages were 0."""
    reference = make_learner(seed=1).model if term == "kl" else None
    loss = replace(UNMASKED, **{term: 0.1})
    groups = [group_of(Mode.PLAIN), group_of(Mode.PLAIN, index=1)]
    little = [((0.1, -0.1, 0.0),) * 4, advantages_of(groups[1])]
    none = [((0.0,) * 3,) * 4, advantages_of(groups[1])]
    kept, _, learner = step(groups, loss=loss, advantages=little, skip_below=0.1, reference=reference)
    wanted, _, other = step(groups, loss=loss, advantages=none, reference=reference)
    assert kept == wanted
    assert all(torch.equal(value, other.weights()[name]) for name, value in learner.weights().items())
    assert step(groups, loss=loss, advantages=little, reference=reference)[0] != wanted


def test_the_kl_term_can_hold_groups_without_a_success_only():
    """Those with an advantage and those without; a group with a success is trained for its advantages, or left out."""
    groups = [group_of(Mode.PLAIN, index=index) for index in range(4)]
    for index in (1, 3):
        first, *others = groups[index].trajectories
        groups[index] = replace(groups[index], trajectories=(*others, replace(first, success=True)))
    none = ((0.0,) * 3,) * 4
    values = [advantages_of(groups[0]), advantages_of(groups[1]), none, none]
    loss = replace(UNMASKED, kl=0.1, kl_groups="unsolved")
    reference = make_learner(seed=1).model
    result, calls, _ = step(groups, loss=loss, advantages=values, reference=reference)
    assert {(by_key(s).group, s.held) for s in calls.batches[0]} == {(0, True), (1, False), (2, True)}
    assert (len(calls.batches[0]), result.num_zero_groups, result.num_skipped_groups) == (12, 2, 1)
    everything, calls, _ = step(groups, loss=replace(loss, kl_groups="all"), advantages=values, reference=reference)
    assert {(by_key(s).group, s.held) for s in calls.batches[0]} == {(index, True) for index in range(4)}
    assert (everything.num_zero_groups, everything.num_skipped_groups) == (2, 0)


def test_where_there_is_no_advantage_no_denominator_is_computed():
    """Of the group that the KL term alone moves; it is trained all the same."""
    groups = [group_of(Mode.DISTILL), group_of(Mode.DISTILL, index=1)]
    values = [((0.0,) * 3,) * 4, advantages_of(groups[1])]
    loss = replace(UNMASKED, kl=0.1, off_policy_ratio="behavior")
    result, calls, _ = step(groups, loss=loss, advantages=values, reference=make_learner(seed=1).model)
    assert {by_key(sequence).group for sequence in calls.computed} == {1}
    assert len(calls.batches[0]) == 8
    assert result.num_skipped_groups == 0


def test_the_learning_rate_follows_the_schedule():
    """Steps count from 1; the first of four warm-up steps has a quarter of the rate."""
    for number, rate in ((1, 0.5e-3), (2, 1e-3), (3, 1e-3), (4, 0.5e-3)):
        _, calls, _ = step([group_of(Mode.PLAIN)], number=number, lr=1e-3, warmup_steps=2, schedule="linear")
        assert calls.rates == [pytest.approx(rate)]
