"""On a GPU: the learner and the sampler give what they give on a processor. Run by benchmarks/gpu.sh."""

import pytest
import torch

from empo2 import models
from empo2.config import LearnerConfig, LossConfig
from empo2.learner import Learner
from empo2.sampler.local import LocalSampler
from empo2.types import Mode, SamplingParams
from test_episode import CHAT
from test_learner import batch_of, distance, play_group, shifted, updated
from test_sampler import STOPS, ids, our_model, request

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def make(device: str, *, compute_dtype: torch.dtype = torch.float32) -> Learner:
    model = models.load_model(models.TINY, dtype=torch.float32, device=device)
    config = LearnerConfig(max_grad_norm=1e9)
    return Learner(model, config, LossConfig(), temperature=0.7, compute_dtype=compute_dtype)


@pytest.mark.parametrize("size", [1, 6], ids=["one sequence", "a shared opening"])
def test_an_update_has_the_gradients_of_a_processor(size):
    batch = batch_of(play_group(Mode.DISTILL, size=size), masks=True)
    behavior = shifted(make("cpu").logprobs(batch))
    (stats, gradients), expected = updated(make("cuda"), batch, behavior), updated(make("cpu"), batch, behavior)
    assert stats.loss == pytest.approx(expected[0].loss, abs=1e-5)
    assert distance({name: value.cpu() for name, value in gradients.items()}, expected[1]) <= 1e-4


def test_bfloat16_stays_near_float32():
    batch = batch_of(play_group(Mode.WITH_TIPS, size=6))
    found = make("cuda", compute_dtype=torch.bfloat16).logprobs(batch)
    expected = make("cpu").logprobs(batch)
    gaps = [abs(a - b) for key in expected for a, b in zip(found[key], expected[key], strict=True)]
    assert sum(gaps) / len(gaps) <= 0.05
    assert max(gaps) <= 0.5


def test_compiled_layers_give_the_same_gradients():
    learner = make("cuda")
    models.compile_layers(learner.model)
    batch = batch_of(play_group(Mode.PLAIN, size=3))
    (stats, gradients), expected = updated(learner, batch), updated(make("cuda"), batch)
    assert stats.loss == pytest.approx(expected[0].loss, abs=1e-5)
    assert distance(gradients, expected[1]) <= 1e-4


@pytest.mark.parametrize("opening", [5, 200], ids=["apart", "a shared opening"])
def test_greedy_tokens_are_those_of_a_processor(opening):
    params = SamplingParams(temperature=0.0, max_tokens=12, seed=0, purpose="test")
    requests = [request(slot, ids(opening) + ids(4 + slot, slot)) for slot in range(5)]
    found, expected = (
        LocalSampler(our_model().to(device), CHAT.tokenizer, STOPS, 5).sample(requests, params)
        for device in ("cuda", "cpu")
    )
    assert [said.token_ids for said in found] == [said.token_ids for said in expected]
