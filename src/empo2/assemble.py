"""A recipe → the parts of a run, checked before anything starts."""

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from empo2 import models, store
from empo2.chat import ChatFormat
from empo2.collect import Collector
from empo2.config import Config
from empo2.embed import CachedEmbedder, HashingEmbedder, SentenceEmbedder
from empo2.envs.base import Split, Suite, check_tasks, suite
from empo2.envs.pool import EnvironmentPool
from empo2.episode import PromptRules
from empo2.errors import ConfigError, UsageError
from empo2.learner import Learner
from empo2.memory import TipMemory
from empo2.novelty import NoveltyCounter
from empo2.prompts import opening
from empo2.run import available_cores
from empo2.sampler.local import LocalSampler
from empo2.types import Embedder, Task, WorkedExample

#: Tokens beyond `model.max_tokens` that writing a tip may take.
TIP_ROOM = 128


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
    env = config.env
    options = (
        {"simplification": env.simplification, "observation": env.observation} if env.name == "scienceworld" else {}
    )
    made = suite(config.env.name, **options)
    check_tasks(made, config.env.tasks)
    return made


def train_tasks(config: Config, environment: Suite) -> tuple[Task, ...]:
    """All (task, variation) pairs that are trained on. Raises ConfigError for an unknown variation."""
    tasks = []
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


def split_tasks(config: Config, environment: Suite, split: Split, num_variations: int) -> tuple[Task, ...]:
    """The first variations of a split for every task of the recipe; fewer where the split has fewer."""
    return tuple(
        Task(environment=environment.name, name=name, variation=variation)
        for name in config.env.tasks
        for variation in environment.variations(name, split)[:num_variations]
    )


def preflight(config: Config) -> None:
    """Everything that can be refused without loading a model: raises UsageError or a subclass."""
    from empo2.algorithms import algorithm

    algorithm(config)
    environment = make_suite(config)
    train_tasks(config, environment)
    environment.check()
    _device(config)
    if config.model.path not in (models.TINY, *models.WHEELS):
        models.locate(config.model.path)


def needed_models(config: Config) -> list[str]:
    """Fetchable models that the recipe uses and that are not there."""
    wanted = [config.model.path, *([models.MINILM] if config.model.embedder == "minilm" else [])]
    return [name for name in wanted if name in models.WHEELS and models.fetched(name) is None]


def assemble(config: Config, store_path: Path | str, *, with_learner: bool) -> Parts:
    """Load the model, start environments, gather worked examples. Before: `preflight`, then fetch `needed_models`."""
    torch.set_num_threads(config.train.threads or available_cores())
    device = _device(config)
    environment = make_suite(config)
    tokenizer = models.load_tokenizer(config.model.path)
    chat = ChatFormat.of(tokenizer)
    path, seed = config.model.path, config.train.seed
    sampled = models.load_model(path, dtype=_dtype(config.model.sampler_dtype, device), device=device, seed=seed)
    longest = models.context_length(sampled.config)
    if config.model.max_tokens + TIP_ROOM > longest:
        raise ConfigError(
            f"model.max_tokens = {config.model.max_tokens} and {TIP_ROOM} tokens for a tip exceed the model's context "
            f"of {longest}; lower model.max_tokens"
        )
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
        examples = worked_examples(config, environment, pool)
        rules = PromptRules(
            chat=chat,
            instructions=environment.instructions(),
            max_tokens=config.model.max_tokens,
            max_action_tokens=config.collect.max_action_tokens,
            window_turns=config.prompt.window_turns if config.prompt.history == "window" else None,
            tips_stay=config.memory.placement == "history",
            max_tip_tokens=config.memory.max_tip_tokens,
            cue=config.prompt.cue,
        )
        _check_context(rules, examples)
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
        overlap=config.collect.overlap,
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
        train_tasks=train_tasks(config, environment),
    )


def make_embedder(config: Config, device: str) -> Embedder:
    if config.model.embedder == "hashing":
        return CachedEmbedder(HashingEmbedder())
    return CachedEmbedder(SentenceEmbedder(models.locate(models.MINILM), device=device))


def worked_examples(config: Config, environment: Suite, pool: EnvironmentPool) -> dict[str, tuple[WorkedExample, ...]]:
    """Solved episodes of train variations that are not trained on (where the split is large enough), by task name.

    The last train variations are tried first; episodes of more than `prompt.max_example_turns` turns only if there are
    no shorter ones among those tried.
    """
    trained = set(train_tasks(config, environment))
    found: dict[str, tuple[WorkedExample, ...]] = {}
    for name in config.env.tasks:
        tasks = [
            Task(environment=environment.name, name=name, variation=v) for v in environment.variations(name, "train")
        ]
        others = [task for task in reversed(tasks) if task not in trained]
        short: list[WorkedExample] = []
        long: list[WorkedExample] = []
        for task in others[: 4 * config.prompt.examples]:
            if len(short) == config.prompt.examples:
                break
            example = pool.worked_example(task)
            if example is not None:
                (short if len(example.turns) <= config.prompt.max_example_turns else long).append(example)
        found[name] = tuple((short + long)[: config.prompt.examples])
        if len(found[name]) < config.prompt.examples:
            raise ConfigError(
                f"{name} offers {len(found[name])} worked episodes outside the trained variations, prompt.examples "
                f"asks for {config.prompt.examples}; lower prompt.examples or env.num_variations"
            )
    return found


def _check_context(rules: PromptRules, examples: Mapping[str, Sequence[WorkedExample]]) -> None:
    """Refuse a token limit in which not even the worked examples and a first action fit."""
    for name, shown in examples.items():
        first = shown[0].turns[0][0] if shown else ""
        length = len(rules.chat.conversation(opening(rules.instructions, shown, "", first, cue=rules.cue)))
        if length + rules.max_action_tokens > rules.max_tokens:
            raise ConfigError(
                f"the prompt of {name} takes {length} tokens and leaves no room for an action within model.max_tokens "
                f"= {rules.max_tokens}; raise it, or lower prompt.examples"
            )


def _learner(config: Config, device: str) -> Learner:
    def load() -> Any:
        return models.load_model(config.model.path, dtype=torch.float32, device=device, seed=config.train.seed)

    model = load()
    if config.learner.last_layers:
        models.train_last_layers(model, config.learner.last_layers)
    return Learner(
        model,
        config.learner,
        config.loss,
        temperature=config.collect.temperature,
        compute_dtype=_dtype(config.model.trainer_dtype, device),
        reference=load() if config.loss.kl > 0 else None,
    )


def _device(config: Config) -> str:
    wanted = config.model.device
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"model.device = {wanted!r} cannot be used ({str(error).splitlines()[0]}); set it to cpu"
        ) from None
    return wanted


def has_bf16_instructions() -> bool:
    """Whether this processor multiplies bfloat16 in hardware (AVX-512 BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _dtype(name: str, device: str) -> torch.dtype:
    if name == "auto":
        fast = device != "cpu" or has_bf16_instructions()
        return torch.bfloat16 if fast else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
