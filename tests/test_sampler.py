"""The sampler with its cached prefixes against transformers without any, and against the learner.

`check` is the oracle: one plain forward pass over prompt and completion, transformers' own attention, nothing cached.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from empo2 import models, sequences, streams
from empo2.config import LearnerConfig, LossConfig
from empo2.episode import LiveEpisode
from empo2.errors import TrainingDiverged
from empo2.learner import Learner
from empo2.sampler import attention, local
from empo2.sampler.local import LocalSampler, draw
from empo2.sampler.packed import PackedLinear, can_pack, load_packed, pack_linears
from empo2.types import (
    Completion,
    Ending,
    EpisodeKey,
    EpisodePlan,
    Mode,
    SampleRequest,
    SamplingParams,
    StepResult,
    TokenIds,
)
from test_episode import CHAT, EXAMPLE, NO_TIPS, TASK, VOCABULARY, retrieval, rules

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, seed=7, purpose="test")
WARM = replace(GREEDY, temperature=0.7)
#: Ids that end a completion in these tests: an eighth of the vocabulary, so that rows end at different times.
STOPS = frozenset({CHAT.closer, *range(0, VOCABULARY, 8)})


def lively(model, seed: int):
    """Weights under which the next token depends on the whole prompt (a freshly made tied model repeats the last)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" not in name and parameter.ndim == 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise / parameter.shape[1] ** 0.5 * 1.5)
    return model


def our_model(seed: int = 0, dtype: torch.dtype = torch.float32):
    return lively(models.load_model(models.TINY, dtype=torch.float32, device="cpu"), seed).to(dtype)


@pytest.fixture(autouse=True, params=["packed", "products", "processor", "GPU"], scope="module")
def way(request):
    """Everything holds for a processor that packs weights, for one that cannot, for large products (the way of
    bfloat16, here in float32), and for a GPU, which pads batches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "in_few_calls", lambda _: request.param == "GPU")
        if request.param == "products":
            for module in (local, attention):
                patch.setattr(module, "uses_products", lambda *_: True)
        if request.param != "packed":
            patch.setattr(local, "can_pack", lambda *_: False)
        yield request.param


@pytest.fixture(scope="module")
def plain():
    """The same weights with transformers' own attention."""
    model = models.tiny_model(VOCABULARY, 0).eval()
    model.set_attn_implementation("eager")
    return lively(model, 0)


def make_sampler(slots: int = 4, *, seed: int = 0, dtype: torch.dtype = torch.float32, stops=STOPS) -> LocalSampler:
    return LocalSampler(our_model(seed, dtype), CHAT.tokenizer, stops, slots)


def request(slot: int, prompt: TokenIds, *stream: int) -> SampleRequest:
    return SampleRequest(slot=slot, prompt=prompt, stream=stream or (slot,))


def ids(length: int, seed: int = 0) -> TokenIds:
    rng = random.Random(f"ids/{seed}")
    return tuple(rng.randrange(VOCABULARY) for _ in range(length))


@torch.no_grad()
def check(plain, asked: SampleRequest, params: SamplingParams, found: Completion, stops=STOPS) -> None:
    """Every token is the one that a full recomputation draws, with its log-prob; it ends where it should."""
    said = found.token_ids
    assert 1 <= len(said) <= params.max_tokens
    logits = plain(input_ids=torch.tensor([asked.prompt + said])).logits[0, len(asked.prompt) - 1 : -1].double()
    for index, (row, token, logprob) in enumerate(zip(logits, said, found.logprobs, strict=True)):
        uniform = streams.uniform(params.seed, params.purpose, *asked.stream, index)
        assert token == oracles.sample_token(row.tolist(), params.temperature, uniform)
        expected = torch.log_softmax(row / (params.temperature or 1.0), dim=-1)[token].item()
        assert logprob == pytest.approx(expected, abs=1e-4)
    assert not any(token in stops for token in said[:-1])
    assert found.truncated == (said[-1] not in stops)
    assert not found.truncated or len(said) == params.max_tokens
    assert found.text == CHAT.tokenizer.decode(list(said if found.truncated else said[:-1]))


def sample_and_check(
    sampler: LocalSampler, plain, requests: Sequence[SampleRequest], params: SamplingParams
) -> list[Completion]:
    found = sampler.sample(requests, params)
    for asked, completion in zip(requests, found, strict=True):
        check(plain, asked, params, completion)
    return found


