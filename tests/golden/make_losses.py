"""Write losses.json: RL losses, gradients and advantages computed by other libraries (verl and TRL).

Our tests compare our own losses with that file, so they need neither library. To write it again:

    python3.11 -m venv /tmp/peers && . /tmp/peers/bin/activate
    pip install torch==2.13.0
    pip install trl==1.16.0 ray==2.60.0 tensordict==0.10.0 omegaconf==2.3.1 hydra-core==1.3.8
    pip install --no-deps verl==0.9.1 codetiming==1.4.0 orjson==3.13.0
    python tests/golden/make_losses.py

Run with Python 3.11.7, torch 2.13.0 (CPU), verl 0.9.1, TRL 1.16.0, transformers 5.23.0. (verl asks for an older
transformers; the functions used here do not touch it.) Every number comes from the peer's own function:

* verl.trainer.ppo.core_algos: compute_grpo_outcome_advantage, the registered "vanilla" policy loss, kl_penalty.
* trl.GRPOTrainer._compute_loss, called unbound on a stand-in trainer that hands it our log-probabilities in place of
  a model's. The settings are a real GRPOConfig's; the mode is "eval", where no gradient accumulation scales the loss.
  TRL computes its advantages in the midst of generation, so none are taken from it (it adds 1e-4 to the std).

Everything is float64 but the masks, which are int64 as in both libraries; with an int64 mask verl's `+ 1e-8` on token
counts is rounded away (int64 + float gives float32), so its means are exact. "grad" is d loss / d log_probs. Each
"case" names its batch in "batches", whose keys are the inputs. What to mind when comparing is in "notes".
"""

import datetime
import json
import platform
import re
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from accelerate import Accelerator
from trl import GRPOConfig, GRPOTrainer
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig

SEED = 6545  # the first whose draws reach every branch (check_regimes)
LOW, HIGH = 0.2, 0.3
ROWS, TOKENS = 4, 6
NOTES = [
    "verl std: torch.std (n - 1) + 1e-6; a group of one keeps its reward (mean 0, std 1), so r / (1 + 1e-6),"
    " where that sum is rounded to float32 (relative error 5e-8).",
    "verl log ratio is clamped to [-20, 20] before exp (not reached here); TRL does not clamp.",
    "verl dual clip (c): the loss at A < 0 is min(-A c, clipped loss), so no gradient where ratio > c. TRL's delta"
    " bounds the ratio itself; loss and gradient agree with verl's c = delta while delta > 1 + epsilon_high.",
    "verl k3 / low_var_kl: ref - logp clamped to [-20, 20], the result to at most 10 (zero gradient there); TRL's KL"
    " has no clamp (the batches' ref_log_probs stay below it, those of verl_kl do not).",
    "verl k3+: value of k3, gradient of k2 (logp - ref).",
    "verl token-mean: sum / batch_num_tokens, or / mask.sum(). seq-mean-*: sum over rows / global_batch_size, or / the"
    " number of rows with a token. -token-sum-norm: moreover / loss_scale_factor, or / the padded width (6).",
    "TRL grpo: mean over all rows, an empty one counting as 0 (verl leaves it out); dapo: sum / num_items_in_batch;"
    " bnpo: sum / mask.sum(); dr_grpo: sum / (rows * max_completion_length). beta adds beta * k3 to each token,"
    " times the (differentiable) ratio if use_bias_correction_kl, which is TRL's default; so too in its metric 'kl'.",
    "pg_clipfrac: tokens where the clip binds (ratio > 1 + high at A > 0, ratio < 1 - low at A < 0); pg_clipfrac_lower:"
    " where the dual clip binds; ppo_kl: mean of old - new. All are means over the tokens that the mask"
    " selects, in every mode; the clip fractions (also TRL's) are float32.",
]


def draw_batches(seed: int = SEED) -> dict[str, dict[str, torch.Tensor]]:
    """Ragged masks with holes (as of environment tokens); log ratios from 0 to large; some advantages negative."""
    gen = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return (low + (high - low) * torch.rand(*shape, generator=gen, dtype=torch.float64)).round(decimals=4)

    def near(x: torch.Tensor, scales: list[float]) -> torch.Tensor:
        scale = torch.tensor(scales, dtype=torch.float64)[torch.randint(len(scales), x.shape, generator=gen)]
        noise = torch.randn(x.shape, generator=gen, dtype=torch.float64)
        return (x + scale * noise).clamp(-6, -0.05).round(decimals=4)

    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 1, 1]])
    per_row = torch.tensor([1.3, -2.7, 0.4, -0.9], dtype=torch.float64)[:, None].expand(ROWS, TOKENS)
    old = uniform(-6, -0.05, ROWS, TOKENS)
    new = near(old, [0, 0.1, 0.5, 3])
    row = {"old_log_probs": old, "log_probs": new, "ref_log_probs": near(new, [0.1, 0.8]), "advantages": per_row}
    token = row | {"advantages": uniform(-3, 3, ROWS, TOKENS)}
    last_empty = torch.cat([mask[:3], torch.zeros_like(mask[:1])])
    return {
        "row_advantages": row | {"mask": mask},
        "token_advantages": token | {"mask": mask},
        "empty_row": token | {"mask": last_empty},
    }


