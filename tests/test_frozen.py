"""What the frozen layers make of a step is computed once, and changes nothing."""

from dataclasses import replace

import pytest
import torch

from empo2 import models
from empo2.assemble import assemble
from empo2.config import LossConfig
from empo2.train import take_step
from empo2.types import EpisodeKey, Mode
from runs import smoke
from test_learner import batch_of, distance, make_learner, play_group, precision, shifted, updated  # noqa: F401

LOSS = LossConfig(delta=0.002, kl=0.1, entropy=0.05)


def a_step():
    """A step's sequences: two groups that share little with each other."""
    other = [replace(t, key=EpisodeKey(1, 1, t.key.episode)) for t in play_group(Mode.WITH_TIPS, seed=5)]
    return batch_of(play_group(Mode.DISTILL), masks=True) + batch_of(other)


def learner_of(dtype, **config):
    reference = models.load_model(models.TINY, dtype=dtype, device="cpu", seed=0)
    return make_learner(dtype=dtype, loss=LOSS, reference=reference, last_layers=1, **config)


def layers_run(model, action) -> list[int]:
    """How often each layer of the model runs in an action."""
    counts = [0] * len(model.get_decoder().layers)

    def count(index):
        def hook(*_):
            counts[index] += 1

        return hook

    handles = [
        layer.self_attn.register_forward_hook(count(index)) for index, layer in enumerate(model.get_decoder().layers)
    ]
    action()
    for handle in handles:
        handle.remove()
    return counts


@pytest.mark.parametrize("micro_batch_tokens", [150, 100_000])
def test_a_prepared_step_finds_the_same(precision, micro_batch_tokens):  # noqa: F811
    """Log-probs, loss and gradients, in mini-batches that are packed in another way than the step."""
    dtype, _, tolerance = precision
    step = a_step()
    plain, prepared = (learner_of(dtype, micro_batch_tokens=micro_batch_tokens) for _ in range(2))
    prepared.prepare(step)
    within = 1e-5 if dtype is torch.float32 else 1e-12
    expected, found = plain.logprobs(step), prepared.logprobs(step[2:])
    for sequence in step[2:]:
        for span in sequence.spans:
            assert found[span.key] == pytest.approx(expected[span.key], abs=within)
    behavior = shifted(expected)
    for batch in (step[1::2], step[::2]):
        stats, gradients = updated(prepared, batch, behavior)
        whole, expected_gradients = updated(plain, batch, behavior)
        assert stats.loss == pytest.approx(whole.loss, abs=1e-6 if dtype is torch.float32 else 1e-12)
        assert stats.num_computed == whole.num_computed
        assert distance(gradients, expected_gradients) <= tolerance


def test_the_frozen_layer_runs_once_a_step():
    step = a_step()
    learner = learner_of(torch.float32)
    assert layers_run(learner.model, lambda: learner.prepare(step)) == [1, 0]
    assert layers_run(learner.model, lambda: learner.logprobs(step)) == [0, 1]
    assert layers_run(learner.model, lambda: learner.update(step[:3], {}, 1e-3)) == [0, 1]
    assert layers_run(learner._reference, lambda: learner.update(step[3:], {}, 1e-3)) == [0, 1]
    assert layers_run(learner.model, lambda: learner.logprobs(batch_of(play_group(Mode.PLAIN, seed=9)))) == [1, 1]
    learner.prepare([])
    assert layers_run(learner.model, lambda: learner.logprobs(step)) == [1, 1]


def test_nothing_is_prepared_where_every_layer_learns():
    learner = make_learner()
    assert layers_run(learner.model, lambda: learner.prepare(a_step())) == [0, 0]
    frozen_below_trained_embeddings = make_learner(last_layers=1)
    frozen_below_trained_embeddings.model.get_input_embeddings().requires_grad_(True)
    assert layers_run(
        frozen_below_trained_embeddings.model, lambda: frozen_below_trained_embeddings.prepare(a_step())
    ) == [0, 0]


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_kl_is_exactly_zero_while_the_policy_is_the_reference(compute_dtype):
    """Not only nearly: Adam makes a whole step of the smallest gradient."""
    step = a_step()
    learner = learner_of(torch.float32, compute_dtype=compute_dtype)
    learner.prepare(step)
    batch = [replace(s, spans=tuple(replace(span, advantage=0.0) for span in s.spans)) for s in step[::2]]
    assert learner.update(batch, {}, 1e-3).kl == 0


@pytest.mark.parametrize("last_layers", [0, 1])
def test_the_reference_holds_no_copy_of_what_is_not_trained(last_layers, tmp_path):
    """And an update changes nothing in it."""
    recipe = smoke(("learner.last_layers", last_layers), ("loss.kl", 0.1), ("train.steps", 1), ("learner.lr", 0.1))
    parts = assemble(recipe, tmp_path / "store.sqlite", with_learner=True)
    try:
        learner = parts.learner
        reference = dict(learner._reference.named_parameters())
        before = {name: parameter.clone() for name, parameter in reference.items()}
        trained, frozen = [], []
        for name, parameter in learner.model.named_parameters():
            shares = reference[name].data_ptr() == parameter.data_ptr()
            assert shares == (not parameter.requires_grad)
            (trained if parameter.requires_grad else frozen).append(name)
        assert trained
        assert bool(frozen) == bool(last_layers)
        take_step(parts, 1, 1)
        assert all(torch.equal(parameter, before[name]) for name, parameter in reference.items())
        assert any(not torch.equal(parameter, before[name]) for name, parameter in learner.model.named_parameters())
    finally:
        parts.close()