def same(found: Completion, expected: Completion) -> None:
    """Equal tokens; log-probs within 1e-4."""
    assert found.token_ids == expected.token_ids
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    assert (found.text, found.truncated) == (expected.text, expected.truncated)


# ---------------------------------------------------------------- against a recomputation without any reuse


@pytest.mark.parametrize("masked", [False, True])
def test_the_attention_of_other_devices_equals_that_of_the_processor(masked):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 16, generator=generator) for n in (5, 70, 70))
    hidden = torch.rand(2, 1, 5, 70, generator=generator) < 0.5
    mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf")) if masked else None
    for found, expected in zip(
        attention._plain_attention(q, k, v, mask, 0.25), attention._flash_cpu(q, k, v, mask, 0.25), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_sampling_with_the_attention_of_other_devices(plain, monkeypatch):
    monkeypatch.setattr(attention, "_flash_cpu", attention._plain_attention)
    test_greedy_tokens_equal_those_of_generate(plain)


def test_greedy_tokens_equal_those_of_generate(plain):
    """Three turns of four episodes that share their opening, through `model.generate` with nothing kept."""
    sampler = make_sampler(stops=frozenset({CHAT.closer}))
    prompts = [ids(80) + ids(slot, slot + 1) for slot in range(4)]
    outputs = set()
    for turn in range(3):
        found = sampler.sample([request(slot, prompt) for slot, prompt in enumerate(prompts)], GREEDY)
        for prompt, completion in zip(prompts, found, strict=True):
            made = plain.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=GREEDY.max_tokens,
                do_sample=False,
                eos_token_id=CHAT.closer,
                pad_token_id=CHAT.closer,
            )
            assert completion.token_ids == tuple(made[0, len(prompt) :].tolist())
        outputs |= {completion.token_ids for completion in found}
        prompts = [p + c.token_ids + ids(5, 9 + turn) for p, c in zip(prompts, found, strict=True)]
    assert len(outputs) == 12  # no repetition that would agree by chance
    assert sampler.tokens_reused > 2 * 4 * 80


@pytest.mark.parametrize("params", [GREEDY, WARM, replace(WARM, temperature=1.0)], ids=["greedy", "0.7", "1.0"])
@pytest.mark.parametrize("seed", range(4))
def test_any_history_of_calls_samples_what_a_recomputation_samples(plain, params, seed):
    """Slots come and go, prompts grow, shrink, are copied between slots, share short and long prefixes or none."""
    rng = random.Random(seed)
    sampler = make_sampler(slots=5)
    held: dict[int, TokenIds] = {}
    for call in range(8):
        requests = []
        for slot in rng.sample(range(5), rng.randint(1, 5)):
            base = rng.choice([held.get(slot, ()), held.get(slot, ()), *held.values(), ids(100), ids(20), ()])
            prompt = base[: rng.choice([len(base), len(base), rng.randint(0, len(base))])]
            prompt += ids(rng.choice([1, 3, 70]), rng.randrange(5))
            requests.append(request(slot, prompt, slot, call))
        for asked, completion in zip(requests, sample_and_check(sampler, plain, requests, params), strict=True):
            held[asked.slot] = asked.prompt + completion.token_ids
        if rng.random() < 0.2:
            sampler.forget()
    assert sampler.tokens_reused > 0


def test_the_opening_of_a_group_is_computed_once(plain):
    """Equal prompts: the first row computes them; each further row computes its last token."""
    sampler = make_sampler(slots=8)
    prompt = ids(90)
    found = sample_and_check(sampler, plain, [request(slot, prompt) for slot in range(8)], WARM)
    decoded = sum(len(completion.token_ids) - 1 for completion in found)
    assert sampler.tokens_computed == 90 + 7 + decoded
    assert sampler.tokens_reused == 7 * 89
    assert len({completion.token_ids for completion in found}) > 1


def test_a_turn_computes_only_what_is_new(plain):
    sampler = make_sampler(slots=1)
    prompt = ids(50)
    (first,) = sample_and_check(sampler, plain, [request(0, prompt)], WARM)
    prompt += first.token_ids + ids(6, 1)
    before = sampler.tokens_computed
    (second,) = sample_and_check(sampler, plain, [request(0, prompt)], WARM)
    # 6 new tokens, the last sampled one (which was never fed back), and what is decoded now
    assert sampler.tokens_computed - before == 6 + 1 + len(second.token_ids) - 1


