"""The learner against a slow oracle: each sequence alone, through transformers' own attention, token by token.

Tolerances: log-probs 1e-4, loss 1e-6, gradients relative L2 1e-5 in float32. In float64 they are
1e-10, with RMSNorm kept in float64: transformers casts it to float32, which alone costs 1e-7.
"""

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import oracles
from empo2 import attention as attentions
from empo2 import learner as learners
from empo2 import losses, models, sequences
from empo2.config import LearnerConfig, LossConfig
from empo2.errors import TrainingDiverged, UsageError
from empo2.learner import Learner, UpdateStats, learning_rate
from empo2.types import EpisodeKey, Mode, SpanKey, TrainingSequence, Trajectory
from test_episode import CHAT, VOCABULARY, Beat, play, rules

TEMPERATURE = 0.7
NO_CLIP = 1e9  #: norm to which gradients are clipped: never
PRECISIONS = {torch.float32: ("eager", 1e-5), torch.float64: ("sdpa", 1e-10)}  #: eager's softmax is always float32

Gradients = dict[str, Tensor]
Behavior = dict[SpanKey, tuple[float, ...]]


@pytest.fixture(params=PRECISIONS, ids=["float32", "float64"])
def precision(request, monkeypatch):
    """(dtype, oracle's attention, tolerance)."""
    if request.param is torch.float64:
        monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    return request.param, *PRECISIONS[request.param]


@pytest.fixture
def float64(monkeypatch):
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    return torch.float64


def exact_norm(self, hidden: Tensor) -> Tensor:
    """RMSNorm without the cast to float32."""
    return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def make_learner(
    *, dtype=torch.float32, seed: int = 0, loss: LossConfig | None = None, reference=None, compute_dtype=None, **config
) -> Learner:
    model = models.load_model(models.TINY, dtype=dtype, device="cpu", seed=seed)
    if config.get("last_layers"):
        models.train_last_layers(model, config["last_layers"])
    return Learner(
        model,
        LearnerConfig(**{"max_grad_norm": NO_CLIP, **config}),
        loss or LossConfig(),
        temperature=TEMPERATURE,
        compute_dtype=compute_dtype or dtype,
        reference=reference,
    )


@pytest.fixture(autouse=True, params=[False, True], ids=["many calls", "few calls"], scope="module")
def few_calls(request):
    """Everything here holds for the way of a processor and for that of a GPU: one masked attention a layer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attentions, "in_few_calls", lambda _: request.param)
        yield request.param


def plain_model(dtype: torch.dtype, attention: str, seed: int = 0):
    """The same weights with transformers' own attention; knows nothing of packs."""
    model = models.tiny_model(VOCABULARY, seed).to(dtype).eval()
    model.set_attn_implementation(attention)
    return model


def play_group(
    mode: Mode, *, size: int = 4, turns: int = 3, seed: int = 0, shows_tips: bool = True
) -> list[Trajectory]:
    """Episodes of one task: a common opening, then random completions (some cut), replies and tips."""
    rng = random.Random(seed)
    group = []
    for episode in range(size):
        beats = [
            Beat(
                observation="You are in the hall." if turn == 0 else f"room {rng.randrange(9)}",
                tips=(f"take coin {turn}",) if shows_tips else (),
                completion=(
                    *(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 5))),
                    *([CHAT.closer] if rng.random() < 0.7 else []),
                ),
            )
            for turn in range(3)
        ]
        group.append(play(beats, rules(), mode, key=EpisodeKey(1, 0, episode))[0])
    return group


def batch_of(
    group: Sequence[Trajectory], *, masks: bool = False, per_turn: bool = True, seed: int = 1
) -> list[TrainingSequence]:
    """Their training sequences; advantages differ by episode (and turn) and stay away from 0."""
    rng = random.Random(seed)
    built = []
    for trajectory in group:
        advantages = [rng.choice([-1, 1]) * rng.uniform(0.3, 2.0) for _ in trajectory.turns]
        if not per_turn:
            advantages = [advantages[0]] * len(advantages)
        plain = trajectory.mode.trains_plain
        built += sequences.build(trajectory, advantages, plain=plain, masks_improbable=masks)
    return built


def shifted(behavior: Mapping[SpanKey, Sequence[float]], by: float = 0.4, seed: int = 2) -> Behavior:
    """Log-probs of a somewhat different policy, so that ratios fall on all sides of the clipping bounds."""
    rng = random.Random(seed)
    return {key: tuple(value + rng.uniform(-by, by) for value in values) for key, values in sorted(behavior.items())}


