"""What share of the machine's matrix peak an update of 8 sequences of 512 tokens reaches, ours and a plain loop's.

Counted alike: 6 · N · tokens without embedding and head, 6 · head weights · places where logits are computed, and
causal attention, 12 · layers · width · pairs. The plain loop is what one writes first: transformers' own attention,
one padded batch, logits everywhere, the same optimiser, freed memory given back as it is by default. Ours has
completions of 24 tokens, 60 tokens apart.

python benchmarks/update_flops.py [UPDATES]
"""

import random
import sys
import time
from statistics import median

import torch
from episodes import spaced_sequences
from transformers import AutoModelForCausalLM

from empo2 import models, precision
from empo2.allocator import keep_freed_memory
from empo2.bench import matrix_peak, training_flops
from empo2.config import LearnerConfig, LossConfig
from empo2.learner import Learner
from empo2.run import available_cores

updates = int(sys.argv[1]) if len(sys.argv) > 1 else 5
torch.set_num_threads(available_cores())
dtype = precision.DTYPES[precision.fastest("cpu")]
BATCH, LENGTH, OBSERVED, SAID = 8, 512, 60, 24
rng = random.Random(0)
rows = [[rng.randrange(1000, 40000) for _ in range(LENGTH)] for _ in range(BATCH)]


def flops(model, logit_places: int) -> float:
    return training_flops(model, BATCH * LENGTH, logit_places, BATCH * LENGTH * (LENGTH + 1) / 2)


def timed(update) -> float:
    seconds = []
    for _ in range(updates + 1):
        started = time.perf_counter()
        update()
        seconds.append(time.perf_counter() - started)
    return median(seconds[1:])


def ours() -> tuple[float, float]:
    keep_freed_memory(dtype)
    model = models.load_model(models.SMOLLM2, dtype=torch.float32, device="cpu")
    learner = Learner(
        model, LearnerConfig(micro_batch_tokens=BATCH * LENGTH), LossConfig(), temperature=1.0, compute_dtype=dtype
    )
    sequences = spaced_sequences(rows, SAID, OBSERVED + SAID)
    count = flops(model, sum(sequence.num_trained for sequence in sequences))
    return timed(lambda: learner.update(sequences, {}, 1e-6)), count


def plain_loop() -> tuple[float, float]:
    model = AutoModelForCausalLM.from_pretrained(models.locate(models.SMOLLM2), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    ids = torch.tensor(rows)

    def update() -> None:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return timed(update), flops(model, BATCH * LENGTH)


if __name__ == "__main__":
    peak = matrix_peak(dtype, "cpu")
    print(f"matrix peak {peak / 1e9:.0f} GFLOP/s ({dtype}, {torch.get_num_threads()} threads)")
    shares = {}
    for name, run in (("plain loop", plain_loop), ("ours", ours)):
        seconds, count = run()
        shares[name] = count / seconds / peak
        print(f"{name:<12} {seconds:6.1f} s   {count / 1e12:.2f} TFLOP   {shares[name]:.0%} of the peak", flush=True)
    print(f"ours reaches {shares['ours'] / shares['plain loop']:.2f} × the plain loop's share")
