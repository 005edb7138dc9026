"""One update on recorded ScienceWorld episodes, ours and TRL's in two forms, one after another; ratios of medians.

The same model, episodes, precision and threads; all layers train, no KL term. The first step of each is not counted
where there are others. TRL's samples go one by one: four at once, conversations or rows, did not fit into
24 GB of memory. It pads the prompts and the completions of a step to the longest, whatever the batch.

python benchmarks/beside_trl.py --episodes 8 --turns 10 --updates 3 --conversation-steps 2 --rows-steps 1
"""

import argparse
import sys
from statistics import median

from side_by_side import FOLDER, peer_python, row, run

from empo2 import models, precision

parser = argparse.ArgumentParser()
parser.add_argument("--episodes", type=int, default=8)
parser.add_argument("--turns", type=int, default=10)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--updates", type=int, default=3)
parser.add_argument("--micro-batch-tokens", type=int, default=16384)
parser.add_argument("--conversation-steps", type=int, default=2, help="0: left out")
parser.add_argument("--conversation-batch", type=int, default=1)
parser.add_argument("--rows-steps", type=int, default=1, help="0: left out")
parser.add_argument("--rows-batch", type=int, default=1)
asked = parser.parse_args()

episodes = FOLDER / f"episodes-{asked.episodes}x{asked.turns}.json"
if not episodes.exists():
    FOLDER.mkdir(exist_ok=True)
    run(sys.executable, "episodes.py", asked.turns, asked.episodes, episodes)
dtype = precision.fastest("cpu")
found = run(sys.executable, "update.py", episodes, dtype, asked.threads, asked.micro_batch_tokens, asked.updates)
ours = found["seconds"][1:] or found["seconds"]
of = median(ours)
print({key: value for key, value in found.items() if key != "seconds"} | {"precision": dtype})
print(row("ours", ours, of), flush=True)
for form, steps, batch in (
    ("conversation", asked.conversation_steps, asked.conversation_batch),
    ("rows", asked.rows_steps, asked.rows_batch),
):
    if steps:
        arguments = (form, episodes, models.locate(models.SMOLLM2), dtype, asked.threads, batch, steps)
        found = run(peer_python("trl"), "peers/trl_step.py", *arguments, TRL_EXPERIMENTAL_SILENCE="1")
        print(row(f"TRL 1.16, {form}, batch {batch}", found["seconds"][1:] or found["seconds"], of), flush=True)