def updated(
    learner: Learner, batch: Sequence[TrainingSequence], behavior: Mapping[SpanKey, Sequence[float]] | None = None
) -> tuple[UpdateStats, Gradients]:
    """An update at learning rate 0: what it saw, and the gradients that the optimiser got."""
    gradients: Gradients = {}

    def keep(*_) -> None:
        gradients.update({n: p.grad.clone() for n, p in learner.model.named_parameters() if p.grad is not None})

    handle = learner.optimizer.register_step_pre_hook(keep)
    stats = learner.update(batch, behavior or {}, 0.0)
    handle.remove()
    return stats, gradients


def distance(found: Gradients, expected: Gradients) -> float:
    """Relative L2 over all parameters."""
    assert found.keys() == expected.keys()
    difference = sum(float((found[n].double() - expected[n].double()).square().sum()) for n in expected)
    whole = sum(float(value.double().square().sum()) for value in expected.values())
    assert whole > 0
    return math.sqrt(difference / whole)


# ---------------------------------------------------------------- the oracle


def slow_logprobs(model, sequence: TrainingSequence) -> list[list[Tensor]]:
    """Per span, per token: log-prob under a plain forward pass of this sequence alone; and the entropies' input."""
    logits = model(input_ids=torch.tensor([sequence.token_ids])).logits[0] / TEMPERATURE
    table = torch.log_softmax(logits, dim=-1)
    return [[table[at - 1, sequence.token_ids[at]] for at in range(s.start, s.stop)] for s in sequence.spans]


def slow_entropy(model, sequence: TrainingSequence) -> Tensor:
    logits = model(input_ids=torch.tensor([sequence.token_ids])).logits[0] / TEMPERATURE
    rows = [at - 1 for span in sequence.spans for at in range(span.start, span.stop)]
    return torch.distributions.Categorical(logits=logits[rows]).entropy().sum()


def slow_divergences(model, reference, sequence: TrainingSequence) -> list[list[Tensor]]:
    """Per span, per token: KL(model || reference) over the whole vocabulary."""
    ours, theirs = (
        torch.distributions.Categorical(
            logits=each(input_ids=torch.tensor([sequence.token_ids])).logits[0] / TEMPERATURE
        )
        for each in (model, reference)
    )
    table = torch.distributions.kl_divergence(ours, theirs)
    return [[table[at - 1] for at in range(s.start, s.stop)] for s in sequence.spans]


