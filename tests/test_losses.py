"""The objective: each equation against its slow oracle, the whole against TRL and verl, values and gradients."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracles
from empo2 import losses
from empo2.config import LearnerConfig
from empo2.learner import learning_rate

GOLDEN = json.loads((Path(__file__).parent / "golden" / "losses.json").read_text())
DELTA = math.exp(-5.0)

LOGPROBS = st.floats(-9, -0.01)
TOKENS = st.lists(st.tuples(LOGPROBS, LOGPROBS, st.floats(-3, 3)), min_size=1, max_size=20)  # current, behavior, A


def column(values) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


# ---------------------------------------------------------------- each equation against its oracle


@settings(deadline=None, max_examples=50)
@given(TOKENS)
def test_ratio_equals_the_oracles(tokens):
    current, behavior, _ = zip(*tokens, strict=True)
    expected = [oracles.importance_ratio(*pair) for pair in zip(current, behavior, strict=True)]
    assert losses.importance_ratio(column(current), column(behavior)).tolist() == pytest.approx(expected, rel=1e-12)


@settings(deadline=None, max_examples=80)
@given(TOKENS, st.sampled_from([(0.2, 0.3), (0.2, 0.2), (0.0, 0.0)]), st.sampled_from([None, 1.5, 10.0]))
def test_clipped_loss_equals_the_oracles(tokens, clip, dual_clip):
    low, high = clip
    ratio = losses.importance_ratio(column(t[0] for t in tokens), column(t[1] for t in tokens))
    found, clipped = losses.clipped_policy_loss(
        ratio, column(t[2] for t in tokens), clip_low=low, clip_high=high, dual_clip=dual_clip
    )
    rows = zip(ratio.tolist(), [t[2] for t in tokens], strict=True)
    expected = [oracles.clipped_term(r, a, low, high, dual_clip) for r, a in rows]
    assert found.tolist() == pytest.approx(expected, abs=1e-10)
    unclipped = [-r * t[2] for r, t in zip(ratio.tolist(), tokens, strict=True)]
    assert clipped.tolist() == [new != old for new, old in zip(found.tolist(), unclipped, strict=True)]


@settings(deadline=None, max_examples=50)
@given(TOKENS)
def test_k3_equals_the_oracles_and_is_never_negative(tokens):
    current, reference, _ = zip(*tokens, strict=True)
    found = losses.k3_divergence(column(current), column(reference)).tolist()
    assert found == pytest.approx([oracles.k3(*pair) for pair in zip(current, reference, strict=True)], abs=1e-10)
    assert min(found) >= -1e-15
    assert losses.k3_divergence(column(current), column(current)).tolist() == [0.0] * len(current)


def test_the_divergence_is_what_k3_estimates_and_stays_bounded():
    torch.manual_seed(0)
    logits, reference = torch.randn(2, 4, 50, dtype=torch.float64)
    expected = (logits.softmax(-1) * losses.k3_divergence(logits.log_softmax(-1), reference.log_softmax(-1))).sum(-1)
    policy = logits.log_softmax(-1)
    assert losses.divergence(policy, reference.log_softmax(-1)).tolist() == pytest.approx(expected.tolist())
    assert losses.divergence(policy, policy).tolist() == [0.0] * 4
    same = logits.float().clone().requires_grad_()
    losses.divergence(same.log_softmax(-1), logits.float().log_softmax(-1)).sum().backward()
    assert float(same.grad.abs().max()) == 0.0  # not nearly: Adam would make steps of it
    # a token that was certain and is now at exp(-20): k3 of it is exp(20), the divergence what moving to another costs
    rare, certain = torch.tensor([[0.0, 20.0]]).double().requires_grad_(), torch.tensor([[20.0, 0.0]]).double()
    found = losses.divergence(rare.log_softmax(-1), certain.log_softmax(-1))
    found.sum().backward()
    assert found.tolist() == pytest.approx([20], rel=1e-6)
    assert losses.k3_divergence(rare.log_softmax(-1), certain.log_softmax(-1)).tolist()[0][0] > 1e8
    assert float(rare.grad.abs().max()) < 1e-6


def test_k3_is_an_unbiased_estimate_of_the_divergence():
    """Sum over the vocabulary of pi * k3 = KL(pi || reference)."""
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 50, dtype=torch.float64).log_softmax(-1)
    divergence = (policy.exp() * (policy - reference)).sum()
    assert float((policy.exp() * losses.k3_divergence(policy, reference)).sum()) == pytest.approx(float(divergence))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.floats(-20, 20), min_size=3, max_size=3), min_size=1, max_size=5))
def test_entropy_equals_the_slow_loop(rows):
    def slow(row: list[float]) -> float:
        total = sum(math.exp(logit) for logit in row)
        return -sum(math.exp(logit) / total * math.log(math.exp(logit) / total) for logit in row)

    assert losses.entropy(torch.tensor(rows, dtype=torch.float64).log_softmax(-1)).tolist() == pytest.approx(
        [slow(row) for row in rows], abs=1e-10
    )


def test_entropy_is_in_nats_and_largest_where_all_tokens_are_equal():
    assert losses.entropy(torch.zeros(1, 7, dtype=torch.float64).log_softmax(-1)).tolist() == pytest.approx(
        [math.log(7)], abs=1e-12
    )
    assert losses.entropy(torch.tensor([[0.0, 500.0]]).log_softmax(-1)).tolist() == [0.0]


# ---------------------------------------------------------------- the mask


@settings(deadline=None, max_examples=50)
@given(st.lists(LOGPROBS, min_size=1, max_size=20), st.sampled_from([DELTA, 1e-3, 0.5]))
def test_mask_equals_the_oracles(logprobs, delta):
    expected = [oracles.low_probability_kept(value, delta) for value in logprobs]
    assert losses.probable_enough(column(logprobs), delta).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_of_probability_exactly_delta_is_kept(dtype):
    """Log-prob -5 against delta = exp(-5), and the next number below it; then any other delta."""
    at = torch.tensor(-5.0, dtype=dtype)
    below = torch.nextafter(at, torch.tensor(-6.0, dtype=dtype))
    assert losses.probable_enough(torch.stack([at, below]), DELTA).tolist() == [True, False]
    for step in range(1, 5000):
        delta = step / 5000
        assert losses.probable_enough(torch.tensor([math.log(delta)], dtype=dtype), delta).tolist() == [True], delta


def test_no_gradient_goes_through_the_mask():
    logprobs = column([-1.0, -6.0]).requires_grad_()
    assert not losses.probable_enough(logprobs, DELTA).requires_grad


# ---------------------------------------------------------------- aggregation


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=8))
def test_what_all_tokens_together_count(lengths):
    """By token: 1. By sequence: 1 / sequences for each that has tokens. Fixed: mean length / fixed_length."""

    def shares(aggregation: losses.Aggregation) -> list[float]:
        weights = losses.token_weights(lengths, aggregation, fixed_length=20)
        return [weight * length for weight, length in zip(weights, lengths, strict=True)]

    assert sum(shares("token")) == pytest.approx(1.0 if any(lengths) else 0.0)
    assert shares("sequence") == pytest.approx([(length > 0) / len(lengths) for length in lengths])
    assert sum(shares("fixed")) == pytest.approx(sum(lengths) / (20 * len(lengths)))


def test_a_mini_batch_without_sequences_has_no_weights():
    assert losses.token_weights([], "token", fixed_length=10) == []
    assert losses.token_weights([], "sequence", fixed_length=10) == []
    assert losses.token_weights([], "fixed", fixed_length=10) == []


# ---------------------------------------------------------------- the whole loss against the oracle


@dataclass(frozen=True)
class Knobs:
    clip_low: float = 0.2
    clip_high: float = 0.3
    dual_clip: float | None = 10.0
    delta: float | None = DELTA
    kl: float = 0.0
    aggregation: losses.Aggregation = "token"


def whole_loss(batch: list[oracles.LossSequence], knobs: Knobs) -> tuple[Tensor, Tensor]:
    """The loss as docs/algorithm.md puts it together, and its gradient with respect to the current log-probs."""
    logprobs = column(value for row in batch for value in row["current"]).requires_grad_()
    lengths = [len(row["current"]) for row in batch]
    advantages = column(row["advantage"] for row, length in zip(batch, lengths, strict=True) for _ in range(length))
    maskable = torch.tensor([row["may_mask"] for row in batch for _ in row["current"]], dtype=torch.bool)
    weights = losses.token_weights(lengths, knobs.aggregation, fixed_length=12)
    ratio = losses.importance_ratio(logprobs, column(value for row in batch for value in row["behavior"]))
    policy, _ = losses.clipped_policy_loss(
        ratio, advantages, clip_low=knobs.clip_low, clip_high=knobs.clip_high, dual_clip=knobs.dual_clip
    )
    kept = ~maskable if knobs.delta else torch.ones_like(maskable)
    if knobs.delta:
        kept = kept | losses.probable_enough(logprobs, knobs.delta)
    divergence = losses.k3_divergence(logprobs, column(value for row in batch for value in row["reference"]))
    per_token = torch.where(kept, policy, torch.zeros_like(policy)) + knobs.kl * divergence
    weight = column(weight for weight, length in zip(weights, lengths, strict=True) for _ in range(length))
    loss = (per_token * weight).sum()
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0]


def slow_loss(batch: list[oracles.LossSequence], knobs: Knobs) -> float:
    return oracles.policy_loss(
        batch,
        clip_low=knobs.clip_low,
        clip_high=knobs.clip_high,
        dual_clip=knobs.dual_clip,
        delta=knobs.delta,
        kl_coefficient=knobs.kl,
        aggregation=knobs.aggregation,
        max_tokens=12,
    )


@st.composite
def batches(draw_value) -> list[oracles.LossSequence]:
    def sequence() -> oracles.LossSequence:
        size = draw_value(st.integers(0, 6))
        rows = [draw_value(st.lists(LOGPROBS, min_size=size, max_size=size)) for _ in range(3)]
        return {
            "current": rows[0],
            "behavior": rows[1],
            "reference": rows[2],
            "advantage": draw_value(st.floats(-3, 3)),
            "may_mask": draw_value(st.booleans()),
        }

    return [sequence() for _ in range(draw_value(st.integers(1, 4)))]


@settings(deadline=None, max_examples=80)
@given(
    batches(),
    st.builds(
        Knobs,
        dual_clip=st.sampled_from([None, 3.0, 10.0]),
        delta=st.sampled_from([None, DELTA, 0.1]),
        kl=st.sampled_from([0.0, 0.04]),
        aggregation=st.sampled_from(["token", "sequence", "fixed"]),
    ),
)
def test_the_whole_loss_equals_the_oracles(batch, knobs):
    """Sequences without tokens included: they count as a sequence and add nothing."""
    loss, _ = whole_loss(batch, knobs)
    assert float(loss) == pytest.approx(slow_loss(batch, knobs), rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "fixed"])
@pytest.mark.parametrize("kl", [0.0, 0.04])
def test_the_gradient_is_the_slope_of_the_oracles_loss(aggregation, kl):
    torch.manual_seed(1)
    knobs, size = Knobs(aggregation=aggregation, kl=kl), 1e-6
    batch: list[oracles.LossSequence] = [
        {
            "current": (-7 * torch.rand(length, dtype=torch.float64)).tolist(),
            "behavior": (-7 * torch.rand(length, dtype=torch.float64)).tolist(),
            "reference": (-7 * torch.rand(length, dtype=torch.float64)).tolist(),
            "advantage": advantage,
            "may_mask": may_mask,
        }
        for length, advantage, may_mask in [(5, 1.3, True), (9, -0.7, False), (2, -2.0, True)]
    ]
    _, gradient = whole_loss(batch, knobs)
    slopes = []
    for row in batch:
        for token, value in enumerate(row["current"]):
            around = []
            for moved in (value + size, value - size):
                current = [*row["current"][:token], moved, *row["current"][token + 1 :]]
                around.append(
                    slow_loss([{**other, "current": current} if other is row else other for other in batch], knobs)
                )
            slopes.append((around[0] - around[1]) / (2 * size))
    assert gradient.tolist() == pytest.approx(slopes, abs=1e-7)
    assert any(slope == 0.0 for slope in slopes) == (kl == 0.0)  # clipped and masked tokens were among them


def test_a_masked_token_keeps_its_kl_term_and_its_place_in_the_denominator():
    batch: list[oracles.LossSequence] = [
        {
            "current": [-6.0, -1.0],
            "behavior": [-6.0, -1.0],
            "reference": [-5.0, -1.0],
            "advantage": 1.0,
            "may_mask": True,
        }
    ]
    loss, gradient = whole_loss(batch, Knobs())
    assert float(loss) == -0.5
    assert gradient.tolist() == [0.0, -0.5]
    with_kl, gradient = whole_loss(batch, Knobs(kl=0.1))
    assert float(with_kl) == pytest.approx(-0.5 + 0.05 * (math.e - 2))
    assert gradient[0] == pytest.approx(0.05 * (1 - math.e))


def test_at_the_start_the_gradient_is_minus_the_advantage_of_every_token():
    """Current = behavior: the ratio is 1, so one update with the plain ratio is advantage-weighted likelihood."""
    logprobs = column([-0.1, -2.0, -30.0]).requires_grad_()
    advantages = column([2.0, -1.0, 0.5])
    loss, clipped = losses.clipped_policy_loss(
        losses.importance_ratio(logprobs, logprobs.detach()), advantages, clip_low=0.2, clip_high=0.3, dual_clip=10.0
    )
    assert torch.autograd.grad(loss.sum(), logprobs)[0].tolist() == (-advantages).tolist()
    assert not clipped.any()


def test_the_dual_clip_bounds_the_loss_of_a_bad_token_and_stops_its_gradient():
    ratio = column([9.0, 11.0, 11.0]).requires_grad_()
    advantages = column([-2.0, -2.0, 2.0])
    loss, clipped = losses.clipped_policy_loss(ratio, advantages, clip_low=0.2, clip_high=0.3, dual_clip=10.0)
    assert loss.tolist() == pytest.approx([18.0, 20.0, -2.6])
    assert clipped.tolist() == [False, True, True]
    assert torch.autograd.grad(loss.sum(), ratio)[0].tolist() == [2.0, 0.0, 0.0]


def test_equal_clips_are_ppo_and_wider_ones_only_change_what_lies_between():
    ratio, advantages = column([0.7, 0.9, 1.1, 1.25, 1.5]), column([1.0] * 5)
    narrow, _ = losses.clipped_policy_loss(ratio, advantages, clip_low=0.2, clip_high=0.2, dual_clip=None)
    higher, _ = losses.clipped_policy_loss(ratio, advantages, clip_low=0.2, clip_high=0.3, dual_clip=None)
    assert narrow.tolist() == pytest.approx([-0.7, -0.9, -1.1, -1.2, -1.2])
    assert higher.tolist() == pytest.approx([-0.7, -0.9, -1.1, -1.25, -1.3])


# ---------------------------------------------------------------- TRL and verl


def peer_tensors(case: dict) -> tuple[Tensor, ...]:
    """Log-probs (leaf), behavior, reference, advantages and mask, each [rows, tokens]."""
    batch = GOLDEN["batches"][case["batch"]]
    names = ("log_probs", "old_log_probs", "ref_log_probs", "advantages")
    logprobs, *others = (torch.tensor(batch[name], dtype=torch.float64) for name in names)
    return logprobs.requires_grad_(), *others, torch.tensor(batch["mask"], dtype=torch.bool)


def peer_loss(
    case: dict, *, dual_clip: float | None, kl: float, weights: list[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Our loss of a golden batch, its gradient (0 at masked tokens), which tokens were clipped, and the k3 values."""
    logprobs, behavior, reference, advantages, mask = peer_tensors(case)
    flat = logprobs[mask]
    ratio = losses.importance_ratio(flat, behavior[mask])
    policy, clipped = losses.clipped_policy_loss(
        ratio, advantages[mask], clip_low=0.2, clip_high=0.3, dual_clip=dual_clip
    )
    divergence = losses.k3_divergence(flat, reference[mask])
    weight = torch.tensor(weights, dtype=torch.float64)[:, None].expand(mask.shape)[mask]
    loss = ((policy + kl * divergence) * weight).sum()
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0], clipped, divergence.detach()


