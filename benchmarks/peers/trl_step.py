"""One training step of TRL's GRPOTrainer on recorded episodes, timed. Runs in an environment of its own,
with torch 2.13.0 and trl 1.16.0; ours on the same file is ../update.py.

``rows``: each turn is a sample, (prompt, completion); ``conversation``: each episode is one, with everything after the
first prompt as its completion and an environment mask. Generation is free: `rollout_func` returns what was recorded.
All layers train, no KL term, no importance sampling correction, the log-probs of the batch are its own.

python trl_step.py rows|conversation EPISODES.json MODEL float32|bfloat16 THREADS BATCH STEPS
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

form, path, model_path, precision, threads, batch, steps = sys.argv[1:]
torch.set_num_threads(int(threads))
episodes = json.loads(Path(path).read_text())

samples = []  # prompt, completion, logprobs, mask, reward
for number, episode in enumerate(episodes):
    ids, spans, reward = episode["token_ids"], episode["spans"], float(number % 2)
    if form == "rows":
        samples += [(ids[:start], ids[start:stop], logprobs, None, reward) for start, stop, logprobs in spans]
    else:
        first, last = spans[0][0], spans[-1][1]
        mask, logprobs = [0] * (last - first), [0.0] * (last - first)
        for start, stop, values in spans:
            mask[start - first : stop - first] = [1] * (stop - start)
            logprobs[start - first : stop - first] = values
        samples.append((ids[:first], ids[first:last], logprobs, mask, reward))

if len(samples) % int(batch):
    sys.exit(f"{len(samples)} samples do not make batches of {batch}; give a divisor")


def rollout(prompts, trainer):
    assert len(prompts) == len(samples)
    prompt_ids, completion_ids, logprobs, masks, rewards = map(list, zip(*samples, strict=True))
    out = {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": logprobs, "recorded": rewards}
    return out if form == "rows" else out | {"env_mask": masks}


class Clock(TrainerCallback):
    def __init__(self):
        self.begun, self.seconds = 0.0, []

    def on_step_begin(self, *args, **kwargs):
        self.begun = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(time.perf_counter() - self.begun)


model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
with tempfile.TemporaryDirectory() as folder:
    config = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=int(batch),
        gradient_accumulation_steps=len(samples) // int(batch),
        num_generations=len(samples),
        max_steps=int(steps),
        max_completion_length=8192,
        learning_rate=2e-5,
        beta=0.0,
        bf16=precision == "bfloat16",
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )
    clock = Clock()
    trainer = GRPOTrainer(
        model=model,
        args=config,
        reward_funcs=lambda recorded, **_: recorded,
        train_dataset=Dataset.from_list([{"prompt": "recorded"}] * len(samples)),
        processing_class=AutoTokenizer.from_pretrained(model_path),
        rollout_func=rollout,
        callbacks=[clock],
    )
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    started = time.perf_counter()
    trainer.train()
    assert not torch.equal(before, model.model.layers[0].self_attn.q_proj.weight), "nothing was trained"
print(json.dumps({"seconds": clock.seconds, "all": time.perf_counter() - started, "samples": len(samples)}))