def exact(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def slow_loss(
    model, batch: Sequence[TrainingSequence], behavior: Behavior, loss: LossConfig, reference=None
) -> tuple[Tensor, dict[str, float]]:
    """The objective as docs/algorithm.md words it, one token after the other; and what happened to the tokens."""
    num_tokens = sum(sequence.num_trained for sequence in batch)
    total, counts = exact(0.0), dict.fromkeys(("clipped", "masked", "ratio", "kl", "entropy"), 0.0)
    for sequence in batch:
        divisor = {
            "token": num_tokens,
            "sequence": len(batch) * sequence.num_trained,
            "fixed": len(batch) * loss.fixed_length,
        }[loss.aggregation]
        entropy = slow_entropy(model, sequence)
        counts["entropy"] += float(entropy.detach())
        total = total - loss.entropy * entropy / divisor
        references = slow_logprobs(reference, sequence) if reference is not None else None
        for index, (span, tokens) in enumerate(zip(sequence.spans, slow_logprobs(model, sequence), strict=True)):
            for at, logprob in enumerate(tokens):
                ratio = torch.exp(logprob - behavior[span.key][at])
                bounded = exact(min(max(ratio.item(), 1 - loss.clip_low), 1 + loss.clip_high))
                inside = 1 - loss.clip_low <= ratio <= 1 + loss.clip_high
                objective = ratio * span.advantage if inside else min(ratio * span.advantage, bounded * span.advantage)
                if loss.dual_clip is not None and span.advantage < 0:
                    objective = max(objective, exact(loss.dual_clip * span.advantage))
                masked = sequence.masks_improbable and float(logprob.detach()) < math.log(loss.delta or 1e-300)
                counts["ratio"] += float(ratio.detach())
                counts["masked"] += masked
                counts["clipped"] += not masked and not objective.requires_grad
                if not masked:
                    total = total - objective / divisor
                if references is not None and sequence.held:
                    x = torch.exp(references[index][at].detach() - logprob)
                    divergence = x - torch.log(x) - 1
                    if loss.kl_estimator == "exact":
                        divergence = slow_divergences(model, reference, sequence)[index][at]
                    counts["kl"] += float(divergence.detach())
                    total = total + loss.kl * divergence / divisor
    num_held = sum(sequence.num_trained for sequence in batch if sequence.held)
    return total, {name: value / (num_held if name == "kl" else num_tokens) for name, value in counts.items()}


LOSSES = {
    "default": LossConfig(),
    "masked": LossConfig(delta=0.002),
    "nothing masked": LossConfig(delta=0.0),
    "per sequence": LossConfig(aggregation="sequence", delta=0.002),
    "fixed": LossConfig(aggregation="fixed", fixed_length=40, delta=0.002),
    "tight clipping": LossConfig(clip_low=0.05, clip_high=0.1, dual_clip=1.2, delta=0.0),
    "no dual clip": LossConfig(dual_clip=None, delta=0.0),
    "kl and entropy": LossConfig(kl=0.1, entropy=0.05, delta=0.002),
    "exact kl": LossConfig(kl=0.1, kl_estimator="exact", delta=0.002),
    "kl of some": LossConfig(kl=0.1, kl_groups="unsolved", delta=0.002),
    "exact kl of some": LossConfig(kl=0.1, kl_estimator="exact", kl_groups="unsolved", delta=0.002),
}


def in_parts(patch: pytest.MonkeyPatch, places: int = 3) -> None:
    """Logits of so many places at once."""
    patch.setattr(learners, "MOST_LOGITS", places * VOCABULARY)


@pytest.mark.parametrize("parts", [False, True], ids=["logits at once", "in parts"])
@pytest.mark.parametrize("name", LOSSES)
def test_update_equals_the_slow_oracle(name, precision, parts, monkeypatch):
    """Loss, gradients and figures; sequences share a prefix, every kind of clipping and masking occurs."""
    dtype, attention, tolerance = precision
    if parts:
        in_parts(monkeypatch)
    loss = LOSSES[name]
    reference = models.load_model(models.TINY, dtype=dtype, device="cpu", seed=1) if loss.kl else None
    learner = make_learner(dtype=dtype, loss=loss, reference=reference)
    batch = batch_of(play_group(Mode.DISTILL), masks=True) + batch_of(
        [replace(t, key=EpisodeKey(1, 1, t.key.episode)) for t in play_group(Mode.WITH_TIPS, seed=5)]
    )
    if loss.kl_groups == "unsolved":
        batch = [replace(sequence, held=number % 3 == 0) for number, sequence in enumerate(batch)]
    behavior = shifted(learner.logprobs(batch))
    stats, found = updated(learner, batch, behavior)

    model = plain_model(dtype, attention)
    slow_reference = plain_model(dtype, attention, seed=1) if loss.kl else None
    expected, counts = slow_loss(model, batch, behavior, loss, slow_reference)
    expected.backward()
    assert stats.loss == pytest.approx(expected.item(), abs=1e-6 if dtype is torch.float32 else 1e-12)
    assert distance(found, {n: p.grad for n, p in model.named_parameters()}) <= tolerance
    figures = (stats.clip_fraction, stats.masked_fraction, stats.ratio_mean, stats.kl, stats.entropy)
    assert figures == pytest.approx(
        tuple(counts[name] for name in ("clipped", "masked", "ratio", "kl", "entropy")), rel=1e-5
    )
    assert stats.clip_fraction > 0
    assert (stats.masked_fraction > 0) == (loss.delta > 0)
    assert stats.num_computed < sum(len(sequence.token_ids) for sequence in batch)
    assert stats.num_tokens == sum(sequence.num_trained for sequence in batch)
    assert stats.grad_norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in found.values())), rel=1e-5)


