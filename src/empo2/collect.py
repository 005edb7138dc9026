"""Policy × environment pool (× memory) → trajectories.

All live episodes advance turn by turn, in one batch or in two fixed halves: while one half's environments step, the
other half's actions are sampled. Which episodes share a batch depends on the plan alone, never on the clock (unless
`collect.deterministic` is switched off).
"""

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from empo2 import streams
from empo2.envs.pool import EnvironmentPool
from empo2.episode import LiveEpisode, PromptRules
from empo2.errors import EpisodeDiverged, UsageError
from empo2.examples import WorkedExamples
from empo2.memory import Retrieval, Scope, TipMemory, scope_of
from empo2.types import (
    Completion,
    Embedder,
    EpisodeKey,
    EpisodePlan,
    Sampler,
    SampleRequest,
    SamplingParams,
    Task,
    TokenIds,
    Trajectory,
)

NOTHING = Retrieval(tips=(), candidates=0, entries=0)


@dataclass(frozen=True, kw_only=True)
class CollectRules:
    """What is asked of the episodes of one call."""

    purpose: str  #: names the random streams: "train" or "eval"
    seed: int
    temperature: float
    max_turns: int
    tip_tokens: int = 0  #: token cap of the tip written at the end; 0: none is written
    tip_temperature: float = 1.0
    tip_min_score: float = -math.inf  #: episodes with a lower score write no tip


@dataclass
class CollectCounters:
    """Tokens and time of one call; ``tip_seconds`` are part of the whole."""

    action_tokens: int = 0
    tip_tokens: int = 0
    tip_seconds: float = 0.0
    environment_seconds: float = 0.0  #: spent waiting for environments


