"""The nouns that flow through the pipeline, and the seams between its parts. Standard library only.

One episode, as token ids (a made-up vocabulary; turn 1 showed a tip)::

    turn 0  prompt.new   [1 <user> look around <assistant>]        the policy sampled [go kitchen <end>]
    turn 1  prompt.new   [\\n <user> (tips: …) kitchen <assistant>] the policy sampled [take coin <end>]
            plain.new    [\\n <user> kitchen <assistant>]           the same turn, had no tip been shown

Concatenated, ``prompt`` and completions are the sequence the policy acted on; ``plain`` and the same completions are
the sequence of an agent without memory. No text is tokenized twice, so trainer and sampler see the same ids.
"""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

TokenIds = tuple[int, ...]


class Mode(enum.Enum):
    """How an episode is collected and trained (EMPO² section 4; docs/algorithm.md)."""

    PLAIN = "plain"  #: acts without tips, trained as it acted
    WITH_TIPS = "with_tips"  #: acts with tips, trained with them (on-policy)
    DISTILL = "distill"  #: acts with tips, trained on the prompt without them (off-policy)

    @property
    def shows_tips(self) -> bool:
        """Whether tips are retrieved and shown while acting."""
        return self is not Mode.PLAIN

    @property
    def trains_plain(self) -> bool:
        """Whether the rendering without tips is the one trained on."""
        return self is not Mode.WITH_TIPS


class Ending(enum.Enum):
    """Why an episode ended."""

    TERMINATED = "terminated"  #: the environment says it is over
    TURN_LIMIT = "turn_limit"  #: ``env.max_turns`` reached
    TOKEN_LIMIT = "token_limit"  #: the next turn would not fit ``model.max_tokens``; all rewards are kept


@dataclass(frozen=True, kw_only=True, order=True)
class Task:
    """One variation of one named task of one environment."""

    environment: str
    name: str
    variation: int

    def __str__(self) -> str:
        return f"{self.environment}/{self.name}/{self.variation}"


class EpisodeKey(NamedTuple):
    """Names one episode of a run: the coordinates of its random streams and of its memory entries."""

    step: int
    group: int
    episode: int


class SpanKey(NamedTuple):
    """Names one turn's completion within a step."""

    group: int
    episode: int
    turn: int


@dataclass(frozen=True, kw_only=True)
class Tip:
    """One memory entry as it was retrieved for a turn."""

    text: str  #: what is shown: the tip, its suffix and the final score
    score: float  #: final score of the episode that wrote it
    similarity: float  #: cosine between the turn's state and the entry's key
    source: EpisodeKey  #: the episode that wrote it


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """One turn's prompt as token ids, stored as its difference from the turn before.

    The prompt is the first ``keep`` ids of (previous prompt + previous completion), followed by ``new``. When ``keep``
    equals their full length, the turn continues its sequence (append-only); otherwise it starts a new one.
    """

    keep: int
    new: TokenIds


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The tokens that the policy wrote in one turn, exactly as sampled."""

    token_ids: TokenIds
    logprobs: tuple[float, ...]  #: of the distribution drawn from (temperature applied), one per token
    text: str
    truncated: bool  #: True if it ran into the token cap instead of ending itself


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Observation → completion → action → reward."""

    observation: str
    state: str  #: text that identifies the state; key of memory and novelty
    tips: tuple[Tip, ...]  #: shown in this turn for the first time
    prompt: Rendering  #: what the policy saw
    plain: Rendering  #: the same without any tip
    completion: Completion
    action: str  #: what went to the environment
    parsed: bool  #: the completion could be read as an action
    valid: bool  #: the environment knew the action
    reward: float  #: the environment's own, before ``reward_scale``
    novelty: float = 0.0  #: intrinsic reward of ``state`` (coefficient / n, novelty.py)
    candidates: int = 0  #: memory entries over the similarity threshold
    entries: int = 0  #: memory entries looked through


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """The record of one episode."""

    task: Task
    mode: Mode
    key: EpisodeKey
    policy_version: int
    turns: tuple[Turn, ...]
    final_state: str  #: state text after the last action
    final_observation: str = ""  #: what the environment said to it; opens the request for the tip
    ending: Ending
    score: float  #: the environment's own return: sum of the turns' rewards
    success: bool
    tip: str = ""  #: what the acting policy wrote at the end; empty in evaluation
    tip_tokens: int = 0  #: tokens sampled for the tip
    restarts: int = 0  #: times it was begun again because a replay differed


@dataclass(frozen=True, kw_only=True)
class TrajectoryGroup:
    """Episodes of one task by one policy version, compared with each other."""

    task: Task
    trajectories: tuple[Trajectory, ...]


@dataclass(frozen=True, kw_only=True)
class EpisodePlan:
    """One episode that is to be collected."""

    task: Task
    mode: Mode
    key: EpisodeKey


@dataclass(frozen=True, kw_only=True)
class Span:
    """One completion inside a training sequence: token positions ``start`` to ``stop`` (exclusive)."""

    start: int
    stop: int
    key: SpanKey
    advantage: float
    sampler_logprobs: tuple[float, ...] | None  #: None where the rendering is not the one that was sampled


@dataclass(frozen=True, kw_only=True)
class TrainingSequence:
    """One row of training: token ids with the completions that are trained.

    ``masks_improbable``: tokens with probability below δ lose their policy-gradient term. ``held``: the KL term counts.
    """

    token_ids: TokenIds
    spans: tuple[Span, ...]
    masks_improbable: bool = False
    held: bool = True

    @property
    def num_trained(self) -> int:
        return sum(span.stop - span.start for span in self.spans)


@dataclass(frozen=True, kw_only=True)
class WorkedExample:
    """A solved episode of another variation, shown in the prompt as chat turns."""

    task_text: str
    turns: tuple[tuple[str, str], ...]  #: (observation, action)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What an environment answers, checked by the pool."""

    observation: str
    reward: float
    terminated: bool
    truncated: bool
    info: Mapping[str, Any]


class Environment(Protocol):
    """Gymnasium's five values, text in and out. Parsing, turn limits, prompts and memory live outside.

    ``info`` may hold: ``state`` (text that identifies the state), ``valid`` (bool), ``success`` (bool), ``task`` (the
    task's text; at reset), ``actions`` (those that change something here; the random walks of warmup.py need them),
    ``leads`` (action → name of the place where it leads, as far as the state's text shows it), ``offer`` (words that
    say what can be done here, shown instead of ``actions``). A broken environment raises; it never returns a made-up
    reward.
    """

    def reset(self, task: Task, seed: int) -> tuple[str, dict[str, Any]]: ...

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """One prompt to be continued.

    ``slot`` names the live episode whose prefix may be reused; ``stream`` are the coordinates of its random draws.
    """

    slot: int
    prompt: TokenIds
    stream: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn; ``purpose`` names the random stream."""

    temperature: float  #: 0 is greedy
    max_tokens: int
    seed: int
    purpose: str


class Sampler(Protocol):
    """A sampling copy of the policy."""

    version: int

    def sample(self, requests: Sequence[SampleRequest], params: SamplingParams) -> list[Completion]: ...

    def load_weights(self, weights: Mapping[str, Any], version: int) -> None: ...

    def forget(self) -> None:
        """Drop what was kept of earlier calls, and its memory."""


class Embedder(Protocol):
    """Texts → unit vectors, float32 [N, D]."""

    dimension: int

    def embed(self, texts: Sequence[str]) -> Any: ...