def test_a_token_that_is_not_held_cannot_spoil_the_step_through_k3(monkeypatch):
    """It stands at the policy's own log-prob before the exponential, which may be infinite, and 0 · inf is NaN."""
    loss = LossConfig(kl=0.1, kl_estimator="k3", kl_groups="unsolved")
    reference = models.load_model(models.TINY, dtype=torch.float32, device="cpu", seed=1)
    batch = batch_of(play_group(Mode.WITH_TIPS))
    batch = [replace(sequence, held=number == 0) for number, sequence in enumerate(batch)]
    learner = make_learner(loss=loss, reference=reference)
    behavior = shifted(learner.logprobs(batch))
    expected, wanted = updated(make_learner(loss=loss, reference=reference), batch, behavior)

    k3, cut_off = losses.k3_divergence, []

    def counting(logprobs, references):
        cut_off.append(int((references == logprobs.detach()).sum()))
        return k3(logprobs, references)

    monkeypatch.setattr(losses, "k3_divergence", counting)
    stats, found = updated(learner, batch, behavior)
    assert sum(cut_off) == sum(sequence.num_trained for sequence in batch[1:]) > 0
    assert stats.loss == expected.loss
    assert distance(found, wanted) == 0


@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name].kl_estimator == "k3"])
def test_loss_equals_the_oracle_in_plain_floats(name):
    """The same number from tests/oracles.py, which knows no tensors and the drawn tokens alone."""
    loss = LOSSES[name]
    reference = models.load_model(models.TINY, dtype=torch.float32, device="cpu", seed=1) if loss.kl else None
    learner = make_learner(loss=replace(loss, entropy=0.0), reference=reference)
    batch = batch_of(play_group(Mode.DISTILL), masks=True, per_turn=False)
    current = learner.logprobs(batch)
    behavior = shifted(current)
    references = make_learner(seed=1).logprobs(batch)

    def values(table: Mapping[SpanKey, Sequence[float]], sequence: TrainingSequence) -> list[float]:
        return [value for span in sequence.spans for value in table[span.key]]

    expected = oracles.policy_loss(
        [
            {
                "current": values(current, sequence),
                "behavior": values(behavior, sequence),
                "reference": values(references, sequence),
                "advantage": sequence.spans[0].advantage,
                "may_mask": True,
            }
            for sequence in batch
        ],
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
        dual_clip=loss.dual_clip,
        delta=loss.delta,
        kl_coefficient=loss.kl,
        aggregation=loss.aggregation,
        max_tokens=loss.fixed_length,
    )
    assert updated(learner, batch, behavior)[0].loss == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("parts", [False, True], ids=["logits at once", "in parts"])
def test_logprobs_equal_a_plain_forward(precision, parts, monkeypatch):
    dtype, attention, _ = precision
    if parts:
        in_parts(monkeypatch)
    batch = batch_of(play_group(Mode.WITH_TIPS, size=6))
    model = plain_model(dtype, attention)
    found = make_learner(dtype=dtype).logprobs(batch)
    assert sorted(found) == sorted(span.key for sequence in batch for span in sequence.spans)
    for sequence in batch:
        for span, tokens in zip(sequence.spans, slow_logprobs(model, sequence), strict=True):
            expected = [float(token.detach()) for token in tokens]
            assert found[span.key] == pytest.approx(expected, abs=1e-5 if dtype is torch.float32 else 1e-12)


# ---------------------------------------------------------------- packing changes nothing


def one_per_turn(batch: Sequence[TrainingSequence]) -> list[TrainingSequence]:
    """What training turn by turn would use: each completion with the whole conversation before it."""
    return [replace(s, token_ids=s.token_ids[: span.stop], spans=(span,)) for s in batch for span in s.spans]


@pytest.mark.parametrize("mode", [Mode.WITH_TIPS, Mode.DISTILL])
def test_one_sequence_per_episode_equals_one_per_turn(mode, precision):
    dtype, _, tolerance = precision
    loss = LossConfig(delta=0.002, kl=0.1, entropy=0.05)
    reference = models.load_model(models.TINY, dtype=dtype, device="cpu", seed=1)
    learner = make_learner(dtype=dtype, loss=loss, reference=reference)
    batch = batch_of(play_group(mode), masks=True)
    turns = one_per_turn(batch)
    assert len(turns) == 3 * len(batch)
    behavior = shifted(learner.logprobs(batch))
    whole, expected = updated(learner, turns, behavior)
    stats, found = updated(learner, batch, behavior)
    assert distance(found, expected) <= tolerance
    assert stats.loss == pytest.approx(whole.loss, abs=1e-6 if dtype is torch.float32 else 1e-12)
    assert stats.num_tokens == whole.num_tokens