def verl_advantages() -> dict:
    """Groups of four (0/1, spread, all equal), and one of a single rollout; the reward sits on the last token."""
    groups = {"binary": [0, 1, 0, 0], "spread": [-0.3, 1.7, 12.5, 0.05], "equal": [0.7] * 4, "single": [0.6]}
    index = ["binary", "spread", "binary", "equal", "equal", "spread", "single", "spread"]
    index += ["binary", "equal", "spread", "equal", "binary"]
    taken = {name: iter(values) for name, values in groups.items()}
    rewards = torch.tensor([float(next(taken[name])) for name in index], dtype=torch.float64)
    lengths = torch.arange(len(index)) % 3 + 1
    mask = (torch.arange(3) < lengths[:, None]).long()
    token_rewards = torch.zeros(mask.shape, dtype=torch.float64)
    token_rewards[torch.arange(len(index)), lengths - 1] = rewards
    out = {"group": index, "rewards": rewards, "mask": mask, "epsilon": 1e-6}
    for key, norm in (("normalised", True), ("centred", False)):
        out[key], _ = core_algos.compute_grpo_outcome_advantage(
            token_rewards, mask, np.array(index), epsilon=1e-6, norm_adv_by_std_in_grpo=norm
        )
    return out


def verl_policy_losses(batches: dict) -> list[dict]:
    vanilla = core_algos.get_policy_loss_fn("vanilla")
    fixed = {"dp_size": 1, "batch_num_tokens": 40, "global_batch_size": 8, "loss_scale_factor": 32}
    cases = []
    for name, batch in batches.items():
        for mode in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"):
            for clip_c, info in ((10.0, {}), (3.0, {}), (10.0, fixed)):
                config = ActorConfig(
                    strategy="fsdp", rollout_n=ROWS, ppo_micro_batch_size_per_gpu=ROWS,
                    clip_ratio_low=LOW, clip_ratio_high=HIGH, clip_ratio_c=clip_c, global_batch_info=info,
                )  # fmt: skip
                logp = batch["log_probs"].clone().requires_grad_()
                loss, metrics = vanilla(
                    batch["old_log_probs"], logp, batch["advantages"], batch["mask"], loss_agg_mode=mode, config=config
                )
                loss.backward()
                settings = {"clip_ratio_low": LOW, "clip_ratio_high": HIGH, "clip_ratio_c": clip_c}
                settings |= {"loss_agg_mode": mode, "global_batch_info": info}
                metrics = {key.removeprefix("actor/"): value for key, value in metrics.items()}
                cases.append({"batch": name} | settings | {"loss": loss, "grad": logp.grad} | metrics)
    return cases


def verl_kl() -> dict:
    logp = torch.tensor([-0.05, -0.8, -2.0, -3.1, -5.9, -0.3, -6.0, -1.5, -27.0, -0.1], dtype=torch.float64)
    ref = torch.tensor([-0.07, -0.8, -0.4, -6.0, -0.05, -5.8, -3.4, -1.45, -0.5, -24.0], dtype=torch.float64)
    out = {"log_probs": logp, "ref_log_probs": ref}
    for kind in ("k1", "k2", "k3", "low_var_kl", "k3+"):
        leaf = logp.clone().requires_grad_()
        value = core_algos.kl_penalty(leaf, ref, kind)
        value.sum().backward()
        out[kind] = {"value": value, "grad": leaf.grad}
    return out


