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

ROOMS = ("one", "two", "three", "four")  #: chance solves a maze in 1 of 5⁴ = 625 episodes
WORDS = tuple(
    "oak elm ash yew fir bay fig may lime pear plum teak pine palm sage rose iris lily moss fern reed rush hop vine".split()
)
NUM_DOORS = 5
GOALS = (0, 1, 2, 3)  #: trained with RL; none of their sets of doors is ever shown in imitation


def task_of(variation: int) -> Task:
    return Task(environment="maze", name="maze", variation=variation)


def doors_of(variation: int) -> tuple[str, ...]:
    """The doors in every room of a goal; no two goals share one."""
    return WORDS[NUM_DOORS * variation : NUM_DOORS * (variation + 1)]


def random_way(rng: random.Random, doors: Sequence[str]) -> tuple[str, ...]:
    """One door for each room."""
    return tuple(rng.choice(doors) for _ in ROOMS)


class Maze:
    """Rooms one after another. Every door leads on, but only one way leads out: score 100 at the end, otherwise 0."""

    def reset(self, task: Task, seed: int) -> tuple[str, dict[str, Any]]:
        """Habits lead nowhere: ``seed`` orders the doors ("always the second"), a way out takes no door twice."""
        doors = doors_of(task.variation)
        way_out = random.Random(f"maze/{task.variation}").sample(doors, len(ROOMS))
        return self.begin(random.Random(seed).sample(doors, NUM_DOORS), way_out)

    def begin(self, doors: Sequence[str], way_out: Sequence[str]) -> tuple[str, dict[str, Any]]:
        self.doors, self.way_out, self.taken = tuple(doors), tuple(way_out), 0
        self.right = True  # so far
        return self._seen(), {"state": self._state(), "task": "Leave."}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        valid = action in self.doors
        if valid:
            self.right = self.right and action == self.way_out[self.taken]
            self.taken += 1
        over = self.taken == len(ROOMS)
        solved = over and self.right
        if over:
            seen = state = "You are out." if solved else "You are lost."
        else:
            seen, state = self._seen(), self._state()
        return seen, 100.0 * solved, over, False, {"state": state, "valid": valid, "success": solved}

    def close(self) -> None:
        pass

    def _seen(self) -> str:
        return f"{self._state()} Doors: {' '.join(self.doors)}."

    def _state(self) -> str:
        return f"You are in room {ROOMS[self.taken]}."


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

    shown = [prompts.stored_tip(tip, "Done: in the room one: oak; .", 100.0 * good) for good, tip in TIPS.items()]
    said = [
        "system user assistant You are in room . out lost Leave Doors :",
        MazeSuite().instructions(),
        prompts.first_turn("Leave .", "", shown),
        *(prompts.tip_request("", 100.0 * good) for good in TIPS),
        *(" ".join(words) for words in (ROOMS, WORDS)),
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

    Half of them show the tip of a success, which is followed; the others the tip of a failure or none, and the doors
    are random. Doors and the way out are others each time, so that nothing but the tip is worth learning.
    """

    rules: PromptRules
    suffix: str
    rng: random.Random

    def lesson(self) -> TrainingSequence:
        kind = self.rng.choice(("good", "good", "bad", "none"))
        doors = self._other_doors()
        way = random_way(self.rng, doors)
        shown = () if kind == "none" else (self._tip(doors, way, good=kind == "good"),)
        faithful = kind == "good"
        taken = [d if faithful and self.rng.random() < FAITHFUL else self.rng.choice(doors) for d in way]
        trajectory, request = self._episode(doors, way, taken, shown)
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

    def _other_doors(self) -> tuple[str, ...]:
        """Doors that are not those of a goal: of no goal more than half."""
        while True:
            doors = tuple(self.rng.sample(WORDS, NUM_DOORS))
            if all(len(set(doors) & set(doors_of(goal))) <= NUM_DOORS // 2 for goal in GOALS):
                return doors

    def _tip(self, doors: Sequence[str], way_out: Sequence[str], *, good: bool) -> Tip:
        """A memory entry as an earlier episode would have left it."""
        taken = tuple(way_out)
        while not good and taken == tuple(way_out):
            taken = random_way(self.rng, doors)
        trajectory, _ = self._episode(doors, way_out, taken, ())
        suffix = prompts.tip_suffix(trajectory, trajectory.turns[0], self.suffix)
        text = prompts.stored_tip(TIPS[good], suffix, trajectory.score)
        return Tip(text=text, score=trajectory.score, similarity=1.0, source=trajectory.key)

    def _episode(
        self, doors: Sequence[str], way_out: Sequence[str], taken: Sequence[str], shown: tuple[Tip, ...]
    ) -> tuple[Trajectory, tuple[int, ...]]:
        """The episode in which these doors are taken, and the prompt that asks for its tip."""
        plan = EpisodePlan(task=task_of(0), mode=Mode.WITH_TIPS, key=EpisodeKey(0, 0, 0))
        episode, maze = LiveEpisode(plan=plan, slot=0, rules=self.rules, examples=()), Maze()
        episode.begin(*maze.begin(doors, way_out))
        for door in taken:
            episode.next_prompt(Retrieval(tips=shown, candidates=len(shown), entries=len(shown)))
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


#: What all arms share. `modes` and `novelty` are the method's, as in the recipes.
RECIPE: dict[str, dict[str, Any]] = {
    "train": {"steps": 60, "checkpoint_every": 60},
    "model": {"max_tokens": 400, "embedder": "hashing"},
    "env": {"name": "maze", "tasks": ["maze"], "max_turns": len(ROOMS), "live": 32},
    "prompt": {"examples": 0},
    "collect": {"groups_per_step": 4, "group_size": 8, "temperature": 1.0, "max_action_tokens": 2, "overlap": False},
    "modes": {"p": 0.75, "q": 0.6666666666666666},
    "memory": {"k": 1, "suffix": "state_actions", "tip_tokens": 2, "max_tip_tokens": 300, "show_min_score": 50.0},
    "novelty": {"coefficient": 0.02, "kind": "exact"},
    "advantage": {"std_floor": 5.0},
    "learner": {"lr": 1e-3, "micro_batch_tokens": 16384},
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
