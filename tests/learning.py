"""A learning problem in small, for `test_learns.py`: mazes that chance practically never solves, a word-level
tokenizer, and a policy of 0.1 million parameters that was taught to follow tips and to act at random without them.

The method itself (prompts, collection, memory, novelty, advantages, update, the loop) is the project's, untouched.
"""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from empo2 import attention, config, models, prompts, sequences, store
from empo2.assemble import Parts
from empo2.chat import ChatFormat
from empo2.collect import Collector
from empo2.config import Config
from empo2.embed import CachedEmbedder, HashingEmbedder
from empo2.envs.base import Split
from empo2.envs.pool import PoolCounters
from empo2.episode import LiveEpisode, PromptRules
from empo2.examples import WorkedExamples
from empo2.learner import Learner
from empo2.memory import Retrieval, TipMemory, scope_of
from empo2.novelty import NoveltyCounter
from empo2.run import RunFolder
from empo2.sampler.local import LocalSampler
from empo2.train import train
from empo2.types import (
    Completion,
    EpisodeKey,
    EpisodePlan,
    Mode,
    Span,
    SpanKey,
    StepResult,
    Task,
    Tip,
    TrainingSequence,
    Trajectory,
)
from runs import Silent

# ---- the environment -------------------------------------------------------------------------------------------------

ROOMS = ("one", "two", "three", "four")  #: chance solves a maze in 1 of 4⁴ = 256 episodes
KINDS = {  #: of doors; the doors in every room of a maze are of one kind
    "wood": ("oak", "elm", "ash", "fir"),
    "stone": ("slate", "flint", "chalk", "marble"),
    "metal": ("iron", "tin", "zinc", "lead"),
    "cloth": ("silk", "wool", "linen", "felt"),
}
GOALS = tuple(range(len(KINDS)))  #: one maze of each kind: goals share no door


def task_of(variation: int) -> Task:
    return Task(environment="maze", name="maze", variation=variation)


def goal(variation: int) -> tuple[str, tuple[str, ...]]:
    """Kind and way out of a maze that is trained with RL. No habit solves it: each of its doors is taken once."""
    kind = list(KINDS)[variation]
    return kind, tuple(random.Random(f"maze/{variation}").sample(KINDS[kind], len(ROOMS)))


class Maze:
    """Rooms one after another. Every door leads on, but only one way leads out: score 100 at the end, otherwise 0."""

    def reset(self, task: Task, seed: int) -> tuple[str, dict[str, Any]]:
        return self.begin(*goal(task.variation))

    def begin(self, kind: str, way_out: Sequence[str]) -> tuple[str, dict[str, Any]]:
        self.kind, self.way_out = kind, tuple(way_out)
        self.taken: tuple[str, ...] = ()
        return self._seen(), {"state": self._state(), "task": "Leave."}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        valid = action in KINDS[self.kind]
        if valid:
            self.taken += (action,)
        over = len(self.taken) == len(ROOMS)
        solved = self.taken == self.way_out
        if over:
            seen = state = "You are out." if solved else "You are lost."
        else:
            seen, state = self._seen(), self._state()
        return seen, 100.0 * solved, over, False, {"state": state, "valid": valid, "success": solved}

    def close(self) -> None:
        pass

    def _seen(self) -> str:
        return f"{self._state()} Doors of {self.kind}."

    def _state(self) -> str:
        return f"You are in room {ROOMS[len(self.taken)]}."


class MazeSuite:
    """The train split holds the goals."""

    name = "maze"
    per_worker = 64

    def task_names(self) -> tuple[str, ...]:
        return ("maze",)

    def variations(self, task_name: str, split: Split) -> tuple[int, ...]:
        return GOALS

    def instructions(self) -> str:
        return "Reply with one door."

    def check(self) -> None:
        pass

    def open(self) -> Maze:
        return Maze()


class PoolInProcess:
    """The methods of `EnvironmentPool` that a collector calls, without processes."""

    def __init__(self, suite: MazeSuite, num_slots: int) -> None:
        self.num_slots = num_slots
        self.counters = PoolCounters()
        self._environments = [suite.open() for _ in range(num_slots)]
        self._answers: dict[int, Any] = {}

    def start_reset(self, slot: int, task: Task, seed: int) -> None:
        self._answers[slot] = self._environments[slot].reset(task, seed)

    def receive_reset(self, slot: int) -> tuple[str, dict[str, Any]]:
        return self._answers.pop(slot)

    def start_step(self, slot: int, action: str) -> None:
        self._answers[slot] = step_result(self._environments[slot].step(action))

    def receive_step(self, slot: int) -> StepResult:
        return self._answers.pop(slot)

    def close(self) -> None:
        pass


def step_result(answer: tuple[str, float, bool, bool, dict[str, Any]]) -> StepResult:
    observation, reward, terminated, truncated, info = answer
    return StepResult(observation=observation, reward=reward, terminated=terminated, truncated=truncated, info=info)


# ---- tokenizer and policy --------------------------------------------------------------------------------------------

TIPS = {True: "Good", False: "Bad"}  #: what the policy learns to write; what was done, the suffix says