def test_order_and_micro_batches_change_nothing(float64):
    batch = batch_of(play_group(Mode.DISTILL, size=6), masks=True)
    loss = LossConfig(delta=0.002, aggregation="sequence")
    learner = make_learner(dtype=float64, loss=loss)
    logprobs = learner.logprobs(batch)
    behavior = shifted(logprobs)
    whole, expected = updated(learner, batch, behavior)
    for micro_batch_tokens in (1, 300, 100_000):
        other = make_learner(dtype=float64, loss=loss, micro_batch_tokens=micro_batch_tokens)
        for order in (batch, batch[::-1], random.Random(3).sample(batch, len(batch))):
            stats, found = updated(other, order, behavior)
            assert distance(found, expected) <= 1e-10
            assert stats.loss == pytest.approx(whole.loss, abs=1e-12)
            assert stats.masked_fraction == whole.masked_fraction
            for part in (order, order[:2]):
                again = other.logprobs(part)
                assert again.keys() == {span.key for sequence in part for span in sequence.spans}
                for key, values in again.items():
                    assert values == pytest.approx(logprobs[key], abs=1e-12)


def test_an_episode_that_falls_back_to_several_sequences_trains_the_same_tokens(float64):
    """A window as wide as the episode, cut by hand into one sequence per turn, is what `build` makes of a real one."""
    beats = [Beat(observation=f"room {n}", completion=(5 + n, 9, CHAT.closer)) for n in range(4)]
    short, _ = play(beats, rules(window_turns=1), Mode.PLAIN)
    batch = sequences.build(short, [1.0] * 4, plain=True)
    assert len(batch) == 3
    learner = make_learner(dtype=float64, loss=LossConfig(delta=0.0))
    by_hand = [
        TrainingSequence(
            token_ids=prompt + turn.completion.token_ids,
            spans=(replace(span, start=len(prompt), stop=len(prompt) + 3),),
        )
        for prompt, turn, span in zip(
            sequences.prompts(short, plain=True), short.turns, [span for s in batch for span in s.spans], strict=True
        )
    ]
    assert distance(updated(learner, batch)[1], updated(learner, by_hand)[1]) <= 1e-10


def test_distilling_without_tips_and_mask_equals_plain_bit_for_bit():
    results = []
    for mode in (Mode.PLAIN, Mode.DISTILL):
        batch = batch_of(play_group(mode, shows_tips=False))
        results.append(updated(make_learner(loss=LossConfig(delta=0.0)), batch))
    (plain, plain_gradients), (distilled, gradients) = results
    assert distilled == plain
    assert all(torch.equal(gradients[name], plain_gradients[name]) for name in plain_gradients)


# ---------------------------------------------------------------- weights of tokens, mask, KL


def test_token_weights():
    weights = losses.token_weights([1, 3, 6], "token", fixed_length=5)
    assert weights == [0.1, 0.1, 0.1]
    assert losses.token_weights([1, 3, 6], "sequence", fixed_length=5) == pytest.approx([1 / 3, 1 / 9, 1 / 18])
    assert losses.token_weights([1, 3, 6], "fixed", fixed_length=5) == pytest.approx([1 / 15] * 3)


def test_a_masked_token_loses_its_policy_term_and_keeps_kl_and_entropy():
    """With δ above every probability, an update is that of the KL and entropy terms alone."""
    reference = models.load_model(models.TINY, dtype=torch.float32, device="cpu", seed=1)
    terms = LossConfig(delta=0.999, kl=0.1, entropy=0.05)
    batch = batch_of(play_group(Mode.DISTILL), masks=True)
    stats, found = updated(make_learner(loss=terms, reference=reference), batch)
    assert stats.masked_fraction == 1
    silent = [
        replace(s, spans=tuple(replace(span, advantage=0.0) for span in s.spans), masks_improbable=False) for s in batch
    ]
    without, expected = updated(make_learner(loss=terms, reference=reference), silent)
    assert without.masked_fraction == 0
    assert distance(found, expected) <= 1e-6
    assert stats.loss == pytest.approx(without.loss, abs=1e-6)


def test_the_mask_acts_on_the_marked_sequences_only():
    batch = batch_of(play_group(Mode.DISTILL), masks=True)
    assert updated(make_learner(loss=LossConfig(delta=0.999)), batch)[0].masked_fraction == 1
    marked = [batch[0], *(replace(sequence, masks_improbable=False) for sequence in batch[1:])]
    stats = updated(make_learner(loss=LossConfig(delta=0.999)), marked)[0]
    assert stats.masked_fraction == pytest.approx(batch[0].num_trained / stats.num_tokens)


