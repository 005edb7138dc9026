"""One training step's trajectories → mini-batches → optimiser updates."""

from collections.abc import Sequence
from dataclasses import dataclass

from empo2 import sequences, streams
from empo2.algorithms import Advantages, has_signal
from empo2.config import Config
from empo2.learner import Learner, Logprobs, UpdateStats, learning_rate
from empo2.types import Mode, TrainingSequence, TrajectoryGroup

MASKED_MODES = {"distill": frozenset({Mode.DISTILL}), "all": frozenset(Mode)}


@dataclass(frozen=True, kw_only=True)
class StepUpdate:
    """The updates of one training step."""

    updates: tuple[UpdateStats, ...]
    num_zero_groups: int  #: groups without an advantage, or none above `advantage.skip_below`
    num_skipped_groups: int  #: those of them that were left out, as no KL or entropy term moves them either
    num_computed: int  #: tokens that went through the model for behavior log-probs


def update_policy(
    learner: Learner, groups: Sequence[TrajectoryGroup], advantages: Sequence[Advantages], config: Config, step: int
) -> StepUpdate:
    """Train on one step's groups.

    Groups without advantage are left out before any forward pass and do not count in the loss's denominator; those
    that a KL or entropy term moves are kept for that term alone. Behavior log-probs are computed with the training
    forward before the first update, where they can differ from the current ones. The last mini-batch may be smaller.
    """
    loss = config.loss
    zero = skipped = 0
    trained: list[TrainingSequence] = []
    denominators: list[TrainingSequence] = []  # renderings of the ratio's denominator that are not the trained ones
    for group, values in zip(groups, advantages, strict=True):
        signal = has_signal(values, config.advantage.skip_below)
        zero += not signal
        held = loss.kl_groups == "all" or not any(trajectory.success for trajectory in group.trajectories)
        if not (signal or (loss.kl > 0 and held) or loss.entropy > 0):
            skipped += 1
            continue
        for trajectory, turn_values in zip(group.trajectories, values, strict=True):
            target = sequences.trained(
                trajectory,
                turn_values if signal else (0.0,) * len(turn_values),
                masked_modes=MASKED_MODES[loss.mask_modes],
                held=held,
            )
            denominator = sequences.behavior(trajectory, off_policy_ratio=loss.off_policy_ratio)
            trained += target
            if _has_advantage(target) and [s.token_ids for s in target] != [s.token_ids for s in denominator]:
                denominators += denominator
    order = streams.shuffled(trained, config.train.seed, "mini-batch", step)
    size = config.learner.mini_batch or max(len(order), 1)
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    learner.prepare([*order, *denominators])
    computed_before = learner.tokens_computed
    behavior = _behavior_logprobs(learner, batches, denominators)
    num_computed = learner.tokens_computed - computed_before
    lr = learning_rate(config.learner, step - 1, config.train.steps)
    return StepUpdate(
        updates=tuple(learner.update(batch, behavior, lr) for batch in batches),
        num_zero_groups=zero,
        num_skipped_groups=skipped,
        num_computed=num_computed,
    )


def _behavior_logprobs(
    learner: Learner, batches: Sequence[Sequence[TrainingSequence]], denominators: Sequence[TrainingSequence]
) -> Logprobs:
    """Denominators under the policy that collected: where the rendering differs, and from the second batch on.

    The first batch is trained with that very policy: without a denominator the learner takes its own log-probs, so
    that the ratio is exactly 1. Where there is no advantage the ratio moves nothing, and none is computed.
    """
    found = learner.logprobs(denominators)
    later = [
        sequence
        for batch in batches[1:]
        for sequence in batch
        if sequence.spans[0].key not in found and _has_advantage([sequence])
    ]
    return found | learner.logprobs(later)


def _has_advantage(rendered: Sequence[TrainingSequence]) -> bool:
    return any(span.advantage != 0 for sequence in rendered for span in sequence.spans)
