"""The objective, one equation a function; `learner.Learner._accumulate` adds them up. Pure torch, no config is read.

``N`` is the number of completion tokens of one forward pass, laid out flat; every argument and result is [N].
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["token", "sequence", "fixed"]
MAX_LOG_RATIO = 20.0


def importance_ratio(logprobs: Tensor, behavior_logprobs: Tensor) -> Tensor:
    """ρ = π_θ(a | s, u) / π_behavior(a | s', u), [N]; s' may hold tips (EMPO² Table 3) or not (Algorithm 1).

    |log ρ| is limited to 20, as verl does: a ratio of 5·10⁸ is beyond every clip, and exp must not reach infinity.
    """
    return torch.exp(torch.clamp(logprobs - behavior_logprobs, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def clipped_policy_loss(
    ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, dual_clip: float | None
) -> tuple[Tensor, Tensor]:
    """−min(ρA, clip(ρ, 1 − low, 1 + high) A), bounded by −cA where A < 0: loss [N], where clipping decided [N].

    PPO's clipped surrogate with separate bounds ("clip-higher", DAPO) and the dual clip of Ye et al. 2020: for a
    negative advantage the objective is never below c·A, so that one token's huge ratio cannot take over an update.
    """
    unclipped = ratio * advantages
    clipped = torch.clamp(ratio, 1 - clip_low, 1 + clip_high) * advantages
    objective = torch.minimum(unclipped, clipped)
    was_clipped = clipped < unclipped
    if dual_clip is not None:
        bound = dual_clip * advantages
        hits_bound = (advantages < 0) & (objective < bound)
        objective = torch.where(hits_bound, bound, objective)
        was_clipped = was_clipped | hits_bound
    return -objective, was_clipped


def probable_enough(logprobs: Tensor, delta: float) -> Tensor:
    """True [N] where π_θ(a | s, u) ≥ δ: elsewhere the token loses its policy-gradient term (EMPO² section 4.2).

    A test on the current policy in the trained rendering; no gradient goes through it.
    """
    return logprobs.detach() >= math.log(delta)


def k3_divergence(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """exp(d) − d − 1, d = log π_ref − log π_θ, [N]: Schulman's k3 for KL(π_θ ‖ π_ref), unbiased and never negative."""
    difference = reference_logprobs - logprobs
    return torch.exp(difference) - difference - 1


def divergence(logprobs: Tensor, reference: Tensor) -> Tensor:
    """KL(π_θ ‖ π_ref) = Σ_v π_θ (log π_θ − log π_ref) of each row, log-probs [N, V] → [N], in nats.

    What k3 estimates from one token. It does not depend on which token was drawn, nor by whom, and where the policy
    has made a token rare its gradient stays small, while that of k3 grows with π_ref / π_θ. Summed as
    π_θ (log π_θ − log π_ref) − π_θ + π_ref, so that the gradient is exactly 0 where both agree: what rounding would
    leave instead, Adam scales up to whole steps.
    """
    return (logprobs.exp() * (logprobs - reference - 1) + reference.exp()).sum(-1)


def entropy(logprobs: Tensor) -> Tensor:
    """−Σ_v π log π of each row, log-probs [N, V] → [N], in nats."""
    return -(logprobs.exp() * logprobs).sum(-1)


def token_weights(lengths: Sequence[int], aggregation: Aggregation, *, fixed_length: int) -> list[float]:
    """What one completion token of each sequence counts in the loss, [B] → [B].

    ``token``: 1 / (all completion tokens of the whole mini-batch, masked ones included), EMPO² Eq. 2.
    ``sequence``: every sequence counts the same, its tokens share that (GRPO). ``fixed``: 1 / (sequences ×
    fixed_length), which favours no length (Dr. GRPO). A sequence without tokens counts as a sequence. The loss is the
    weighted *sum*, so splitting a mini-batch into micro-batches changes nothing.
    """
    if aggregation == "sequence":
        return [1 / (len(lengths) * length) if length else 0.0 for length in lengths]
    denominator = sum(lengths) if aggregation == "token" else len(lengths) * fixed_length
    return [1 / denominator if denominator else 0.0] * len(lengths)