def test_masked_tokens_count_in_the_denominator():
    """Masking half of the tokens halves the loss of ratio-1 tokens; it does not average over the rest."""
    batch = batch_of(play_group(Mode.DISTILL, size=1), per_turn=False)
    learner = make_learner(loss=LossConfig(delta=0.002))
    (values,) = [[v for span in batch[0].spans for v in learner.logprobs(batch)[span.key]]]
    kept = sum(value >= math.log(0.002) for value in values)
    assert 0 < kept < len(values)
    stats = updated(learner, [replace(batch[0], masks_improbable=True)])[0]
    assert stats.loss == pytest.approx(-batch[0].spans[0].advantage * kept / len(values), rel=1e-5)


def test_an_infinite_ratio_at_a_masked_token_leaves_finite_gradients():
    batch = batch_of(play_group(Mode.DISTILL), masks=True)
    learner = make_learner(loss=LossConfig(delta=0.002))
    current = learner.logprobs(batch)
    impossible = {
        key: tuple(value if value >= math.log(0.002) else -1e4 for value in values) for key, values in current.items()
    }
    assert impossible != current
    stats, found = updated(learner, batch, impossible)
    _, expected = updated(learner, batch, current)
    assert not stats.skipped
    assert distance(found, expected) <= 1e-6


def test_an_infinite_ratio_that_clipping_decides_leaves_finite_gradients():
    """exp overflows, the objective is a constant there: no gradient, not NaN."""
    batch = batch_of(play_group(Mode.PLAIN))
    learner = make_learner(loss=LossConfig(delta=0.0))
    span = batch[0].spans[0]
    stats, _ = updated(learner, batch, {span.key: (-1e4,) * (span.stop - span.start)})
    assert not stats.skipped


def test_kl_is_measured_against_the_frozen_reference():
    reference = models.load_model(models.TINY, dtype=torch.float32, device="cpu", seed=0)
    before = {name: p.clone() for name, p in reference.named_parameters()}
    learner = make_learner(loss=LossConfig(kl=0.5, delta=0.0), reference=reference)
    batch = batch_of(play_group(Mode.PLAIN))
    first, second = (learner.update(batch, {}, 1e-2) for _ in range(2))
    assert first.kl == pytest.approx(0.0, abs=1e-6)
    assert second.kl > 1e-3
    assert all(torch.equal(before[name], p) for name, p in reference.named_parameters())


# ---------------------------------------------------------------- updates


def test_an_update_goes_down_the_gradient_at_the_given_rate():
    """Adam's first step moves every weight by the rate, against its gradient's sign."""
    learner = make_learner(lr=7.0)
    batch = batch_of(play_group(Mode.PLAIN))
    gradients = updated(make_learner(), batch)[1]
    before = {name: value.clone() for name, value in learner.weights().items()}
    learner.update(batch, {}, 1e-3)
    for name, value in learner.weights().items():
        large = gradients[name].abs() > 1e-6
        moved = (value - before[name])[large]
        assert torch.allclose(moved, -1e-3 * gradients[name][large].sign(), rtol=2e-2)


def test_without_behavior_logprobs_every_ratio_is_one():
    batch = batch_of(play_group(Mode.PLAIN))
    stats, _ = updated(make_learner(), batch)
    assert (stats.ratio_mean, stats.ratio_max, stats.clip_fraction) == (1.0, 1.0, 0.0)
    total = sum((span.stop - span.start) * span.advantage for s in batch for span in s.spans)
    assert stats.loss == pytest.approx(-total / stats.num_tokens, abs=1e-6)


def test_gradients_are_clipped_to_the_norm():
    batch = batch_of(play_group(Mode.PLAIN))
    stats, free = updated(make_learner(), batch)
    limited, clipped = updated(make_learner(max_grad_norm=0.5), batch)
    assert limited.grad_norm == stats.grad_norm > 0.5
    assert distance(clipped, {name: value * (0.5 / stats.grad_norm) for name, value in free.items()}) < 1e-5


