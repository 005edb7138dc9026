"""Our sampler on the turns of many episodes, timed; peers/vllm_sampling.py does the same.

Every episode begins with the recorded prompt (episodes.py), and each turn adds an observation of random tokens and
samples a fixed number, whatever they are: there is no stop token.

python benchmarks/sampling.py EPISODES.json float32|bfloat16 THREADS NUM_EPISODES TURNS OBSERVATION_TOKENS TOKENS
"""

import json
import random
import sys
import time
from pathlib import Path

import torch
from episodes import read

from empo2 import models
from empo2.precision import DTYPES
from empo2.sampler.local import LocalSampler
from empo2.types import SampleRequest, SamplingParams

path, precision, *counts = sys.argv[1:]
threads, num_episodes, turns, observation_tokens, tokens = map(int, counts)
torch.set_num_threads(threads)
first = read(Path(path))[0]
opening = tuple(first.token_ids[: first.spans[0][0]])
model = models.load_model("smollm2-135m-instruct", dtype=DTYPES[precision], device="cpu")
sampler = LocalSampler(model, models.load_tokenizer("smollm2-135m-instruct"), frozenset(), num_episodes)
params = SamplingParams(temperature=1.0, max_tokens=tokens, seed=0, purpose="benchmark")
rng = random.Random(0)
prompts = [opening] * num_episodes
seconds = []
for turn in range(turns):
    started = time.perf_counter()
    requests = [SampleRequest(slot=n, prompt=prompt, stream=(n, turn)) for n, prompt in enumerate(prompts)]
    said = sampler.sample(requests, params)
    seconds.append(time.perf_counter() - started)
    prompts = [
        prompt + completion.token_ids + tuple(rng.randrange(1000, 40000) for _ in range(observation_tokens))
        for prompt, completion in zip(prompts, said, strict=True)
    ]
sampled = num_episodes * turns * tokens
print(json.dumps({"seconds": seconds, "tokens": sampled, "tokens/s": sampled / sum(seconds)}))
