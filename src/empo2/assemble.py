"""A recipe → the parts of a run, checked before anything starts."""

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from empo2 import models, precision, store
from empo2.allocator import keep_few_products, keep_freed_memory
from empo2.chat import ChatFormat, Message
from empo2.collect import Collector
from empo2.config import Config
from empo2.embed import CachedEmbedder, HashingEmbedder, SentenceEmbedder
from empo2.envs.base import Split, Suite, check_tasks, suite_of, without_panels
from empo2.envs.pool import EnvironmentPool
from empo2.episode import PromptRules, tip_room
from empo2.errors import ConfigError, UsageError
from empo2.examples import WorkedExamples, gather
from empo2.learner import Learner
from empo2.memory import TipMemory, scope_of
from empo2.novelty import NoveltyCounter
from empo2.prompts import first_turn, opening
from empo2.run import available_cores
from empo2.sampler.local import LocalSampler
from empo2.types import Embedder, Task


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything a run is made of. ``learner`` is None where nothing is trained."""

    config: Config
    suite: Suite
    tokenizer: Any
    embedder: Embedder
    connection: sqlite3.Connection
    memory: TipMemory
    novelty: NoveltyCounter
    pool: EnvironmentPool
    collector: Collector
    learner: Learner | None
    train_tasks: tuple[Task, ...]

    def close(self) -> None:
        self.pool.close()
        self.connection.close()


def make_suite(config: Config) -> Suite:
    """The recipe's environment. Raises ConfigError for an unknown environment or task."""
    made = suite_of(config.env)
    check_tasks(made, config.env.tasks)
    return made


def with_tasks(config: Config) -> Config:
    """The recipe with the tasks of named panels in place of their names."""
    return replace(config, env=without_panels(config.env))


def train_tasks(config: Config, environment: Suite) -> tuple[Task, ...]:
    """All (task, variation) pairs that are trained on. Raises ConfigError for an unknown variation."""
    tasks = []
    for key, values in (("env.tasks", config.env.tasks), ("env.variations", config.env.variations)):
        if len(set(values)) < len(values):
            raise ConfigError(f"{key} = {list(values)} names something twice; name each once")
    for name in config.env.tasks:
        official = environment.variations(name, "train")
        for variation in config.env.variations:
            if variation not in official:
                raise ConfigError(
                    f"{name} has no train variation {variation} (train: {official[0]}…{official[-1]}); "
                    "set env.variations"
                )
        chosen = config.env.variations or official[: config.env.num_variations]
        tasks += [Task(environment=environment.name, name=name, variation=v) for v in chosen]
    return tuple(tasks)


def split_tasks(
    config: Config, environment: Suite, split: Split, num_variations: int, *, but: Sequence[Task] = ()
) -> tuple[Task, ...]:
    """The first variations of a split, passing over ``but``, for every task of the recipe; fewer where it has fewer."""
    tasks = [
        Task(environment=environment.name, name=name, variation=variation)
        for name in config.env.tasks
        for variation in environment.variations(name, split)
    ]
    return first_of_each_name([task for task in tasks if task not in but], num_variations)


def first_of_each_name(tasks: Sequence[Task], count: int) -> tuple[Task, ...]:
    """The first ``count`` tasks of each name."""
    names = [task.name for task in tasks]
    return tuple(task for index, task in enumerate(tasks) if names[:index].count(task.name) < count)


def preflight(config: Config) -> None:
    """Everything that can be refused without loading a model: raises UsageError or a subclass."""
    from empo2.algorithms import algorithm

    algorithm(config)
    config = with_tasks(config)
    environment = make_suite(config)
    environment.check()
    scopes_instead(config, train_tasks(config, environment))
    device_of(config)
    if config.model.path not in (models.TINY, *models.fetchable()):
        models.locate(config.model.path)


def imitated_tasks(config: Config) -> list[Task]:
    """Tasks to train on that the policy walked to the end in its warm-up: what it scores there is not exploration."""
    if config.model.path in (models.TINY, models.WORDS):
        return []
    games = models.imitated(config.model.path)
    trained = train_tasks(config, make_suite(config))
    return [task for task in trained if task.variation in games.get(task.name, ())]


def resolved(config: Config) -> Config:
    """The recipe with its tasks, and this machine's precision in place of `auto`: so a run is resumed as it began."""
    keep_few_products()  # before `fastest` multiplies
    config, model = with_tasks(config), config.model
    chosen: dict[str, Any] = {
        key: precision.fastest(device_of(config))
        for key in ("sampler_dtype", "trainer_dtype")
        if getattr(model, key) == "auto"
    }
    return replace(config, model=replace(model, **chosen))


def needed_models(config: Config) -> list[str]:
    """Fetchable models that the recipe uses and that are not there."""
    wanted = [config.model.path, *([models.MINILM] if config.model.embedder == "minilm" else [])]
    return [name for name in wanted if name in models.fetchable() and models.fetched(name) is None]


