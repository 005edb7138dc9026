"""Warm-up: a model too small to act at all learns the *form* of acting by imitating random walks.

The walks are in other games than those of the recipe. Some show nothing but how to act; in the others the tips of an
earlier walk to the goal are shown and followed, so that the model learns that a tip can be read. Each episode
ends with a tip that says how it went. What is learnt of any one game is worth nothing in another, so the warmed policy
is a random walker that can read and write tips; every arm of a comparison starts from the same one.

Left out on purpose: the walks (walks.py), how they are rendered and imitated (lessons.py).
"""

import itertools
import json
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from empo2 import metrics, models, precision, prompts
from empo2.algorithms import algorithm
from empo2.assemble import (
    Parts,
    assemble,
    check_context,
    check_length,
    device_of,
    make_suite,
    needed_models,
    prompt_rules,
    resolved,
    scopes_instead,
    split_tasks,
    train_tasks,
)
from empo2.chat import ChatFormat
from empo2.config import Config, LossConfig
from empo2.envs.base import Suite, check_tasks
from empo2.envs.pool import EnvironmentPool
from empo2.episode import tip_room
from empo2.errors import UsageError
from empo2.evaluate import run_episodes
from empo2.examples import WorkedExamples, gather
from empo2.learner import Learner
from empo2.lessons import Classroom, Lesson, imitate, lessons
from empo2.lowrank import added, difference
from empo2.memory import NewTip, scope_of
from empo2.run import available_cores, provenance
from empo2.types import Task, Tip
from empo2.walks import failed_walks, walk_to_the_goal

VOCABULARY_LESSONS = 500  #: from which a new tokenizer takes its words


def other_games(config: Config, suite: Suite, trained: Sequence[Task]) -> list[Task]:
    """Train variations from `warmup.first_variation` on whose number is neither trained on nor evaluated.

    Raises UsageError if there are none.
    """
    names = config.warmup.tasks or config.env.tasks
    check_tasks(suite, names)
    unseen = split_tasks(config, suite, config.eval.split, config.eval.num_variations, but=trained)
    kept = {task.variation for task in (*trained, *(unseen if config.eval.split == "train" else ()))}
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


def warm_up(config: Config, told: Callable[[int], None]) -> dict[str, Any]:
    """Make the recipe's policy: imitate, save it as an ordinary model folder at `model.path`, measure it.

    With `warmup.rank` what can be passed on lies beside the folder, in `model.path`.safetensors (lowrank.py).
    Returns what `warmup.json` in the folder says. Until it is measured it lies in `model.path`-unmeasured. Raises
    UsageError if the folder exists, or if the policy scores more than `warmup.max_score` on the recipe's tasks: then
    it lies in `model.path`-refused.
    """
    folder = Path(config.model.path).expanduser()
    if config.model.path in (models.TINY, models.WORDS, *models.fetchable()):
        raise UsageError(f"model.path = {config.model.path!r} is a model of ours; name a new folder with --model.path")
    if folder.exists():
        raise UsageError(f"{folder} is there already; remove it, or warm up into another folder with --model.path")
    algorithm(config)
    suite = make_suite(config)
    suite.check()
    trained = train_tasks(config, suite)
    scopes_instead(config, trained)
    games = other_games(config, suite, trained)
    for name in needed_models(replace(config, model=replace(config.model, path=config.warmup.base))):
        models.fetch(name)
    made, refused = (folder.with_name(f"{folder.name}-{what}") for what in ("unmeasured", "refused"))
    try:
        for old in (made, refused):
            shutil.rmtree(old, ignore_errors=True)
        made.mkdir(parents=True)
        made.rmdir()  # it can be made: known before hours of learning
    except OSError as error:
        raise UsageError(f"{folder} cannot be made ({error.strerror}); choose another --model.path") from None
    torch.set_num_threads(config.train.threads or available_cores())
    tokenizer, model = _taught(config, suite, trained, games, told)
    change = _kept_to_rank(config, model) if config.warmup.rank else None
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    ran = provenance(replace(config, model=replace(config.model, path=config.warmup.base)))
    note = {
        "from": config.warmup.base,
        "from_weights": ran["weights"],
        "warmup": asdict(config.warmup),
        "env": asdict(config.env),
        "seed": config.train.seed,
        **_games_told(games),
        **{key: ran[key] for key in ("date", "code", "packages", "machine", "threads")},
        **measured(replace(config, model=replace(config.model, path=str(made)))),
    }
    (made / "warmup.json").write_text(json.dumps(note, indent=1))
    if note["score"] > config.warmup.max_score:
        made.rename(refused)
        raise UsageError(
            f"the warmed policy ({refused}) scores {note['score']:.3f} on the recipe's tasks, more than "
            f"warmup.max_score = {config.warmup.max_score}: they are too easy to show anything; choose harder ones"
        )
    if change is not None:  # before the folder has its name: a folder that is there is not made again
        save_file(change, folder.with_name(f"{folder.name}.safetensors"), {"warmup": json.dumps(note)})
    made.rename(folder)
    return note