def test_an_update_with_nan_is_skipped_and_the_third_in_a_row_ends_the_run():
    learner = make_learner()
    batch = batch_of(play_group(Mode.PLAIN))
    learner.update(batch, {}, 1e-3)
    span = batch[0].spans[0]
    broken = {span.key: (math.nan,) * (span.stop - span.start)}

    def state() -> Gradients:
        return {n: value.clone() for n, value in {**learner.weights(), **learner.optimizer_tensors()}.items()}

    before = state()
    for _ in range(2):
        assert learner.update(batch, broken, 1e-3).skipped
    after = state()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not learner.update(batch, {}, 1e-3).skipped  # a good one in between: counting begins anew
    for _ in range(2):
        assert learner.update(batch, broken, 1e-3).skipped
    before = state()
    with pytest.raises(TrainingDiverged, match="three updates in a row"):
        learner.update(batch, broken, 1e-3)
    assert all(torch.equal(before[name], value) for name, value in state().items())


def test_an_update_that_breaks_the_weights_ends_the_run():
    learner = make_learner()
    with pytest.raises(TrainingDiverged, match="in the weights"):
        learner.update(batch_of(play_group(Mode.PLAIN)), {}, 1e39)


def test_a_limit_of_zero_clips_nothing():
    batch = batch_of(play_group(Mode.PLAIN))
    free, unlimited = (
        updated(make_learner(max_grad_norm=1e9), batch)[1],
        updated(make_learner(max_grad_norm=0), batch)[1],
    )
    assert distance(free, unlimited) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_weights_are_noticed(value):
    learner = make_learner()
    with torch.no_grad():
        next(learner.model.parameters())[0, 0] = value
    before = {name: weight.clone() for name, weight in learner.weights().items()}
    assert learner.update(batch_of(play_group(Mode.PLAIN)), {}, 1e-3).skipped
    assert all(torch.equal(before[n].nan_to_num(1), w.nan_to_num(1)) for n, w in learner.weights().items())


def test_saved_and_loaded_it_continues_bit_for_bit():
    batch = batch_of(play_group(Mode.PLAIN))
    learner, other = make_learner(weight_decay=0.1), make_learner(seed=9, weight_decay=0.1)
    learner.update(batch, {}, 1e-3)
    other.load(
        {name: value.clone() for name, value in learner.weights().items()},
        {name: value.clone() for name, value in learner.optimizer_tensors().items()},
    )
    for each in (learner, other):
        each.update(batch[1:], {}, 2e-3)
    continued = other.weights()
    assert all(torch.equal(value, continued[name]) for name, value in learner.weights().items())


def test_only_the_last_layers_learn_and_their_gradients_are_those_of_the_whole_model():
    batch = batch_of(play_group(Mode.PLAIN))
    whole, last = make_learner(), make_learner(last_layers=1)
    (all_stats, all_gradients), (stats, gradients) = updated(whole, batch), updated(last, batch)
    assert stats.loss == all_stats.loss
    assert {name.split(".self")[0].split(".mlp")[0] for name in gradients} >= {"model.layers.1", "model.norm.weight"}
    assert not any("layers.0" in name or "embed" in name for name in gradients)
    assert all(torch.equal(gradient, all_gradients[name]) for name, gradient in gradients.items())
    before = {name: weight.clone() for name, weight in last.weights().items()}
    last.update(batch, {}, 1e-3)
    moved = {name for name, weight in last.weights().items() if not torch.equal(weight, before[name])}
    assert moved == set(gradients)
    assert {name.rpartition("/")[0] for name in last.optimizer_tensors()} == moved


def test_so_many_logits_at_once_as_are_allowed(monkeypatch):
    in_parts(monkeypatch, 7)
    computed = []
    learner = make_learner()
    inner = learner._logits
    monkeypatch.setattr(learner, "_logits", lambda model, hidden: computed.append(len(hidden)) or inner(model, hidden))
    updated(learner, batch_of(play_group(Mode.PLAIN)))
    assert len(computed) > 2
    assert max(computed) == 7


