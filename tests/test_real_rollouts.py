"""Real rollouts: SmolLM2 in ScienceWorld, with tips; both renderings and both log-probs of what it did."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from empo2 import models, sequences
from empo2.assemble import Parts, assemble
from empo2.chat import ChatFormat
from empo2.collect import CollectRules
from empo2.config import from_dict, read_recipe, with_overrides
from empo2.episode import LiveEpisode
from empo2.memory import Retrieval
from empo2.train import new_tips
from empo2.types import EpisodeKey, EpisodePlan, Mode, StepResult, TokenIds, Trajectory, TrajectoryGroup
from test_chat import QWEN

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

TURNS = 4
RULES = CollectRules(purpose="train", seed=5, temperature=0.7, max_turns=TURNS, tip_tokens=24)


def make_parts(dtype: str) -> Parts:
    changes = [("env.live", 4), ("env.max_turns", TURNS), ("memory.max_tip_tokens", 800), ("memory.suffix", "action")]
    changes += [("memory.rank", "similarity"), ("memory.k", 1)]  # another state, another tip: in late turns, too
    changes += [("model.sampler_dtype", dtype), ("model.trainer_dtype", dtype)]
    return assemble(from_dict(with_overrides(read_recipe("default"), changes)), ":memory:", with_learner=True)


def collect(parts: Parts, step: int, mode: Mode) -> list[Trajectory]:
    task = parts.train_tasks[0]
    plans = [EpisodePlan(task=task, mode=mode, key=EpisodeKey(step, 0, episode)) for episode in range(4)]
    return parts.collector.collect(plans, RULES)


@pytest.fixture(scope="module", params=["chatml", "qwen"])
def played(request: Any):
    """Parts and four episodes that were shown the tips of four earlier ones; in float32."""
    parts = make_parts("float32")
    try:
        if request.param == "qwen":
            parts.tokenizer.chat_template = QWEN
            rules = replace(parts.collector.prompt_rules, chat=ChatFormat.of(parts.tokenizer))
            parts.collector.prompt_rules = rules
        first = collect(parts, 1, Mode.PLAIN)
        group = TrajectoryGroup(task=parts.train_tasks[0], trajectories=tuple(first))
        parts.memory.commit(1, new_tips(parts, group))
        # What is sampled differs between processors, and a state that comes again shows no tip twice: look on.
        tried = (collect(parts, step, Mode.DISTILL) for step in range(2, 8))
        yield parts, next((found for found in tried if any(t.turns[-1].tips for t in found)), first)
    finally:
        parts.close()


def without_tips(parts: Parts, trajectory: Trajectory) -> list[TokenIds]:
    """Prompts of an episode with the same observations and completions that never saw a tip."""
    plan = EpisodePlan(task=trajectory.task, mode=Mode.PLAIN, key=trajectory.key)
    rules, examples = parts.collector.prompt_rules, parts.collector.examples.of(trajectory.task)
    episode = LiveEpisode(plan=plan, slot=0, rules=rules, examples=examples)
    parts.pool.start_reset(0, trajectory.task, 0)
    _, info = parts.pool.receive_reset(0)
    episode.begin(trajectory.turns[0].observation, info)
    seen = []
    for index, turn in enumerate(trajectory.turns):
        prompt = episode.next_prompt(Retrieval(tips=(), candidates=0, entries=0))
        assert prompt is not None
        seen.append(prompt)
        episode.act(turn.completion)
        if index + 1 < len(trajectory.turns):
            following = trajectory.turns[index + 1].observation
            result = StepResult(observation=following, reward=0.0, terminated=False, truncated=False, info={})
            episode.observe(result, TURNS + 1)
    return seen


def test_the_rendering_without_tips_is_that_of_an_episode_without_tips(played):
    """Id for id, every turn, the last included; and no word of a tip is left in it."""
    parts, trajectories = played
    assert sum(bool(turn.tips) for t in trajectories for turn in t.turns) >= 4
    assert any(t.turns[-1].tips for t in trajectories), "the last turn showed tips, too"
    for trajectory in trajectories:
        plain = list(sequences.prompts(trajectory, plain=True))
        assert plain == without_tips(parts, trajectory)
        assert "Tips from earlier attempts" not in parts.tokenizer.decode(plain[-1])
        shown = list(sequences.prompts(trajectory, plain=False))
        for turn in trajectory.turns:
            for tip in turn.tips:
                assert tip.text in parts.tokenizer.decode(shown[-1])


def test_a_prompt_reads_as_the_tokenizers_own_template_writes_it(played):
    """The whole conversation as text, by the template itself."""
    parts, trajectories = played
    examples = parts.collector.examples.of(trajectories[0].task)
    parts.pool.start_reset(0, trajectories[0].task, 0)
    task_text = parts.pool.receive_reset(0)[1]["task"]
    messages = [{"role": "system", "content": parts.suite.instructions()}]
    for example in examples:
        for index, (seen, action) in enumerate(example.turns):
            opening = f"New task. {example.task_text}\n\n" if index == 0 else ""
            messages += [{"role": "user", "content": opening + seen}, {"role": "assistant", "content": action}]
    for trajectory in trajectories:
        said = list(messages)
        for index, turn in enumerate(trajectory.turns):
            opening = f"New task. {task_text}\n\n" if index == 0 else ""
            said.append({"role": "user", "content": opening + turn.observation})
            said.append({"role": "assistant", "content": turn.completion.text})
        expected = parts.tokenizer.apply_chat_template(said[:-1], tokenize=False, add_generation_prompt=True)
        *_, last = sequences.prompts(trajectory, plain=True)
        assert parts.tokenizer.decode(last) == expected


@pytest.mark.parametrize("plain", [False, True])
def test_trainer_and_sampler_agree_in_float32(played, plain):
    """Sampled with tips: the trainer gives what was sampled the same log-probs, in that rendering only."""
    parts, trajectories = played
    gap = gaps(parts, trajectories, plain=plain)
    assert (gap.max() <= 1e-4) != plain


def test_trainer_and_sampler_are_near_in_bfloat16():
    parts = make_parts("bfloat16")
    try:
        gap = gaps(parts, collect(parts, 1, Mode.PLAIN), plain=True)
    finally:
        parts.close()
    assert gap.mean() <= 0.05
    assert gap.max() <= 0.5


def gaps(parts: Parts, trajectories: list[Trajectory], *, plain: bool) -> torch.Tensor:
    """|log-prob of the trainer − of the sampler| of every completion token."""
    rows = [row for t in trajectories for row in sequences.build(t, [0.0] * len(t.turns), plain=plain)]
    assert parts.learner is not None
    found = parts.learner.logprobs(rows)
    trained = [value for t in trajectories for index in range(len(t.turns)) for value in found[0, t.key.episode, index]]
    sampled = [value for t in trajectories for turn in t.turns for value in turn.completion.logprobs]
    return (torch.tensor(trained) - torch.tensor(sampled)).abs()


def test_the_models_context_is_its_configs():
    assert models.context_length(models.load_model(models.SMOLLM2, dtype=torch.float32, device="cpu").config) == 8192