# ---------------------------------------------------------------- rows and slots do not see each other


@pytest.mark.parametrize("shared", [0, 100], ids=["apart", "one group"])
def test_a_request_gets_the_same_tokens_alone_and_among_others(shared):
    """Whatever else is in the batch, in whatever order, and although others end earlier."""
    params = replace(WARM, max_tokens=16)
    requests = [request(slot, ids(shared) + ids(20 + slot, slot + 1)) for slot in range(4)]
    together = make_sampler().sample(requests, params)
    assert len({len(completion.token_ids) for completion in together}) > 2
    for order in ([3, 1, 0, 2], [2, 3]):
        for row, completion in zip(order, make_sampler().sample([requests[r] for r in order], params), strict=True):
            same(completion, together[row])
    for asked, completion in zip(requests, together, strict=True):
        (alone,) = make_sampler().sample([asked], params)
        same(alone, completion)


def test_draws_do_not_depend_on_the_slot_but_on_the_stream():
    sampler = make_sampler()
    one, other, third = sampler.sample([request(0, ids(30), 5), request(1, ids(30), 5), request(2, ids(30), 6)], WARM)
    same(one, other)
    assert third.token_ids != one.token_ids
    (reseeded,) = make_sampler().sample([request(0, ids(30), 5)], replace(WARM, seed=8))
    (renamed,) = make_sampler().sample([request(0, ids(30), 5)], replace(WARM, purpose="eval"))
    assert len({one.token_ids, reseeded.token_ids, renamed.token_ids}) == 3


def test_a_slot_taken_over_by_another_episode_leaks_nothing():
    """A long episode, then a short one in its slot, beside a longer one: bit for bit as in a fresh sampler."""
    used, fresh = make_sampler(), make_sampler()
    used.sample([request(slot, ids(200, slot)) for slot in range(4)], WARM)
    requests = [request(0, ids(10, 50)), request(2, ids(150, 51))]
    assert used.sample(requests, WARM) == fresh.sample(requests, WARM)


def test_nan_in_a_slots_past_leaks_nothing():
    """Weights that had diverged leave NaN in the cache; with good weights it must not come back through masked keys."""
    sampler, fresh = make_sampler(), make_sampler()
    good = {name: p.detach().clone() for name, p in our_model().named_parameters()}
    sampler.load_weights({name: torch.full_like(value, torch.nan) for name, value in good.items()}, 1)
    with pytest.raises(TrainingDiverged, match="NaN or infinity"):
        sampler.sample([request(slot, ids(100, slot)) for slot in range(4)], GREEDY)
    sampler.load_weights(good, 2)
    requests = [request(0, ids(10, 50)), request(2, ids(60, 51))]
    assert sampler.sample(requests, WARM) == fresh.sample(requests, WARM)


def test_new_weights_drop_the_cache(plain):
    sampler = make_sampler(seed=5)
    requests = [request(slot, ids(90) + ids(slot, 1)) for slot in range(3)]
    old = sampler.sample(requests, WARM)
    sampler.load_weights(dict(plain.named_parameters()), 4)
    assert sampler.version == 4
    before = sampler.tokens_reused
    assert sampler.sample(requests[:1], WARM) != old[:1]
    assert sampler.tokens_reused == before
    sampler.load_weights(dict(plain.named_parameters()), 5)
    sample_and_check(sampler, plain, requests, WARM)


def test_weights_are_packed_where_that_can_be(way):
    model = our_model()
    packs = can_pack(torch.float32, torch.device("cpu")) and way == "packed"
    LocalSampler(model, CHAT.tokenizer, STOPS, 1)
    assert any(isinstance(module, PackedLinear) for module in model.modules()) == packs
    assert any(isinstance(module, torch.nn.Linear) for module in model.modules()) != packs


def test_a_packed_layer_multiplies_as_the_plain_one():
    if not can_pack(torch.float32, torch.device("cpu")):
        pytest.skip("no packed products on this processor")
    plain = torch.nn.Linear(24, 40)
    holder = torch.nn.ModuleDict({"layer": plain})
    (packed,) = pack_linears(holder)
    for rows in (1, 5, 300):
        hidden = torch.randn(1, rows, 24)
        torch.testing.assert_close(packed(hidden), plain(hidden))
    load_packed([packed], {"layer.weight": torch.zeros(40, 24, dtype=torch.float64)})
    torch.testing.assert_close(packed(torch.randn(1, 3, 24)), plain.bias.expand(1, 3, 40))