def trl_losses(batches: dict) -> list[dict]:
    max_length = 32
    cases = []
    for name, batch in batches.items():
        runs = [(kind, None, 0.0, False) for kind in ("dapo", "grpo", "bnpo", "dr_grpo")] + [("dapo", 10.0, 0.0, False)]
        runs += [(kind, None, 0.04, corrected) for kind in ("dapo", "grpo") for corrected in (False, True)]
        for loss_type, delta, beta, corrected in runs:
            args = GRPOConfig(
                output_dir="unused", report_to="none", use_cpu=True, bf16=False, loss_type=loss_type, epsilon=LOW,
                epsilon_high=HIGH, delta=delta, beta=beta, use_bias_correction_kl=corrected,
                max_completion_length=max_length,
            )  # fmt: skip
            logp = batch["log_probs"].clone().requires_grad_()
            scores = (logp, torch.zeros_like(logp), None)  # log-probs, entropies, auxiliary loss
            trainer = SimpleNamespace(
                **{key: getattr(args, key) for key in (
                    "beta", "loss_type", "importance_sampling_level", "top_entropy_quantile", "max_completion_length",
                    "off_policy_mask_threshold", "use_vllm", "vllm_importance_sampling_correction",
                )},
                args=args, epsilon_low=args.epsilon, epsilon_high=args.epsilon_high, aux_loss_enabled=False,
                _entropy_bonus_enabled=False, accelerator=Accelerator(cpu=True), model=SimpleNamespace(training=False),
                _metrics={"eval": defaultdict(list)}, _get_per_token_logps_and_entropies=lambda *_, s=scores, **__: s,
            )  # fmt: skip
            ids = torch.zeros(ROWS, TOKENS, dtype=torch.long)
            inputs = {
                "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids,
                "completion_mask": batch["mask"], "advantages": batch["advantages"],
                "old_per_token_logps": batch["old_log_probs"], "ref_per_token_logps": batch["ref_log_probs"],
                "num_items_in_batch": batch["mask"].sum(),
            }  # fmt: skip
            loss = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
            loss.backward()
            logged = trainer._metrics["eval"]
            names = {"clip_low_mean": "clip_ratio/low_mean", "clip_high_mean": "clip_ratio/high_mean", "kl": "kl"}
            metrics = {key: logged[theirs][0] for key, theirs in names.items() if theirs in logged}
            settings = {"loss_type": loss_type, "epsilon": LOW, "epsilon_high": HIGH, "delta": delta, "beta": beta}
            settings |= {"use_bias_correction_kl": corrected, "max_completion_length": max_length}
            settings |= {"num_items_in_batch": inputs["num_items_in_batch"]}
            cases.append({"batch": name} | settings | {"loss": loss, "grad": logp.grad} | metrics)
    return cases


def check_regimes(batches: dict) -> None:
    """Each batch must reach every branch: inside the range, both clips, and the dual clip at 3 and at 10."""
    for name, batch in batches.items():
        ratio, adv, mask = (batch["log_probs"] - batch["old_log_probs"]).exp(), batch["advantages"], batch["mask"] > 0
        found = {
            "same": ratio == 1, "inside": (ratio != 1) & (ratio > 1 - LOW) & (ratio < 1 + HIGH),
            "high": (ratio > 1 + HIGH) & (adv > 0), "low": (ratio < 1 - LOW) & (adv < 0),
            "low, not clipped": (ratio < 1 - LOW) & (adv > 0),
            "high, not clipped": (ratio > 1 + HIGH) & (ratio < 3) & (adv < 0),
            "dual 3": (ratio > 3) & (ratio < 10) & (adv < 0), "dual 10": (ratio > 10) & (adv < 0),
        }  # fmt: skip
        missing = [key for key, where in found.items() if not (where & mask).any()]
        gap = batch["ref_log_probs"] - batch["log_probs"]
        assert not missing, f"{name}: no token for {missing}; draw other inputs"
        assert (gap.exp() - gap - 1 < 10).all(), f"{name}: verl's KL clamp is reached; draw other references"


def main() -> None:
    batches = draw_batches()
    check_regimes(batches)
    golden = {
        "meta": {
            "command": "python tests/golden/make_losses.py",
            "date": datetime.date.today().isoformat(),
            "dtype": "float64 (masks int64)",
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in ("torch", "verl", "trl", "transformers", "accelerate", "numpy")},
        },
        "notes": NOTES,
        "batches": batches,
        "verl_advantages": verl_advantages(),
        "verl_kl": verl_kl(),
        "verl_policy": verl_policy_losses(batches),
        "trl": trl_losses(batches),
    }
    text = json.dumps(golden, indent=1, default=lambda tensor: tensor.tolist(), allow_nan=False)
    text = re.sub(r"\[([^\[\]{}\"]*)\]", lambda row: "[" + " ".join(row[1].split()) + "]", text)  # a row on one line
    path = Path(__file__).with_name("losses.json")
    path.write_text(text + "\n", encoding="utf-8")
    print(f"{path}: {len(text)} bytes")


if __name__ == "__main__":
    main()
