"""How the time of an update grows with the turns of an episode: the same episodes whole and cut to half their turns.

One sequence an episode is linear in its turns but for attention; a sample a turn is quadratic in everything. The last
line says what the operations counted would give (bench.training_flops), all of them at one speed.

python benchmarks/update_by_turns.py [UPDATES]        # 8 episodes of 20 turns, all layers
"""

import sys
import time
from statistics import median

import torch
from episodes import Episode, read, training_sequences
from side_by_side import FOLDER, run

from empo2 import models, precision
from empo2.allocator import keep_freed_memory
from empo2.bench import training_flops
from empo2.config import LearnerConfig, LossConfig
from empo2.learner import Learner
from empo2.run import available_cores
from empo2.sequences import pack

TURNS, EPISODES = 20, 8
MICRO_BATCH_TOKENS = 16384


def halves(episodes: list[Episode]) -> list[Episode]:
    """The first half of each episode's turns."""
    spans = [episode.spans[: len(episode.spans) // 2] for episode in episodes]
    return [Episode(e.token_ids[: s[-1][1]], s, e.score) for e, s in zip(episodes, spans, strict=True)]


def operations(learner: Learner, episodes: list[Episode]) -> float:
    """Floating-point operations of an update."""
    total = 0.0
    for packed in pack(training_sequences(episodes), MICRO_BATCH_TOKENS):
        pairs = 0.0
        for segment in packed.segments:
            own = segment.stop - segment.start
            pairs += own * (own + 1) / 2 + own * sum(stop - start for start, stop in segment.context)
        total += training_flops(learner.model, len(packed.token_ids), len(packed.logit_positions), pairs)
    return total


if __name__ == "__main__":
    updates = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    torch.set_num_threads(available_cores())
    dtype = precision.DTYPES[precision.fastest("cpu")]
    keep_freed_memory(dtype)
    path = FOLDER / f"episodes-{EPISODES}x{TURNS}.json"
    if not path.exists():
        FOLDER.mkdir(exist_ok=True)
        run(sys.executable, "episodes.py", TURNS, EPISODES, path)
    episodes = read(path)
    learner = Learner(
        models.load_model(models.SMOLLM2, dtype=torch.float32, device="cpu"),
        LearnerConfig(micro_batch_tokens=MICRO_BATCH_TOKENS),
        LossConfig(),
        temperature=1.0,
        compute_dtype=dtype,
    )
    taken: dict[int, list[float]] = {}
    for _ in range(updates + 1):  # in turn, so that a slow minute meets both
        for chosen in (halves(episodes), episodes):
            turns = sum(len(episode.spans) for episode in chosen)
            started = time.perf_counter()
            stats = learner.update(training_sequences(chosen), {}, 1e-6)
            taken.setdefault(turns, []).append(time.perf_counter() - started)
            print(f"{turns:4} turns, {stats.num_computed} tokens: {taken[turns][-1]:.1f} s", flush=True)
    few, many = (median(seconds[1:]) for _, seconds in sorted(taken.items()))
    print(f"{max(taken) / min(taken):.2f} × the turns take {many / few:.2f} × the time")
    counted = operations(learner, episodes) / operations(learner, halves(episodes))
    print(f"their operations are {counted:.2f} × as many")