def assemble(config: Config, store_path: Path | str, *, with_learner: bool) -> Parts:
    """Load the model, start environments, gather worked examples. Before: `preflight`, then fetch `needed_models`."""
    torch.set_num_threads(config.train.threads or available_cores())
    config = resolved(config)
    device = device_of(config)
    if with_learner and device == "cpu":
        keep_freed_memory(precision.DTYPES[config.model.trainer_dtype])
    environment = make_suite(config)
    tokenizer = models.load_tokenizer(config.model.path)
    chat = ChatFormat.of(tokenizer)
    path, seed = config.model.path, config.train.seed
    sampled = models.load_model(path, dtype=precision.DTYPES[config.model.sampler_dtype], device=device, seed=seed)
    longest = models.context_length(sampled.config)
    check_length(config, chat, longest)
    learner = _learner(config, device) if with_learner else None
    connection = store.open_store(store_path)
    memory = TipMemory(
        connection,
        threshold=config.memory.threshold,
        k=config.memory.k,
        rank=config.memory.rank,
        max_entries=config.memory.max_entries,
        min_score=config.memory.show_min_score,
    )
    novelty = NoveltyCounter(
        connection,
        coefficient=config.novelty.coefficient,
        threshold=config.novelty.threshold,
        kind=config.novelty.kind,
    )
    embedder = make_embedder(config, device)
    pool = EnvironmentPool(environment, config.env.live, call_timeout_s=config.env.call_timeout_s)
    try:
        trained = train_tasks(config, environment)
        examples = gather(
            environment, pool, trained, count=config.prompt.examples, max_turns=config.prompt.max_example_turns
        )
        rules = prompt_rules(config, chat, environment)
        check_context(rules, examples, trained)
        shown_instead = scopes_instead(config, trained)
    except BaseException:
        pool.close()
        raise
    collector = Collector(
        sampler=LocalSampler(sampled, tokenizer, chat.stop_ids, config.env.live),
        pool=pool,
        memory=memory,
        embedder=embedder,
        rules=rules,
        examples=examples,
        memory_scope=config.memory.scope,
        shown_instead=shown_instead,
        overlap=config.collect.overlap,
        deterministic=config.collect.deterministic,
        longest=longest,
    )
    return Parts(
        config=config,
        suite=environment,
        tokenizer=tokenizer,
        embedder=embedder,
        connection=connection,
        memory=memory,
        novelty=novelty,
        pool=pool,
        collector=collector,
        learner=learner,
        train_tasks=trained,
    )


def prompt_rules(config: Config, chat: ChatFormat, environment: Suite) -> PromptRules:
    """How the recipe's prompts are put together."""
    return PromptRules(
        chat=chat,
        instructions=environment.instructions(),
        max_tokens=config.model.max_tokens,
        max_action_tokens=config.collect.max_action_tokens,
        window_turns=config.prompt.window_turns if config.prompt.history == "window" else None,
        tips_stay=config.memory.placement == "history",
        max_tip_tokens=config.memory.max_tip_tokens,
        cue=config.prompt.cue,
        offers=config.prompt.actions,
        reply=config.prompt.reply,
    )


def make_embedder(config: Config, device: str) -> Embedder:
    if config.model.embedder == "hashing":
        return CachedEmbedder(HashingEmbedder())
    return CachedEmbedder(SentenceEmbedder(models.locate(models.MINILM), device=device))


def scopes_instead(config: Config, tasks: Sequence[Task]) -> dict[str, str]:
    """Memory scope → the scope whose tips are shown in its place: with `memory.source = "other"` the next one's."""
    if config.memory.source == "own":
        return {}
    scopes = list(dict.fromkeys(scope_of(task, config.memory.scope) for task in tasks))
    if len(scopes) < 2:
        raise ConfigError(
            'memory.source = "other" needs tasks with memories of their own, but all share one; set memory.source to '
            "own, memory.scope to variation, or train on more variations"
        )
    return dict(zip(scopes, [*scopes[1:], scopes[0]], strict=True))


def check_context(rules: PromptRules, examples: WorkedExamples, tasks: Sequence[Task]) -> None:
    """Refuse a token limit in which not even the worked examples and a first action fit."""
    for task in tasks:
        shown = examples.of(task)
        first = Message(role="user", text=first_turn("", shown[0].turns[0][0] if shown else "", cue=rules.cue))
        length = len(
            rules.chat.conversation([*opening(rules.instructions, shown, cue=rules.cue, reply=rules.reply), first])
        )
        if length + rules.max_action_tokens > rules.max_tokens:
            raise ConfigError(
                f"the prompt of {task} takes {length} tokens and leaves no room for an action within model.max_tokens "
                f"= {rules.max_tokens}; raise it, or lower prompt.examples"
            )


def check_length(config: Config, chat: ChatFormat, longest: int) -> None:
    """Refuse episodes that may outgrow the model's context, with the tips shown in them and the one written after."""
    needed = {"model.max_tokens": config.model.max_tokens}
    if config.modes.p > 0:
        needed["memory.max_tip_tokens"] = config.memory.max_tip_tokens
        needed["memory.tip_tokens and the request for a tip"] = tip_room(chat, config.memory.tip_tokens)
    if sum(needed.values()) > longest:
        parts = " + ".join(f"{name} {tokens}" for name, tokens in needed.items())
        raise ConfigError(
            f"{parts} = {sum(needed.values())} tokens exceed the model's context of {longest}; lower one of them"
        )


def _learner(config: Config, device: str) -> Learner:
    def load() -> Any:
        return models.load_model(config.model.path, dtype=torch.float32, device=device, seed=config.train.seed)

    model = load()
    if config.learner.last_layers:
        models.train_last_layers(model, config.learner.last_layers)
    if config.learner.compile:
        models.compile_layers(model)
    if config.learner.recompute != "none":
        models.recompute_layers(model, selective=config.learner.recompute == "selective")
    reference = load() if config.loss.kl > 0 else None
    if reference is not None:
        models.share_frozen(model, reference)
    return Learner(
        model,
        config.learner,
        config.loss,
        temperature=config.collect.temperature,
        compute_dtype=precision.DTYPES[config.model.trainer_dtype],
        reference=reference,
    )


def device_of(config: Config) -> str:
    """Where the model lives. Raises UsageError."""
    wanted = config.model.device
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.empty(0, device=wanted).is_meta:
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"model.device = {wanted!r} cannot be used ({str(error).splitlines()[0]}); set it to cpu"
        ) from None
    return wanted