def _games_told(games: Sequence[Task]) -> dict[str, Any]:
    """Task → first, last and number of the variations walked in, and those between that were left out."""
    used: dict[str, list[int]] = {}
    for game in games:
        used.setdefault(game.name, []).append(game.variation)
    return {
        "games": {name: [min(found), max(found), len(found)] for name, found in used.items()},
        "left_out": {name: sorted(set(range(min(found), max(found))) - set(found)) for name, found in used.items()},
    }


def _taught(
    config: Config, suite: Suite, trained: Sequence[Task], games: Sequence[Task], told: Callable[[int], None]
) -> tuple[Any, Any]:
    """Tokenizer and model after `warmup.updates` updates on walks in `games`."""
    environment = suite.open()
    try:
        turns, seed = config.env.max_turns, config.train.seed

        def taught() -> Iterator[Lesson]:
            return lessons(config.warmup, environment, games, turns=turns, seed=seed, k=config.memory.k)

        tokenizer, model = _base(config, suite, taught())
        rules = prompt_rules(config, ChatFormat.of(tokenizer), suite)
        examples = _examples(config, suite, trained)
        check_length(config, rules.chat, models.context_length(model.config))
        check_context(rules, examples, trained)
        longest = models.context_length(model.config) - tip_room(rules.chat, config.memory.tip_tokens)
        classroom = Classroom(rules=rules, examples=examples, suffix=config.memory.suffix, longest=longest)
        learner = Learner(
            model,
            replace(config.learner, max_grad_norm=1.0, weight_decay=0.0),
            LossConfig(),
            temperature=1.0,
            compute_dtype=precision.DTYPES[resolved(config).model.trainer_dtype],
        )
        imitate(learner, classroom, taught(), config.warmup, told)
    finally:
        environment.close()
    return tokenizer, model.requires_grad_(True)


def _kept_to_rank(config: Config, model: Any) -> dict[str, Tensor]:
    """The model's difference from its base, kept to `warmup.rank` directions a matrix: in the model, and returned."""
    base = models.load_model(config.warmup.base, dtype=torch.float32, device=device_of(config)).state_dict()
    change = difference(base, model.state_dict(), config.warmup.rank)
    model.load_state_dict(added(base, change))
    return change


def measured(config: Config) -> dict[str, Any]:
    """Scores of the recipe's policy at the training temperature: on the recipe's tasks, and on other games with the
    tips of a walk to their goal and without.
    """
    config = replace(config, memory=replace(config.memory, show_min_score=None))  # can it read what the recipe hides?
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
        searchers: list[Task] = []
        for game in split_tasks(config, parts.suite, "dev", 20 * config.warmup.readers):
            way = walk_to_the_goal(environment, game, turns, rng)
            if len(readers) < config.warmup.readers:
                if way is not None:
                    readers.append(game)
                    _store(parts, game, classroom.entries([way]))
            elif (
                config.warmup.failures
                and len(searchers) < config.warmup.readers
                and (failed := failed_walks(environment, game, turns, rng, config.memory.k))
            ):
                searchers.append(game)
                _store(parts, game, classroom.entries(failed))
        found: dict[str, Any] = {}
        for name, tasks, episodes, with_tips in (
            ("", parts.train_tasks, config.warmup.episodes, False),
            ("others_without_tips_", readers, 4, False),
            ("others_with_tips_", readers, 4, True),
            ("others_without_failures_", searchers, 4, False),
            ("others_with_failures_", searchers, 4, True),
        ):
            if not tasks:
                continue
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


def _store(parts: Parts, game: Task, entries: Mapping[str, Sequence[Tip]]) -> None:
    """Put tips into the memory."""
    keys = parts.embedder.embed(list(entries))
    scope = scope_of(game, parts.config.memory.scope)
    parts.memory.commit(
        0,
        [
            NewTip(scope=scope, key=key, state=state, text=tip.text, score=tip.score, source=tip.source, turn=index)
            for index, ((state, tips), key) in enumerate(zip(entries.items(), keys, strict=True))
            for tip in tips
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
        return tokenizer, models.with_own_attention(model).to(device_of(config))
    model = models.load_model(settings.base, dtype=torch.float32, device=device_of(config), seed=config.train.seed)
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
