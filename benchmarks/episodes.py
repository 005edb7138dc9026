"""Episodes of SmolLM2-135M in ScienceWorld, recorded once: what the benchmarks of training work on.

The recipe is `default` with all of the history in the prompt; no tips, as no peer could train on them. The file is
plain JSON, so that a peer in an environment of its own reads the same ids.

python benchmarks/episodes.py 10 8 FILE        # turns, episodes
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from empo2.assemble import assemble
from empo2.collect import CollectRules
from empo2.config import from_dict, read_recipe, with_overrides
from empo2.sequences import build
from empo2.types import EpisodeKey, EpisodePlan, Mode, Span, SpanKey, TrainingSequence

SETTINGS = [("prompt.history", "full"), ("env.num_variations", 1), ("model.sampler_dtype", "float32")]


@dataclass(frozen=True)
class Episode:
    """``spans``: of each turn's completion, where it lies in ``token_ids``, and its log-probs when sampled."""

    token_ids: list[int]
    spans: list[tuple[int, int, list[float]]]
    score: float


def record(turns: int, count: int) -> list[Episode]:
    """Play ``count`` episodes of one task, to its end or ``turns`` turns."""
    changes = [*SETTINGS, ("env.max_turns", turns), ("env.live", count), ("model.max_tokens", 6000)]
    parts = assemble(from_dict(with_overrides(read_recipe("default"), changes)), ":memory:", with_learner=False)
    try:
        task = parts.train_tasks[0]
        plans = [EpisodePlan(task=task, mode=Mode.PLAIN, key=EpisodeKey(1, 0, n)) for n in range(count)]
        rules = CollectRules(purpose="train", seed=0, temperature=0.7, max_turns=turns)
        played = parts.collector.collect(plans, rules)
    finally:
        parts.close()
    episodes = []
    for trajectory in played:
        (sequence,) = build(trajectory, [0.0] * len(trajectory.turns), plain=True)
        spans = [(span.start, span.stop, list(span.sampler_logprobs or ())) for span in sequence.spans]
        episodes.append(Episode(list(sequence.token_ids), spans, trajectory.score))
    return episodes


def read(path: Path) -> list[Episode]:
    return [Episode(**found) for found in json.loads(path.read_text())]


def write(path: Path, episodes: list[Episode]) -> None:
    path.write_text(json.dumps([vars(episode) for episode in episodes]))


def advantages(episodes: list[Episode]) -> list[float]:
    """One an episode, mean 0, none of them 0, so that no trainer can leave one out."""
    return [1.0 if n % 2 else -1.0 for n in range(len(episodes))]


def training_sequences(episodes: list[Episode]) -> list[TrainingSequence]:
    return [
        TrainingSequence(
            token_ids=tuple(episode.token_ids),
            spans=tuple(
                Span(
                    start=start,
                    stop=stop,
                    key=SpanKey(0, number, turn),
                    advantage=advantage,
                    sampler_logprobs=tuple(logprobs),
                )
                for turn, (start, stop, logprobs) in enumerate(episode.spans)
            ),
        )
        for number, (episode, advantage) in enumerate(zip(episodes, advantages(episodes), strict=True))
    ]


def spaced_sequences(rows: list[list[int]], said: int, every: int) -> list[TrainingSequence]:
    """Any ids as episodes in which the last ``said`` of ``every`` tokens are completions."""
    spans = [
        [(start, start + said, [0.0] * said) for start in range(every - said, len(ids) - said + 1, every)]
        for ids in rows
    ]
    return training_sequences([Episode(ids, found, 0.0) for ids, found in zip(rows, spans, strict=True)])


def described(episodes: list[Episode]) -> dict[str, Any]:
    return {
        "episodes": len(episodes),
        "turns": sum(len(episode.spans) for episode in episodes),
        "tokens": sum(len(episode.token_ids) for episode in episodes),
        "completion tokens": sum(stop - start for episode in episodes for start, stop, _ in episode.spans),
        "tokens of all turns as rows": sum(stop for episode in episodes for _, stop, _ in episode.spans),
    }


if __name__ == "__main__":
    asked_turns, asked_episodes, target = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    found = record(asked_turns, asked_episodes)
    write(target, found)
    print(json.dumps(described(found)))