def verl_weights(case: dict, lengths: list[int]) -> list[float]:
    """verl's three aggregations in our terms.

    With a `global_batch_info` the four rows are part of a mini-batch of 8 sequences and 40 tokens: our weights come
    from all 8 lengths. verl's means leave a row without tokens out of the number of rows; so it is left out here. Its
    token-sum-norm is our "fixed" with its `loss_scale_factor`, or else the padded width, as length.
    """
    information = case["global_batch_info"]
    aggregation = {"token-mean": "token", "seq-mean-token-mean": "sequence", "seq-mean-token-sum-norm": "fixed"}
    shown = [length for length in lengths if length]
    if information:
        count = information["global_batch_size"] - len(shown)
        elsewhere = [1] * (count - 1) + [information["batch_num_tokens"] - sum(shown) - (count - 1)]
        shown += elsewhere
    weights = iter(
        losses.token_weights(
            shown, aggregation[case["loss_agg_mode"]], fixed_length=information.get("loss_scale_factor", 6)
        )
    )
    return [next(weights) if length else 0.0 for length in lengths]


def describe(case: dict) -> str:
    keys = ("batch", "loss_agg_mode", "clip_ratio_c", "loss_type", "delta", "beta")
    parts = [str(case[key]) for key in keys if key in case]
    return "-".join(parts + ["global"] * bool(case.get("global_batch_info")))


