"""Random walks in an environment that says which actions change something (`info["actions"]`, types.Environment)."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from empo2 import prompts
from empo2.errors import UsageError
from empo2.types import Environment, StepResult, Task

LONG = 20  #: a walk that is to reach the goal may take so many times the turns of an episode; its detours are cut


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

    def places(self) -> set[str]:
        """Names of the places in which an action was taken."""
        infos = (self.info, *(answer.info for answer in self.answers))
        names = (prompts.place_name(str(info.get("state"))) for info, _ in zip(infos, self.actions, strict=False))
        return {name for name in names if name}

    def last_actions(self) -> dict[str, str]:
        """State → the action that was taken when it was left for the last time."""
        infos = (self.info, *(answer.info for answer in self.answers))
        return {str(info.get("state")): action for info, action in zip(infos, self.actions, strict=False)}


def random_walk(environment: Environment, game: Task, turns: int, rng: random.Random) -> Walk:
    """At most ``turns`` of the actions that change something, each as likely as the others."""
    return _walk(environment, game, turns, lambda state, actions, leads: rng.choice(actions))


def failed_walks(environment: Environment, game: Task, turns: int, rng: random.Random, count: int) -> tuple[Walk, ...]:
    """At most ``count`` random walks that did not get there and differ; fewer where most get there or are alike."""
    found: dict[tuple[str, ...], Walk] = {}
    for _ in range(4 * count):
        walk = random_walk(environment, game, turns, rng)
        if len(found) < count and not walk.success:
            found.setdefault(walk.actions, walk)
    return tuple(found.values())


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
    way = _walk(environment, walk.task, turns, lambda state, actions, leads: told.get(state) or actions[0])
    return way if way.success else None


def follow(environment: Environment, way: Walk, rng: random.Random, *, faithful: float, turns: int) -> Walk:
    """Go the way wherever one of its states is met, but with probability 1 − ``faithful`` take any action."""
    told = way.last_actions()

    def choose(state: str, actions: Sequence[str], leads: Mapping[str, str]) -> str:
        return told[state] if state in told and rng.random() < faithful else rng.choice(actions)

    return _walk(environment, way.task, turns, choose)


def elsewhere(
    environment: Environment, failed: Sequence[Walk], rng: random.Random, *, faithful: float, turns: int
) -> Walk:
    """Go where none of the failed walks was: to a place that none of those that met this state names, by another action
    than theirs; else by another action; else, and with probability 1 − ``faithful``, anywhere.

    Where actions lead is said by `info["leads"]`; without it only actions are told apart.
    """

    def choose(state: str, actions: Sequence[str], leads: Mapping[str, str]) -> str:
        met = [walk for walk in failed if state in walk.last_actions()]
        tried = {walk.last_actions()[state] for walk in met}
        been = set().union(*(walk.places() for walk in met))
        others = [action for action in actions if action not in tried]
        new = [action for action in others if leads.get(action) not in been]
        return rng.choice((new or others or actions) if rng.random() < faithful else actions)

    return _walk(environment, failed[0].task, turns, choose)


Choice = Callable[[str, Sequence[str], Mapping[str, str]], str]  #: state, actions, where they lead → action


def _walk(environment: Environment, game: Task, turns: int, choose: Choice) -> Walk:
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
        action = choose(str(info.get("state")), possible, info.get("leads") or {})
        seen, reward, terminated, truncated, info = environment.step(action)
        actions.append(action)
        answers.append(
            StepResult(observation=seen, reward=reward, terminated=terminated, truncated=truncated, info=info)
        )
    return Walk(task=game, observation=observation, info=first, actions=tuple(actions), answers=tuple(answers))