class Collector:
    """Runs episodes in ``pool`` with ``sampler``; reads ``memory`` and writes nothing.

    ``overlap``: two halves in turn. ``deterministic``: which episodes share a batch never depends on the clock.
    ``shown_instead``: memory scope → the one whose tips are shown in its place; ``longest``: the model's context.
    """

    def __init__(
        self,
        *,
        sampler: Sampler,
        pool: EnvironmentPool,
        memory: TipMemory,
        embedder: Embedder,
        rules: PromptRules,
        examples: WorkedExamples,
        memory_scope: Scope,
        shown_instead: Mapping[str, str] | None = None,
        overlap: bool,
        deterministic: bool = True,
        longest: int,
    ) -> None:
        self.sampler, self.pool = sampler, pool
        self._memory, self._embedder = memory, embedder
        self.prompt_rules, self.examples, self.longest = rules, examples, longest
        self._scope, self._shown_instead = memory_scope, shown_instead or {}
        self._overlap, self._deterministic = overlap, deterministic
        self.counters = CollectCounters()
        self.on_episode: Callable[[int, int], None] = lambda done, total: None  #: told after each episode

    def collect(self, plans: Sequence[EpisodePlan], rules: CollectRules) -> list[Trajectory]:
        """Run every planned episode to its end; trajectories in the order of the plans.

        Raises UsageError if an episode's first prompt does not fit `model.max_tokens`.
        """
        self.counters = CollectCounters()
        try:
            return self._run(plans, rules)
        finally:  # a call's samples must not depend on earlier calls, and an update needs the cache's memory
            self.sampler.forget()

    def _run(self, plans: Sequence[EpisodePlan], rules: CollectRules) -> list[Trajectory]:
        waiting = deque(plans)
        done: dict[EpisodeKey, Trajectory] = {}
        live: dict[int, LiveEpisode] = {}
        while waiting or live:
            for batch in self._batches(live, more=bool(waiting)):
                episodes = [live[slot] for slot in batch if slot in live]
                for episode in episodes:
                    self._receive(episode, rules)
                requests = self._prompts([episode for episode in episodes if episode.ending is None])
                ended = [episode for episode in episodes if episode.ending is not None]
                for episode, trajectory in zip(ended, self._end(ended, rules), strict=True):
                    done[episode.plan.key] = trajectory
                    del live[episode.slot]
                    self.on_episode(len(done), len(plans))
                for slot in batch:
                    if slot not in live and waiting:
                        live[slot] = self._start(waiting.popleft(), slot, rules)
                self._act(requests, rules)
        return [done[plan.key] for plan in plans]

    def _batches(self, live: Collection[int], *, more: bool) -> Iterator[list[int]]:
        """Slots that advance together: all, two fixed halves in turn, or whichever environments have answered."""
        slots = list(range(self.pool.num_slots))
        if self._deterministic:
            middle = (len(slots) + 1) // 2 if self._overlap else len(slots)
            yield from (slots[:middle], slots[middle:])
        else:
            empty = [slot for slot in slots if slot not in live] if more else []
            yield empty or self.pool.answered(sorted(live))

    def _start(self, plan: EpisodePlan, slot: int, rules: CollectRules) -> LiveEpisode:
        self.pool.start_reset(slot, plan.task, self._seed(plan, rules))
        return LiveEpisode(plan=plan, slot=slot, rules=self.prompt_rules, examples=self.examples.of(plan.task))

    def _seed(self, plan: EpisodePlan, rules: CollectRules) -> int:
        """One seed for the whole group: its episodes differ by what the policy does, not by the environment."""
        return streams.derived_seed(rules.seed, f"{rules.purpose}/environment", plan.key.step, plan.key.group)

    def _receive(self, episode: LiveEpisode, rules: CollectRules) -> None:
        """Take what the episode's environment answered to the reset or to the last action."""
        started = time.perf_counter()
        try:
            if episode.acting:
                result = self.pool.receive_step(episode.slot)
                episode.observe(result, rules.max_turns)
            else:
                episode.begin(*self.pool.receive_reset(episode.slot))
        except EpisodeDiverged:
            episode.restarts += 1
            self.pool.start_reset(episode.slot, episode.plan.task, self._seed(episode.plan, rules))
            episode.begin(*self.pool.receive_reset(episode.slot))
        self.counters.environment_seconds += time.perf_counter() - started

    def _prompts(self, episodes: Sequence[LiveEpisode]) -> list[tuple[LiveEpisode, TokenIds]]:
        """Prompts of the coming turns, tips retrieved where the mode shows them; episodes out of room end here."""
        shown = [episode for episode in episodes if episode.plan.mode.shows_tips]
        vectors = self._embedder.embed([episode.state for episode in shown])
        found = {
            episode.slot: self._retrieve(episode.plan.task, vector)
            for episode, vector in zip(shown, vectors, strict=True)
        }
        requests = []
        for episode in episodes:
            prompt = episode.next_prompt(found.get(episode.slot, NOTHING))
            if prompt is not None:
                requests.append((episode, prompt))
            elif not episode.turns:
                raise UsageError(
                    f"the first prompt of {episode.plan.task} leaves no room for an action within model.max_tokens = "
                    f"{self.prompt_rules.max_tokens}; raise it, or lower prompt.examples"
                )
        return requests

    def _retrieve(self, task: Task, vector: NDArray[np.float32]) -> Retrieval:
        scope = scope_of(task, self._scope)
        return self._memory.retrieve(scope, vector, instead=self._shown_instead.get(scope))

    def _act(self, requests: Sequence[tuple[LiveEpisode, TokenIds]], rules: CollectRules) -> None:
        """Sample one action for each episode and send it on its way."""
        params = SamplingParams(
            temperature=rules.temperature,
            max_tokens=self.prompt_rules.max_action_tokens,
            seed=rules.seed,
            purpose=f"{rules.purpose}/token",
        )
        samples = self.sampler.sample(
            [
                SampleRequest(slot=episode.slot, prompt=prompt, stream=(*episode.plan.key, len(episode.turns)))
                for episode, prompt in requests
            ],
            params,
        )
        for (episode, _), completion in zip(requests, samples, strict=True):
            self.counters.action_tokens += len(completion.token_ids)
            self.pool.start_step(episode.slot, episode.act(completion))

    def _end(self, ended: Sequence[LiveEpisode], rules: CollectRules) -> list[Trajectory]:
        """Close episodes; in training, those whose tips will be shown first write one, with the policy that acted."""
        tips: dict[int, Completion] = {}
        writing = [episode for episode in ended if rules.tip_tokens and episode.score >= rules.tip_min_score]
        if writing:
            started = time.perf_counter()
            params = SamplingParams(
                temperature=rules.tip_temperature,
                max_tokens=rules.tip_tokens,
                seed=rules.seed,
                purpose=f"{rules.purpose}/tip",
            )
            room = self.longest - rules.tip_tokens
            requests = [
                SampleRequest(slot=episode.slot, prompt=episode.tip_prompt(room), stream=(*episode.plan.key,))
                for episode in writing
            ]
            written = self.sampler.sample(requests, params)
            tips = {episode.slot: tip for episode, tip in zip(writing, written, strict=True)}
            self.counters.tip_seconds += time.perf_counter() - started
        self.counters.tip_tokens += sum(len(tip.token_ids) for tip in tips.values())
        return [episode.finish(self.sampler.version, tips.get(episode.slot)) for episode in ended]