def word_tokenizer() -> Any:
    """One token a word, ChatML; the vocabulary is read off everything that is said here."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    shown = [prompts.stored_tip(tip, "Action taken here: oak.", 100.0 * good) for good, tip in TIPS.items()]
    said = [
        "system user assistant You are in room . out lost Leave Doors of",
        MazeSuite().instructions(),
        prompts.first_turn("Leave .", "", shown),
        *(prompts.tip_request("", 100.0 * good) for good in TIPS),
        *(" ".join(words) for words in (ROOMS, KINDS, *KINDS.values())),
    ]
    splitter = pre_tokenizers.Whitespace()
    words = dict.fromkeys(["<unk>", *(word for text in said for word, _ in splitter.pre_tokenize_str(text))])
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = splitter
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", unk_token="<unk>")
    tokenizer.chat_template = models.CHATML
    return tokenizer


LONGEST = 512  #: tokens of the model's context


def new_model(tokenizer: Any, seed: int) -> Any:
    """About 0.1 million parameters, with the project's attention."""
    attention.register()
    model = models.tiny_model(len(tokenizer), seed, width=64, layers=2, max_tokens=LONGEST)
    model.set_attn_implementation(attention.NAME)
    return model


def prompt_rules(tokenizer: Any, recipe: Config) -> PromptRules:
    return PromptRules(
        chat=ChatFormat.of(tokenizer),
        instructions=MazeSuite().instructions(),
        max_tokens=recipe.model.max_tokens,
        max_action_tokens=recipe.collect.max_action_tokens,
        window_turns=None,
        tips_stay=True,
        max_tip_tokens=recipe.memory.max_tip_tokens,
    )


# ---- imitation -------------------------------------------------------------------------------------------------------

FAITHFUL = 0.85  #: how often the taught policy takes the door that a good tip names; real models err as well


@dataclass
class Teacher:
    """Writes episodes in other mazes than the goals, rendered by the project's own code.

    Half of them show, in every room, the tip of a success, which is followed; in the others doors are random. The way
    out is another one each time, so that nothing but the tip is worth learning.
    """

    rules: PromptRules
    suffix: str
    rng: random.Random

    def lesson(self) -> TrainingSequence:
        kind = self.rng.choice(list(KINDS))
        doors = KINDS[kind]
        way_out = self._other_way(kind)
        shows_tips = self.rng.random() < 0.5
        shown = self._tips(kind, way_out) if shows_tips else [() for _ in ROOMS]
        taken = [d if shows_tips and self.rng.random() < FAITHFUL else self.rng.choice(doors) for d in way_out]
        trajectory, request = self._episode(kind, way_out, taken, shown)
        (acted,) = sequences.build(trajectory, [1.0] * len(ROOMS), plain=False)
        said = self._said(TIPS[trajectory.success]).token_ids
        written = Span(
            start=len(request),
            stop=len(request) + len(said),
            key=SpanKey(0, 0, len(ROOMS)),
            advantage=1.0,
            sampler_logprobs=None,
        )
        return TrainingSequence(token_ids=request + said, spans=(*acted.spans, written))

    def _other_way(self, kind: str) -> tuple[str, ...]:
        """A way out that is not that of a goal."""
        while True:
            way_out = tuple(self.rng.choice(KINDS[kind]) for _ in ROOMS)
            if (kind, way_out) not in map(goal, GOALS):
                return way_out

    def _tips(self, kind: str, way_out: Sequence[str]) -> list[tuple[Tip, ...]]:
        """The memory entries of an earlier success, one for each room."""
        success, _ = self._episode(kind, way_out, way_out, [() for _ in ROOMS])
        texts = [
            prompts.stored_tip(TIPS[True], prompts.tip_suffix(success, turn, self.suffix), success.score)
            for turn in success.turns
        ]
        return [(Tip(text=text, score=success.score, similarity=1.0, source=success.key),) for text in texts]

    def _episode(
        self,
        kind: str,
        way_out: Sequence[str],
        taken: Sequence[str],
        shown: Sequence[tuple[Tip, ...]],
    ) -> tuple[Trajectory, tuple[int, ...]]:
        """The episode in which these doors are taken and these tips are shown, and the prompt that asks for its tip."""
        plan = EpisodePlan(task=task_of(0), mode=Mode.WITH_TIPS, key=EpisodeKey(0, 0, 0))
        episode, maze = LiveEpisode(plan=plan, slot=0, rules=self.rules, examples=()), Maze()
        episode.begin(*maze.begin(kind, way_out))
        for door, tips in zip(taken, shown, strict=True):
            episode.next_prompt(Retrieval(tips=tips, candidates=len(tips), entries=len(tips)))
            episode.observe(step_result(maze.step(episode.act(self._said(door)))), len(ROOMS))
        return episode.finish(0, None), episode.tip_prompt(LONGEST)

    def _said(self, text: str) -> Completion:
        ids = (*self.rules.chat.text_ids(text), self.rules.chat.closer)
        return Completion(token_ids=ids, logprobs=(0.0,) * len(ids), text=text, truncated=False)