def test_what_cannot_be_packed_is_found_by_trying():
    assert not can_pack(torch.float64, torch.device("cpu"))
    assert not can_pack(torch.float32, torch.device("meta"))


def test_slots_that_lie_apart_are_picked_and_near_ones_are_a_view():
    cpu = torch.device("cpu")
    assert attention._rows_of([2, 5, 3], cpu) == (slice(2, 6), [0, 3, 1])
    picked, members = attention._rows_of([9, 0, 1], cpu)
    assert picked.tolist() == [9, 0, 1]
    assert members == [0, 1, 2]


@pytest.mark.parametrize("slots", [(0, 1, 2), (2, 0, 1), (0, 2, 3), (3, 1), (0, 9), (9, 0, 4)])
@pytest.mark.parametrize("opening", [5, 100])
def test_any_slots_sample_what_a_recomputation_samples(plain, slots, opening):
    sampler = make_sampler(10)
    requests = [request(slot, ids(opening) + ids(3 + slot, slot), slot) for slot in slots]
    sample_and_check(sampler, plain, requests, WARM)


def test_weights_are_copied_not_shared():
    sampler, source = make_sampler(seed=5), our_model()
    sampler.load_weights(dict(source.named_parameters()), 1)
    expected = sampler.sample([request(0, ids(30))], WARM)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.zero_()
    sampler.forget()
    assert sampler.sample([request(0, ids(30))], WARM) == expected


def test_forget_makes_a_call_independent_of_earlier_ones():
    sampler = make_sampler()
    requests = [request(slot, ids(70) + ids(slot + 3, slot)) for slot in range(4)]
    first = sampler.sample(requests, WARM)
    computed = sampler.tokens_computed
    sampler.sample([request(slot, ids(120, 9 + slot)) for slot in range(3)], WARM)
    sampler.forget()
    again = sampler.tokens_computed
    assert sampler.sample(requests, WARM) == first
    assert sampler.tokens_computed - again == computed


def test_forget_gives_the_memory_of_the_cache_back():
    sampler = make_sampler()
    sampler.sample([request(slot, ids(70)) for slot in range(4)], WARM)
    assert all(tensor.numel() for tensor in (*sampler._cache.keys, *sampler._cache.values))
    sampler.forget()
    assert not any(tensor.numel() for tensor in (*sampler._cache.keys, *sampler._cache.values))


# ---------------------------------------------------------------- how a completion ends


def test_no_request_no_completion():
    assert make_sampler().sample([], WARM) == []


def test_a_completion_ends_with_its_first_stop_id_or_at_the_cap(plain):
    prompt = ids(30)
    (free,) = make_sampler(stops=frozenset({CHAT.closer})).sample([request(0, prompt)], GREEDY)
    assert (len(free.token_ids), free.truncated) == (GREEDY.max_tokens, True)
    for cap in (1, 3):
        (cut,) = make_sampler(stops=frozenset({CHAT.closer})).sample(
            [request(0, prompt)], replace(GREEDY, max_tokens=cap)
        )
        assert (cut.token_ids, cut.truncated) == (free.token_ids[:cap], True)
    third = free.token_ids[2]
    assert third not in free.token_ids[:2]
    for cap in (3, 8):  # a stop id at the very cap still ends the completion
        (ended,) = make_sampler(stops=frozenset({third})).sample([request(0, prompt)], replace(GREEDY, max_tokens=cap))
        assert (ended.token_ids, ended.truncated) == (free.token_ids[:3], False)
        assert ended.text == CHAT.tokenizer.decode(list(free.token_ids[:2]))


# ---------------------------------------------------------------- the learner sees the same