@pytest.mark.parametrize("case", GOLDEN["verl_policy"], ids=describe)
def test_policy_loss_equals_verls(case):
    """All cases: three aggregations, alone and as part of a larger mini-batch, dual clip 3 and 10."""
    mask = torch.tensor(GOLDEN["batches"][case["batch"]]["mask"])
    weights = verl_weights(case, mask.sum(-1).tolist())
    loss, gradient, clipped, _ = peer_loss(case, dual_clip=case["clip_ratio_c"], kl=0.0, weights=weights)
    assert float(loss) == pytest.approx(case["loss"], rel=1e-10)
    torch.testing.assert_close(gradient, torch.tensor(case["grad"], dtype=torch.float64), rtol=1e-10, atol=1e-12)
    theirs = case["pg_clipfrac"] + case["pg_clipfrac_lower"]  # two disjoint sets of tokens, as float32 means
    assert float(clipped.double().mean()) == pytest.approx(theirs, rel=1e-6)


TRL_AGGREGATION = {"dapo": "token", "bnpo": "token", "grpo": "sequence", "dr_grpo": "fixed"}
TRL_COMPARABLE = [case for case in GOLDEN["trl"] if not case["use_bias_correction_kl"]]


def test_what_is_not_compared_with_the_peers():
    """TRL's KL with bias correction: k3 times the ratio, which is not our KL term (6 of its 27 cases).

    verl's k3 where the clamp of the log ratio (20) or of the value (10) binds, which ours does not have (3 of 10
    tokens); its k1 and k2, which we do not offer; its k3+, whose gradient is k2's. TRL's advantages, made in the midst
    of its generation, and verl's of a single rollout (our groups have two or more; test_advantages.py).
    """
    assert len(GOLDEN["trl"]) - len(TRL_COMPARABLE) == 6
    assert set(GOLDEN["verl_kl"]) == {"log_probs", "ref_log_probs", "k1", "k2", "k3", "low_var_kl", "k3+"}