def imitate(tokenizer: Any, recipe: Config, *, seed: int, updates: int, batch: int, lr: float) -> Any:
    """A policy that has learnt its lessons.

    With advantage 1 and the ratio at exactly 1 the project's policy gradient *is* that of supervised learning.
    """
    teacher = Teacher(prompt_rules(tokenizer, recipe), recipe.memory.suffix, random.Random(seed))
    learner = Learner(new_model(tokenizer, seed), recipe.learner, recipe.loss, temperature=1.0)
    for index in range(updates):
        warm, cool = min(1.0, (index + 1) / 20), min(1.0, (updates - index) / (updates / 3))
        learner.update([teacher.lesson() for _ in range(batch)], {}, lr * warm * cool)
    return learner.model


# ---- reinforcement learning ------------------------------------------------------------------------------------------


class ShuffledTips(TipMemory):
    """A control: every maze is shown the tips of another one."""

    def retrieve(self, scope: str, query: NDArray[Any]) -> Retrieval:
        scopes = [scope_of(task_of(variation), "variation") for variation in GOALS]
        return super().retrieve(scopes[(scopes.index(scope) + 1) % len(scopes)], query)


def assembled(tokenizer: Any, start: Any, recipe: Config, *, memory_kind: type[TipMemory] = TipMemory) -> Parts:
    """What `assemble.assemble` makes of a recipe, for the mazes and the taught policy ``start`` (which is copied)."""
    suite, connection, embedder = MazeSuite(), store.open_store(":memory:"), CachedEmbedder(HashingEmbedder())
    pool: Any = PoolInProcess(suite, recipe.env.live)
    settings = recipe.memory
    memory = memory_kind(
        connection,
        threshold=settings.threshold,
        k=settings.k,
        rank=settings.rank,
        max_entries=settings.max_entries,
        min_score=settings.show_min_score,
    )
    rules = prompt_rules(tokenizer, recipe)
    collector = Collector(
        sampler=LocalSampler(copy.deepcopy(start), tokenizer, rules.chat.stop_ids, recipe.env.live),
        pool=pool,
        memory=memory,
        embedder=embedder,
        rules=rules,
        examples=WorkedExamples(0, {}),
        memory_scope=settings.scope,
        overlap=recipe.collect.overlap,
        longest=LONGEST,
    )
    return Parts(
        config=recipe,
        suite=suite,
        tokenizer=tokenizer,
        embedder=embedder,
        connection=connection,
        memory=memory,
        novelty=NoveltyCounter(
            connection,
            coefficient=recipe.novelty.coefficient,
            threshold=recipe.novelty.threshold,
            kind=recipe.novelty.kind,
        ),
        pool=pool,
        collector=collector,
        learner=Learner(copy.deepcopy(start), recipe.learner, recipe.loss, temperature=recipe.collect.temperature),
        train_tasks=tuple(task_of(variation) for variation in GOALS),
    )


#: How the policy is taught.
LESSONS: dict[str, Any] = {"updates": 400, "batch": 32, "lr": 3e-3}

#: What all arms share. Modes are drawn per episode: in a group whose episodes were all shown the way out, all succeed,
#: and nothing is left to distil (docs/log.md, 2026-11-25).
RECIPE: dict[str, dict[str, Any]] = {
    "train": {"steps": 100, "checkpoint_every": 100},
    "model": {"max_tokens": 200, "embedder": "hashing"},
    "env": {"name": "maze", "tasks": ["maze"], "max_turns": len(ROOMS), "live": 32},
    "prompt": {"examples": 0},
    "collect": {"groups_per_step": 4, "group_size": 8, "temperature": 1.0, "max_action_tokens": 2, "overlap": False},
    "modes": {"granularity": "per_episode", "p": 0.5, "q": 0.6666666666666666},
    "memory": {"k": 1, "threshold": 0.9, "tip_tokens": 2, "max_tip_tokens": 200, "show_min_score": 50.0},
    "novelty": {"coefficient": 0.02, "kind": "exact"},
    "advantage": {"std_floor": 5.0},
    "learner": {"lr": 3e-4, "micro_batch_tokens": 16384},
    "eval": {"num_variations": 0, "train_variations": len(GOALS), "episodes": 16, "temperature": 1.0},
}

#: Arm → what it changes. The first is the method; the others must fail.
ARMS: dict[str, dict[str, Any]] = {
    "empo2": {},
    "plain": {"modes.p": 0.0},
    "no distill": {"modes.q": 0.0},
    "shuffled tips": {},
}


def recipe_of(arm: str, seed: int, **changes: Any) -> Config:
    overrides = {"train.seed": seed, **ARMS[arm], **changes}
    return config.from_dict(config.with_overrides(RECIPE, list(overrides.items())))


def train_arm(folder: Path, arm: str, start: Any, seed: int, **changes: Any) -> RunFolder:
    """Train one arm from the taught policy ``start`` with the project's loop."""
    recipe = recipe_of(arm, seed, **changes)
    run = RunFolder.create(folder, recipe)
    memory_kind = ShuffledTips if arm == "shuffled tips" else TipMemory
    train(assembled(word_tokenizer(), start, recipe, memory_kind=memory_kind), run, Silent())
    return run
