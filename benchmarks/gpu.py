"""Training and decoding on a GPU: tokens per second, and the share of the chip's measured matrix peak. See gpu.sh.

A 1.5-billion-parameter model of Qwen2's shape with random weights, and SmolLM2-135M where it has been fetched. Trained
are sequences of 4,096 tokens in bfloat16 with float32 master weights, a sixteenth of the tokens as completions.
"""

import json
import random
import time
from statistics import median

import torch
from episodes import spaced_sequences
from transformers import Qwen2Config, Qwen2ForCausalLM

from empo2 import models
from empo2.bench import matrix_peak, read_bandwidth, training_flops
from empo2.config import LearnerConfig, LossConfig
from empo2.learner import Learner
from empo2.sampler.local import LocalSampler
from empo2.types import SampleRequest, SamplingParams, TrainingSequence

LENGTH, SEQUENCES, SAID, EVERY = 4096, 8, 32, 512
PROMPT, TOKENS, EPISODES = 512, 64, 128


def qwen2():
    """Qwen2-1.5B's shape."""
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    with torch.device("cuda"):
        return models.with_own_attention(Qwen2ForCausalLM(config))


def smollm2():
    return models.load_model(models.SMOLLM2, dtype=torch.float32, device="cuda")


def sequences(vocabulary: int) -> list[TrainingSequence]:
    rng = random.Random(0)
    return spaced_sequences([[rng.randrange(vocabulary) for _ in range(LENGTH)] for _ in range(SEQUENCES)], SAID, EVERY)


def train(model, peak: float, **settings) -> dict[str, float]:
    if settings.pop("compiled", False):
        models.compile_layers(model)
    learner = Learner(
        model,
        LearnerConfig(micro_batch_tokens=4 * LENGTH, **settings),
        LossConfig(),
        temperature=1.0,
        compute_dtype=torch.bfloat16,
    )
    rows, taken = sequences(model.config.vocab_size), []
    for _ in range(5):
        started = time.perf_counter()
        learner.update(rows, {}, 1e-6)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    tokens = LENGTH * SEQUENCES
    places = sum(row.num_trained for row in rows)
    count = training_flops(model, tokens, places, SEQUENCES * LENGTH * (LENGTH + 1) / 2)
    seconds = median(taken[2:])
    return {"tokens/s": tokens / seconds, "share of the matrix peak": count / seconds / peak}


def decode(model, peak: float, bandwidth: float) -> dict[str, float]:
    model = model.to(torch.bfloat16)
    sampler = LocalSampler(model, models.tiny_tokenizer(), frozenset(), EPISODES)
    rng = random.Random(1)
    prompts = [tuple(rng.randrange(400) for _ in range(PROMPT)) for _ in range(EPISODES)]
    requests = [SampleRequest(slot=n, prompt=prompt, stream=(n,)) for n, prompt in enumerate(prompts)]
    sampler._text = lambda tokens: ""
    taken = {}
    for tokens in (1, 1, TOKENS, 1, TOKENS):  # the last two are counted: their difference is decoding alone
        params = SamplingParams(temperature=1.0, max_tokens=tokens, seed=0, purpose="benchmark")
        started = time.perf_counter()
        sampler.sample(requests, params)
        torch.cuda.synchronize()
        taken[tokens] = time.perf_counter() - started
    steps = TOKENS - 1
    seconds = (taken[TOKENS] - taken[1]) / steps
    weights = sum(parameter.numel() for parameter in model.parameters())
    return {
        "tokens/s": EPISODES / seconds,
        "share of the matrix peak": 2 * weights * EPISODES / seconds / peak,
        "weights read, share of the bandwidth": 2 * weights / seconds / bandwidth,
    }


if __name__ == "__main__":
    peak, bandwidth = matrix_peak(torch.bfloat16, "cuda"), read_bandwidth("cuda")
    print(
        f"{torch.cuda.get_device_name()}: {peak / 1e12:.0f} TFLOP/s bfloat16, {bandwidth / 1e12:.2f} TB/s", flush=True
    )
    made = {"Qwen2 1.5B, random weights": qwen2}
    if models.fetched(models.SMOLLM2):
        made["SmolLM2-135M"] = smollm2
    for name, make in made.items():
        for how, settings in (("", {}), (", compiled", {"compiled": True})):
            print(json.dumps({f"{name}, training{how}": train(make(), peak, **settings)}), flush=True)
            torch.cuda.empty_cache()
        print(json.dumps({f"{name}, decoding": decode(make(), peak, bandwidth)}), flush=True)
        torch.cuda.empty_cache()