@pytest.mark.parametrize("case", TRL_COMPARABLE, ids=describe)
def test_policy_loss_equals_trls(case):
    """Its `delta` bounds the ratio as our dual clip bounds the loss: the same while delta > 1 + clip_high."""
    lengths = torch.tensor(GOLDEN["batches"][case["batch"]]["mask"]).sum(-1).tolist()
    weights = losses.token_weights(
        lengths, TRL_AGGREGATION[case["loss_type"]], fixed_length=case["max_completion_length"]
    )
    loss, gradient, clipped, divergence = peer_loss(case, dual_clip=case["delta"], kl=case["beta"], weights=weights)
    assert float(loss) == pytest.approx(case["loss"], rel=1e-10)
    torch.testing.assert_close(gradient, torch.tensor(case["grad"], dtype=torch.float64), rtol=1e-10, atol=1e-12)
    if case["delta"] is None:
        theirs = case["clip_low_mean"] + case["clip_high_mean"]
        assert float(clipped.double().mean()) == pytest.approx(theirs, rel=1e-6)
    if "kl" in case:
        assert float(divergence.mean()) == pytest.approx(case["kl"], rel=1e-6)


@pytest.mark.parametrize("name", ["k3", "low_var_kl"])
def test_k3_equals_verls_where_its_clamps_do_not_bind(name):
    golden = GOLDEN["verl_kl"]
    logprobs, reference = column(golden["log_probs"]), column(golden["ref_log_probs"])
    value, gradient = column(golden[name]["value"]), column(golden[name]["grad"])
    free = ((reference - logprobs).abs() < 20) & (value < 10)
    assert int(free.sum()) == 7
    leaf = logprobs[free].requires_grad_()
    found = losses.k3_divergence(leaf, reference[free])
    torch.testing.assert_close(found.detach(), value[free], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), leaf)[0], gradient[free], rtol=1e-10, atol=1e-14)


# ---------------------------------------------------------------- learning rate


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 7), (3, 12), (5, 5), (9, 4)])
def test_learning_rate_equals_the_oracles(schedule, warmup, total):
    config = LearnerConfig(lr=3e-4, warmup_steps=warmup, schedule=schedule)
    for step in range(total):
        expected = oracles.lr_at(step, peak=3e-4, warmup_steps=warmup, total_steps=total, schedule=schedule)
        assert learning_rate(config, step, total) == pytest.approx(expected, rel=1e-12)


def test_a_learning_rate_by_hand():
    """Peak 8, two steps of warm-up, six steps in all."""

    def rates(schedule) -> list[float]:
        config = LearnerConfig(lr=8.0, warmup_steps=2, schedule=schedule)
        return [learning_rate(config, step, 6) for step in range(6)]

    assert rates("constant") == [4, 8, 8, 8, 8, 8]
    assert rates("linear") == [4, 8, 8, 6, 4, 2]
    assert rates("cosine") == pytest.approx([4, 8, 8, 4 + math.sqrt(8), 4, 4 - math.sqrt(8)])