def played(sampler: LocalSampler, temperature: float, *, tips: bool) -> list:
    """Four episodes of four turns, acted by ``sampler``."""
    how = rules()
    params = SamplingParams(temperature=temperature, max_tokens=12, seed=3, purpose="train/token")
    mode = Mode.WITH_TIPS if tips else Mode.PLAIN
    episodes = [
        LiveEpisode(
            plan=EpisodePlan(task=TASK, mode=mode, key=EpisodeKey(1, 0, n)), slot=n, rules=how, examples=[EXAMPLE]
        )
        for n in range(4)
    ]
    for episode in episodes:
        episode.begin("You are in the hall.", {"task": "Find it."})
    for turn in range(4):
        found = retrieval([f"take coin {turn}"]) if tips else NO_TIPS
        prompts = [episode.next_prompt(found) for episode in episodes]
        requests = [
            request(e.slot, p, *e.plan.key, turn) for e, p in zip(episodes, prompts, strict=True) if p is not None
        ]
        for episode, completion in zip(episodes, sampler.sample(requests, params), strict=True):
            episode.act(completion)
            reply = StepResult(
                observation=f"room {episode.slot}{turn}", reward=0.0, terminated=False, truncated=False, info={}
            )
            episode.observe(reply, max_turns=4)
    assert all(episode.ending is Ending.TURN_LIMIT for episode in episodes)
    return [episode.finish(0, None) for episode in episodes]


def gaps(trajectories: list, temperature: float, compute_dtype: torch.dtype) -> list[float]:
    """|sampler's − learner's log-prob| of every sampled token."""
    learner = Learner(our_model(), LearnerConfig(), LossConfig(), temperature=temperature, compute_dtype=compute_dtype)
    built = [
        sequence
        for trajectory in trajectories
        for sequence in sequences.build(trajectory, [0.0] * 4, plain=trajectory.mode is Mode.PLAIN)
    ]
    found = learner.logprobs(built)
    spans = [span for sequence in built for span in sequence.spans]
    assert len(spans) == 16
    return [abs(a - b) for span in spans for a, b in zip(span.sampler_logprobs, found[span.key], strict=True)]


@pytest.mark.parametrize("tips", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_learner_agree_in_float32(temperature, tips):
    trajectories = played(make_sampler(), temperature, tips=tips)
    assert max(gaps(trajectories, temperature, torch.float32)) <= 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_learner_agree_in_bfloat16(temperature):
    trajectories = played(make_sampler(dtype=torch.bfloat16), temperature, tips=True)
    differences = gaps(trajectories, temperature, torch.bfloat16)
    assert sum(differences) / len(differences) <= 0.05
    assert max(differences) <= 0.5


# ---------------------------------------------------------------- drawing a token


@given(
    logits=st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=6),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    uniform=st.floats(0, 1, exclude_max=True),
)
@settings(max_examples=200, deadline=None)
def test_draw_equals_the_slow_oracle(logits, temperature, uniform):
    ((token,), (logprob,)) = draw(torch.tensor([logits]), temperature, [uniform])
    weights = torch.softmax(torch.tensor(logits, dtype=torch.float64) / (temperature or 1.0), dim=-1)
    edges = weights.cumsum(-1)
    if temperature and float((edges - uniform).abs().min()) < 1e-9:
        return  # on an edge between two tokens rounding decides
    assert token == oracles.sample_token(logits, temperature, uniform)
    assert logprob == pytest.approx(float(weights[token].log()), abs=1e-6)


def test_a_slice_holds_its_left_end():
    even = torch.zeros(1, 4)
    assert [draw(even, 1.0, [quarter / 4])[0] for quarter in range(4)] == [[0], [1], [2], [3]]


def test_a_token_of_probability_zero_is_never_drawn():
    """Not at the ends either, where a cumulative sum may stop short of 1."""
    never = float("-inf")
    for seed in range(200):
        logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(seed))
        logits[0, 0] = logits[0, -2] = logits[0, -1] = never
        for uniform in (0.0, 1 - 2**-53):
            ((token,), (logprob,)) = draw(logits, 1.0, [uniform])
            assert logprob > never
            assert token == (1 if uniform == 0 else 9)


def test_draws_follow_the_distribution():
    """10,000 equally spaced points fall on the tokens in proportion to their probabilities."""
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]]).expand(10_000, 4)
    tokens, _ = draw(logits, 0.7, [(n + 0.5) / 10_000 for n in range(10_000)])
    shares = torch.bincount(torch.tensor(tokens), minlength=4) / 10_000
    assert torch.allclose(shares, torch.softmax(logits[0] / 0.7, dim=-1), atol=2e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nothing_is_drawn_from_broken_logits(temperature, value):
    with pytest.raises(TrainingDiverged):
        draw(torch.tensor([[0.0, value, 1.0]]), temperature, [0.5])
    assert draw(torch.tensor([[0.0, -math.inf, 1.0]]), temperature, [0.5])[0] == [2], "a token may be impossible"