class Counted(TorchDispatchMode):
    """How often each operation was computed within."""

    def __init__(self):
        super().__init__()
        self.times = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.times[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last_layers", [0, 1])
def test_selective_recomputation_multiplies_and_attends_once(last_layers, compute_dtype):
    batch = batch_of(play_group(Mode.PLAIN))

    def counted(selective: bool):
        learner = make_learner(last_layers=last_layers, compute_dtype=compute_dtype)
        if selective:
            models.recompute_layers(learner.model, selective=True)
        with Counted() as counted:
            stats, gradients = updated(learner, batch)
        return stats.loss, gradients, counted.times

    loss, gradients, kept = counted(selective=False)
    same_loss, same_gradients, recomputed = counted(selective=True)
    assert same_loss == loss
    assert distance(same_gradients, gradients) == 0
    for product in ("aten.mm.default", "aten._scaled_dot_product_flash_attention_for_cpu.default"):
        assert recomputed[product] == kept[product] > 0
    layers = len(make_learner().model.get_decoder().layers)
    trained = last_layers or layers
    assert recomputed["aten.silu.default"] == kept["aten.silu.default"] + trained == layers + trained


@pytest.mark.parametrize("last_layers", [0, 1])
def test_recomputed_layers_give_the_same_gradients_bit_for_bit(last_layers, monkeypatch):
    batch = batch_of(play_group(Mode.PLAIN))
    expected = updated(make_learner(last_layers=last_layers), batch)
    learner = make_learner(last_layers=last_layers)
    models.recompute_layers(learner.model, selective=False)
    layer, calls = learner.model.get_decoder().layers[1].self_attn, []
    inner = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs))
    learner.prepare(batch)
    stats, gradients = updated(learner, batch)
    assert len(calls) == 2  # once more for the gradients
    assert stats.loss == expected[0].loss
    assert distance(gradients, expected[1]) == 0


@pytest.mark.slow
def test_compiled_layers_give_the_same_gradients_for_any_length():
    learner = make_learner()
    models.compile_layers(learner.model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for size in (2, 3, 5):
        batch = batch_of(play_group(Mode.PLAIN, size=size))
        (stats, gradients), expected = updated(learner, batch), updated(make_learner(), batch)
        assert stats.loss == pytest.approx(expected[0].loss, abs=1e-6)
        assert distance(gradients, expected[1]) <= 1e-5
        compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 0 < compiled <= 6, "each length was compiled for itself"


def test_more_layers_than_there_are_is_refused():
    with pytest.raises(UsageError, match=r"learner\.last_layers = 3, but the model has 2 layers; set it to 0"):
        make_learner(last_layers=3)


def test_the_gap_to_the_sampler_is_measured_where_the_rendering_was_sampled():
    batch = batch_of(play_group(Mode.WITH_TIPS))
    learner = make_learner(micro_batch_tokens=1)  # one sequence a pass: figures are joined over passes
    current = learner.logprobs(batch)

    def sampled(sequence: TrainingSequence, by: float | None) -> TrainingSequence:
        values = {span.key: by and tuple(v + by for v in current[span.key]) for span in sequence.spans}
        return replace(sequence, spans=tuple(replace(p, sampler_logprobs=values[p.key]) for p in sequence.spans))

    def gap(shifts: Sequence[float | None]) -> tuple[float, float]:
        stats = updated(learner, [sampled(s, by) for s, by in zip(batch, shifts, strict=True)])[0]
        return stats.sampler_gap_mean, stats.sampler_gap_max

    assert gap([0.25] * 4) == pytest.approx((0.25, 0.25), abs=1e-5)
    assert gap([None] * 4) == (0.0, 0.0)
    assert gap([None, -0.5, None, None]) == pytest.approx((0.5, 0.5), abs=1e-5)
    lengths = [sequence.num_trained for sequence in batch]
    for far in range(4):
        mean = (0.25 * sum(lengths) + 0.25 * lengths[far]) / sum(lengths)
        assert gap([-0.5 if row == far else 0.25 for row in range(4)]) == pytest.approx((mean, 0.5), abs=1e-5)


def test_bf16_autocast_stays_near_float32():
    batch = batch_of(play_group(Mode.PLAIN, size=6))
    exact = make_learner().logprobs(batch)
    rough = make_learner(compute_dtype=torch.bfloat16).logprobs(batch)
    gaps = [abs(a - b) for key in exact for a, b in zip(exact[key], rough[key], strict=True)]
    assert 0 < sum(gaps) / len(gaps) <= 0.05
    assert max(gaps) <= 0.5
    learner = make_learner(compute_dtype=torch.bfloat16)
    learner.update(batch, {}, 1e-3)
    assert {value.dtype for value in learner.weights().values()} == {torch.float32}


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_learning_rate(schedule, warmup):
    config = LearnerConfig(lr=2e-3, warmup_steps=warmup, schedule=schedule)
    for step in range(13):  # also past the end
        expected = oracles.lr_at(step, peak=2e-3, warmup_steps=warmup, total_steps=10, schedule=schedule)
        assert learning_rate(config, step, 10) == pytest.approx(expected, abs=1e-12)
