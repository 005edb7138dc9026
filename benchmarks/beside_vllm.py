"""Sampling many episodes turn by turn, ours and vLLM's with prefix caching, one after another.

The same model, opening prompt, precision and threads, as many tokens in each turn, no stop token.

python benchmarks/beside_vllm.py --episodes 32 --turns 10 --observation 60 --tokens 24
"""

import argparse
import sys

from side_by_side import FOLDER, peer_python, run

from empo2 import models, precision

parser = argparse.ArgumentParser()
parser.add_argument("--episodes", type=int, default=32)
parser.add_argument("--turns", type=int, default=10)
parser.add_argument("--observation", type=int, default=60)
parser.add_argument("--tokens", type=int, default=24)
parser.add_argument("--threads", type=int, default=2)
asked = parser.parse_args()

opening = FOLDER / "episodes-8x10.json"
if not opening.exists():
    FOLDER.mkdir(exist_ok=True)
    run(sys.executable, "episodes.py", 10, 8, opening)
dtype = precision.fastest("cpu")
counts = (asked.threads, asked.episodes, asked.turns, asked.observation, asked.tokens)
ours = run(sys.executable, "sampling.py", opening, dtype, *counts)
theirs = run(peer_python("vllm"), "peers/vllm_sampling.py", opening, models.locate(models.SMOLLM2), dtype, *counts)
for name, found in (("ours", ours), ("vLLM 0.32", theirs)):
    each = " ".join(f"{value:.1f}" for value in found["seconds"])
    print(f"{name:<12} {found['tokens/s']:7.1f} tokens/s   {sum(found['seconds']):7.1f} s   (turns: {each})")
print(f"ours is {ours['tokens/s'] / theirs['tokens/s']:.2f} × as fast ({dtype}, {asked.threads} threads)")
