"""Lessons: walks rendered as training sequences, just as episodes are, and imitated. What `empo2 warmup` teaches."""

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from empo2 import prompts, sequences
from empo2.config import WarmupConfig
from empo2.episode import LiveEpisode, PromptRules
from empo2.errors import UsageError
from empo2.examples import WorkedExamples
from empo2.learner import Learner
from empo2.memory import Retrieval
from empo2.types import (
    Completion,
    Environment,
    EpisodeKey,
    EpisodePlan,
    Mode,
    Span,
    SpanKey,
    Task,
    Tip,
    TrainingSequence,
    Trajectory,
)
from empo2.walks import Walk, elsewhere, failed_walks, follow, random_walk, walk_to_the_goal

IN_VAIN = 1_000  #: games one after the other in which no walk got to the goal (or failed), after which none is sought


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """One episode to imitate; ``shown``: the walks whose tips it shows, the best first."""

    walk: Walk
    shown: tuple[Walk, ...]


def lessons(
    settings: WarmupConfig, environment: Environment, games: Sequence[Task], *, turns: int, seed: int, k: int
) -> Iterator[Lesson]:
    """Episodes of at most ``turns`` to imitate, which show tips of at most ``k`` walks, without end.

    Raises UsageError where no walk gets to the goal, or none fails to.
    """
    rng = random.Random(f"warmup/{seed}")
    in_vain, never_failed = 0, 0
    while True:
        game = rng.choice(games)
        if rng.random() >= settings.tips:
            yield Lesson(walk=random_walk(environment, game, turns, rng), shown=())
        elif settings.failures and rng.random() < settings.failures:
            failed = failed_walks(environment, game, turns, rng, k)
            never_failed = 0 if failed else never_failed + 1
            if failed:
                walk = elsewhere(environment, failed, rng, faithful=settings.faithful, turns=turns)
                yield Lesson(walk=walk, shown=failed)
            elif never_failed == IN_VAIN:
                raise UsageError(
                    f"no walk failed in {IN_VAIN} games, so no tips of failures can be shown: they are too easy for "
                    f"random walks in {turns} turns; set warmup.failures to 0, or lower env.max_turns"
                )
        elif (way := walk_to_the_goal(environment, game, turns, rng)) is None:
            in_vain += 1
            if in_vain == IN_VAIN:
                raise UsageError(
                    f"no walk got to the goal in {IN_VAIN} games, so no tips can be shown: they are too hard for "
                    f"random walks in {turns} turns; raise env.max_turns, or name easier ones in warmup.tasks"
                )
        else:
            in_vain = 0
            followed = follow(environment, way, rng, faithful=settings.faithful, turns=turns)
            failed = failed_walks(environment, game, turns, rng, k - 1) if settings.failures and k > 1 else ()
            yield Lesson(walk=followed, shown=(way, *failed))


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
        told = self.entries(lesson.shown)
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

    def play(
        self, walk: Walk, told: Mapping[str, Sequence[Tip]], number: int = 0
    ) -> tuple[Trajectory, tuple[int, ...]]:
        """The walk as an episode that was shown these tips, by state, and the prompt that asks for its own."""
        plan = EpisodePlan(task=walk.task, mode=Mode.WITH_TIPS, key=EpisodeKey(0, number, 0))
        episode = LiveEpisode(plan=plan, slot=0, rules=self.rules, examples=self.examples.of(walk.task))
        episode.begin(walk.observation, walk.info)
        for action, answer in zip(walk.actions, walk.answers, strict=True):
            tips = tuple(told.get(episode.state, ()))
            if episode.next_prompt(Retrieval(tips=tips, candidates=len(tips), entries=len(told))) is None:
                break
            episode.act(self._said(action))
            episode.observe(answer, len(walk.actions))
        if not episode.turns:
            raise UsageError(
                f"the first turn of {walk.task} leaves no room for an action within model.max_tokens = "
                f"{self.rules.max_tokens}; raise it"
            )
        trajectory = episode.finish(0, None)
        return replace(trajectory, tip=tip_of(trajectory)), episode.tip_prompt(self.longest)

    def entries(self, walks: Sequence[Walk]) -> dict[str, list[Tip]]:
        """What the memory would hold of walks, by the state under which it stands, in the order of the walks.

        Of a walk that met a state several times, the last; of equal texts, one.
        """
        found: dict[str, list[Tip]] = {}
        for number, walk in enumerate(walks):
            trajectory, _ = self.play(walk, {}, number)
            for state, turn in {turn.state: turn for turn in trajectory.turns}.items():
                suffix = prompts.tip_suffix(trajectory, turn, self.suffix)
                text = prompts.stored_tip(trajectory.tip, suffix, trajectory.score)
                if all(text != tip.text for tip in found.get(state, ())):
                    tip = Tip(text=text, score=trajectory.score, similarity=1.0, source=trajectory.key)
                    found.setdefault(state, []).append(tip)
        return found

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
