"""What collecting costs beside its parts, with SmolLM2 as the policy.

python benchmarks/collecting.py sleep          # environments that take 50 ms a step, beside each part alone
python benchmarks/collecting.py scienceworld   # seconds beside the processor time of all processes, by core
python benchmarks/collecting.py tips           # share of tips in a step: 32 episodes, 10 turns, 60-token observations;
                                               # actions of 24 tokens, in the last two steps as short as they are
"""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import psutil

from empo2 import assemble as assembling
from empo2.assemble import Parts
from empo2.collect import CollectRules
from empo2.config import Config, from_dict, read_recipe, with_overrides
from empo2.envs.toy import ToyEnvironment, ToySuite
from empo2.run import available_cores
from empo2.train import take_step
from empo2.types import Completion, EpisodeKey, EpisodePlan, Mode, SampleRequest, SamplingParams, Task

SETTINGS: list[tuple[str, Any]] = [
    ("env.name", "toy"),
    ("env.tasks", "coin-8"),
    ("env.num_variations", 4),
    ("env.max_turns", 10),
    ("collect.max_action_tokens", 24),
    ("model.max_tokens", 4096),
]


class LongWinded(ToyEnvironment):
    """The toy house with replies of about 60 tokens, which never ends and takes its time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        time.sleep(self._seconds)
        observation, _, _, _, info = super().step(action if "take" not in action else "look")
        told = f"{observation} You remember: {observation} Then again, {observation} It is a quiet day in the house."
        return told, float(info["valid"]), False, False, info


@dataclass(frozen=True)
class LongWindedSuite(ToySuite):
    seconds: float = 0.0
    per_worker: int = 1  # so that all sleep at the same time

    def open(self) -> LongWinded:
        return LongWinded(self.seconds)


class Instant:
    """A sampler that says the same word each time, without a model."""

    version = 0

    def __init__(self, word: tuple[int, ...]) -> None:
        self._said = Completion(token_ids=word, logprobs=(0.0,) * len(word), text="look", truncated=False)

    def sample(self, requests: Sequence[SampleRequest], params: SamplingParams) -> list[Completion]:
        return [self._said] * len(requests)

    def load_weights(self, weights: Any, version: int) -> None:
        pass

    def forget(self) -> None:
        pass


class Thorough:
    """The sampler, with actions that go on to the last token allowed; tips end where the policy ends them."""

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler

    def sample(self, requests: Sequence[SampleRequest], params: SamplingParams) -> list[Completion]:
        if params.purpose.endswith("/tip"):
            return self._sampler.sample(requests, params)
        stop_ids, self._sampler._stop_ids = self._sampler._stop_ids, frozenset()
        said = self._sampler.sample(requests, params)
        self._sampler._stop_ids = stop_ids
        return said

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)


def recipe(*more: tuple[str, Any]) -> Config:
    return from_dict(with_overrides(read_recipe("default"), [*SETTINGS, *more]))


def parts_of(config: Config, seconds: float, *, with_learner: bool = False) -> Parts:
    assembling.make_suite = lambda _: LongWindedSuite(seconds=seconds)  # the recipe's name for it is the toy's
    return assembling.assemble(config, ":memory:", with_learner=with_learner)


def collected(parts: Parts, tasks: Sequence[Task], episodes: int, repeats: int = 3) -> list[float]:
    """Seconds of collecting ``episodes``, ``repeats`` times after a first time that warms up."""
    config = parts.config
    rules = CollectRules(purpose="train", seed=0, temperature=0.7, max_turns=config.env.max_turns)
    taken = []
    for repeat in range(repeats + 1):
        keys = [EpisodeKey(repeat, 0, n) for n in range(episodes)]
        plans = [EpisodePlan(task=tasks[0], mode=Mode.PLAIN, key=key) for key in keys]
        started = time.perf_counter()
        parts.collector.collect(plans, rules)
        taken.append(time.perf_counter() - started)
    return taken[1:]


def sleep(seconds: float = 0.05) -> None:
    found: dict[str, float] = {}
    for overlap in (True, False):
        config = recipe(("collect.overlap", overlap))
        for name, pause in (("generation alone", 0.0), ("together", seconds)):
            parts = parts_of(config, pause)
            try:
                found[f"{name}, {'two halves' if overlap else 'one batch'}"] = median(
                    collected(parts, parts.train_tasks, 8)
                )
                if pause:
                    parts.collector.sampler = Instant((*parts.tokenizer.encode("look"), parts.tokenizer.eos_token_id))
                    found["environments alone"] = median(collected(parts, parts.train_tasks, 8))
            finally:
                parts.close()
    for name, value in found.items():
        print(f"{name:<32} {value:6.2f} s")
    for way in ("two halves", "one batch"):
        of = max(found[f"generation alone, {way}"], found["environments alone"])
        print(f"{way}: together is {found[f'together, {way}'] / of:.2f} × the longer part")


def scienceworld() -> None:
    config = from_dict(with_overrides(read_recipe("default"), []))
    parts = assembling.assemble(config, ":memory:", with_learner=False)
    try:
        parts.pool.warm(parts.train_tasks[0])
        collected(parts, parts.train_tasks, config.env.live, repeats=0)
        before = processor_seconds()
        started = time.perf_counter()
        collected(parts, parts.train_tasks, config.env.live, repeats=2)
        seconds, used = time.perf_counter() - started, processor_seconds() - before
    finally:
        parts.close()
    print(f"{seconds:.1f} s, {used:.1f} s of processor time on {available_cores()} cores:", end=" ")
    print(f"{seconds / (used / available_cores()):.2f} × what they would take evenly spread")


def processor_seconds() -> float:
    """User and system time of this process and those below it."""
    own = psutil.Process(os.getpid())
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def tips() -> None:
    config = recipe(
        ("env.live", 32),
        ("collect.groups_per_step", 4),
        ("memory.tip_tokens", 48),
        ("collect.overlap", False),
    )
    parts = parts_of(config, 0.0, with_learner=True)
    as_said = parts.collector.sampler
    try:
        for step in (1, 2, 3, 4, 5):  # the first starts the environments
            parts.collector.sampler = Thorough(as_said) if step < 4 else as_said
            taken = take_step(parts, step, step)
            seconds = dict(taken.watch.seconds)
            tip_seconds = parts.collector.counters.tip_seconds + seconds["remember"]
            share = tip_seconds / sum(seconds.values())
            turns = sum(len(t.turns) for group in taken.groups for t in group.trajectories)
            counters = parts.collector.counters
            print(
                f"step {step}: {turns} turns, {counters.action_tokens} action tokens, {counters.tip_tokens} of tips; "
                f"{sum(seconds.values()):.1f} s, tips {tip_seconds:.1f} s = {share:.1%}",
                flush=True,
            )
    finally:
        parts.close()


if __name__ == "__main__":
    {"sleep": sleep, "scienceworld": scienceworld, "tips": tips}[sys.argv[1]]()
