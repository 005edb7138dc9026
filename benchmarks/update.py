"""Our update on recorded episodes, timed: one optimiser step, all layers, no KL term; peers/trl_step.py does the same.

python benchmarks/update.py EPISODES.json float32|bfloat16 THREADS MICRO_BATCH_TOKENS UPDATES
"""

import json
import sys
import time
from pathlib import Path

import torch
from episodes import described, read, training_sequences

from empo2 import models
from empo2.allocator import keep_freed_memory
from empo2.config import LearnerConfig, LossConfig
from empo2.learner import Learner
from empo2.precision import DTYPES

path, precision, threads, micro_batch, updates = sys.argv[1:]
torch.set_num_threads(int(threads))
keep_freed_memory(DTYPES[precision])
episodes = read(Path(path))
learner = Learner(
    models.load_model("smollm2-135m-instruct", dtype=torch.float32, device="cpu", seed=0),
    LearnerConfig(micro_batch_tokens=int(micro_batch)),
    LossConfig(),
    temperature=1.0,
    compute_dtype=DTYPES[precision],
)
sequences = training_sequences(episodes)
seconds = []
for _ in range(int(updates)):
    started = time.perf_counter()
    stats = learner.update(sequences, {}, lr=2e-5)
    seconds.append(time.perf_counter() - started)
print(json.dumps({"seconds": seconds, "tokens computed": stats.num_computed, **described(episodes)}))
