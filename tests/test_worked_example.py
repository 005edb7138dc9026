"""The golden test: two episodes of three turns through the package's own code, number by number.

The story is that of `oracles.worked_example`, which docs/algorithm.md prints: a lamp in the attic, episode 1 acts with
tips and is distilled, episode 2 acts without. Only the language model is missing: what it would say and the log-probs
it would give are numbers of the example. The last tests hold docs/algorithm.md to the code and to the example.
"""

import importlib
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import oracles
from empo2 import config as configs
from empo2 import losses, sequences
from empo2.advantages import episode_return, group_advantages
from empo2.algorithms import group_relative
from empo2.config import Config, EnvConfig, LearnerConfig, LossConfig, MemoryConfig, NoveltyConfig
from empo2.episode import LiveEpisode, PromptRules
from empo2.learner import Learner, _Part
from empo2.memory import NewTip, Retrieval, TipMemory, scope_of
from empo2.novelty import NoveltyCounter, Visited
from empo2.store import open_store
from empo2.train import add_novelty, remember, visited_states
from empo2.types import Completion, EpisodeKey, EpisodePlan, Mode, SpanKey, StepResult, Task, TrajectoryGroup
from empo2.update import MASKED_MODES

EXAMPLE: dict[str, Any] = oracles.worked_example()
NAMES = {oracles.HALL: "hall", oracles.STAIRS: "stairs", oracles.ATTIC: "attic"}
KEYS = {name: np.array(key, np.float32) for key, name in NAMES.items()}
TASK = Task(environment="house", name="lamp", variation=0)
STEP = 7
UNIT = math.sqrt(0.5)  # of the advantages

RECIPE = Config(
    env=EnvConfig(reward_scale=0.01),
    memory=MemoryConfig(threshold=0.5, k=2, max_entries=8),
    novelty=NoveltyConfig(coefficient=1.0, threshold=0.75),
)
DOC = Path(__file__).parents[1] / "docs" / "algorithm.md"


class NamedStates:
    """An embedder that knows the three rooms."""

    dimension = 2

    def embed(self, texts):
        return np.stack([KEYS[text] for text in texts]) if texts else np.zeros((0, 2), np.float32)


def in_our_words(text: str) -> str:
    """The oracle's wording of an entry → the package's (prompts.stored_tip)."""
    return re.sub(r"Action: (.*) Score: (\S+)\.$", r"Action taken here: \1 (final score: \2)", text)


def source_of(number: int) -> EpisodeKey:
    """The example numbers its episodes: 11 to 13 are of an earlier step, 21 and 22 those of this one."""
    return EpisodeKey(STEP, 0, number - 21) if number > 20 else EpisodeKey(STEP - 1, 0, number)


def parts() -> Any:
    """Memory and counts as they are when the step begins."""
    connection = open_store(":memory:")
    scope = scope_of(TASK, "variation")
    memory = TipMemory(connection, threshold=0.5, k=2, max_entries=8)
    stored = [
        NewTip(
            scope=scope,
            key=KEYS[NAMES[entry["key"]]],
            state=NAMES[entry["key"]],
            text=in_our_words(entry["text"]),
            score=entry["score"],
            source=source_of(entry["source"]),
            turn=0,
        )
        for entry in EXAMPLE["tips"]["memory"]
    ]
    memory.commit(STEP - 1, stored)
    # attic and stairs became two entries under a stricter threshold; at 0.75 they are similar
    visits = [NAMES[key] for key, count in EXAMPLE["novelty_snapshot"] for _ in range(count)]
    seen = Visited(scope=scope, texts=visits, keys=np.stack([KEYS[name] for name in visits]))
    NoveltyCounter(connection, threshold=0.9).commit(STEP - 1, [seen])
    novelty = NoveltyCounter(connection, coefficient=1.0, threshold=0.75)
    return SimpleNamespace(
        config=RECIPE, embedder=NamedStates(), memory=memory, novelty=novelty, connection=connection, scope=scope
    )


def play(chat, given: Any, episode: int) -> Any:
    """One episode, its three completions and its tip given by the example."""
    mode = (Mode.DISTILL, Mode.PLAIN)[episode]
    rules = PromptRules(
        chat=chat,
        instructions="Find the lamp.",
        max_tokens=2048,
        max_action_tokens=2,
        window_turns=None,
        tips_stay=True,
        max_tip_tokens=1000,
    )
    plan = EpisodePlan(task=TASK, mode=mode, key=EpisodeKey(STEP, 0, episode))
    live = LiveEpisode(plan=plan, slot=episode, rules=rules, examples=())
    states = [NAMES[state] for state in EXAMPLE["states"][episode]]
    live.begin("You enter the house.", {"state": states[0], "task": "Find the lamp."})
    rows = zip(oracles.EPISODE_ACTIONS[episode], EXAMPLE["rewards"][episode], [*states[1:], "garden"], strict=True)
    for action, reward, following in rows:
        retrieved = Retrieval(tips=(), candidates=0, entries=0)
        if mode.shows_tips:
            retrieved = given.memory.retrieve(given.scope, KEYS[live.state])
        assert live.next_prompt(retrieved) is not None
        live.act(Completion(token_ids=(5, chat.closer), logprobs=(-0.1, -0.1), text=action, truncated=False))
        info = {"state": following, "valid": True}
        live.observe(
            StepResult(observation="You go on.", reward=reward, terminated=False, truncated=False, info=info), 3
        )
    tip = Completion(token_ids=(5,), logprobs=(-0.1,), text=oracles.EPISODE_TIPS[episode], truncated=False)
    return live.finish(0, tip)


@pytest.fixture
def given() -> Any:
    return parts()


@pytest.fixture
def group(chat, given) -> TrajectoryGroup:
    return add_novelty(given, [TrajectoryGroup(task=TASK, trajectories=tuple(play(chat, given, i) for i in (0, 1)))])[0]


# ---------------------------------------------------------------- tips


def test_tips_retrieved_for_each_turn(given):
    by_similarity = TipMemory(given.connection, threshold=0.5, k=2, rank="similarity")
    for turn, state in enumerate(("hall", "stairs", "attic")):
        found = given.memory.retrieve(given.scope, KEYS[state])
        assert [tip.text for tip in found.tips] == [in_our_words(t) for t in EXAMPLE["tips"]["retrieved"][turn]]
        assert found.entries == 4
        assert found.candidates == sum(value > 0.5 for value in EXAMPLE["tips"]["similarities"][turn])
        closest = by_similarity.retrieve(given.scope, KEYS[state])
        expected = [in_our_words(t) for t in EXAMPLE["tips"]["retrieved_by_similarity"][turn]]
        assert [tip.text for tip in closest.tips] == expected
    assert [given.memory.retrieve(given.scope, KEYS[s]).candidates for s in ("hall", "stairs", "attic")] == [3, 4, 2]
    assert [tip.similarity for tip in given.memory.retrieve(given.scope, KEYS["stairs"]).tips] == pytest.approx(
        [0.6, 0.8], abs=1e-6
    )


def test_tips_shown_once_an_episode(group):
    shown = [[tip.text for tip in turn.tips] for turn in group.trajectories[0].turns]
    assert shown == [[in_our_words(text) for text in texts] for texts in EXAMPLE["tips"]["shown"]]
    assert shown == [
        ["Go upstairs. Action taken here: go up. (final score: 40)"],
        ["Beware of the dark. Action taken here: wait. (final score: 20)"],
        ["Go upstairs. Action taken here: go on up. (final score: 40)"],
    ]
    assert all(turn.tips == () and turn.candidates == 0 for turn in group.trajectories[1].turns)


def test_tips_stored_after_the_step_and_the_oldest_evicted(given, group):
    remember(given, [group], STEP)
    rows = given.connection.execute(
        "SELECT key, text, score, source_step, source_group, source_episode FROM tips"
        " WHERE evicted_step IS NULL ORDER BY id"
    ).fetchall()
    for (key, text, score, *source), entry in zip(rows, EXAMPLE["tips"]["memory_after"], strict=True):
        assert np.frombuffer(key, "<f4").tolist() == pytest.approx(entry["key"], abs=1e-7)
        assert (text, score, EpisodeKey(*source)) == (
            in_our_words(entry["text"]),
            entry["score"],
            source_of(entry["source"]),
        )
    assert [score for _, _, score, *_ in rows] == [40, 20, 80, 80, 80, -50, -50, -50]


# ---------------------------------------------------------------- novelty, returns, advantages


def test_novelty_of_each_turn(group):
    found = [[turn.novelty for turn in trajectory.turns] for trajectory in group.trajectories]
    assert found == EXAMPLE["novelties"] == [[1, 1 / 4, 1 / 5], [1, 1 / 2, 1 / 4]]


def test_visits_after_the_step(given, group):
    remember(given, [group], STEP)
    rows = given.connection.execute(
        "SELECT key, SUM(count) FROM states JOIN visits ON state = id GROUP BY id ORDER BY id"
    ).fetchall()
    found = [(np.frombuffer(key, "<f4").tolist(), visits) for key, visits in rows]
    assert found == [(pytest.approx(key, abs=1e-7), visits) for key, visits in EXAMPLE["novelty_after"]]
    assert [visits for _, visits in found] == [3, 3, 3]


def test_the_state_after_the_last_action_is_not_counted(given, group):
    assert [visited.texts for visited in visited_states(given, group)] == [
        ["hall", "stairs", "attic"],
        ["hall", "hall", "stairs"],
    ]
    assert {trajectory.final_state for trajectory in group.trajectories} == {"garden"}


def test_scores_returns_and_advantages(group):
    assert [trajectory.score for trajectory in group.trajectories] == EXAMPLE["scores"] == [80, -50]
    returns = [episode_return(trajectory, 0.01) for trajectory in group.trajectories]
    assert returns == pytest.approx(EXAMPLE["returns"], abs=1e-12)
    assert returns == pytest.approx([2.25, 1.25], abs=1e-12)
    first, second = group_relative(group, RECIPE)
    assert first == pytest.approx((EXAMPLE["advantages"][0],) * 3, abs=1e-12)
    assert second == pytest.approx((EXAMPLE["advantages"][1],) * 3, abs=1e-12)
    assert (first[0], second[0]) == pytest.approx((0.7071067811865475, -0.7071067811865475), abs=1e-12)
    without = group_advantages(returns, normalize_by_std=False, std_floor=1e-6)
    assert without == pytest.approx(EXAMPLE["advantages_without_std"], abs=1e-12)
    assert without == pytest.approx((0.5, -0.5), abs=1e-12)


# ---------------------------------------------------------------- ratios, mask, loss


def tensor(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).flatten()


RATIOS = {  # by hand, see oracles.py
    "plain": [1, 1.5, 0.75, 1.2, 1.2, 1.25, 1, 0.5, 1.5, 0.5, 12, 1],
    "behavior": [0.5, 0.5, 0.2, 0.01, 0.6, 1.5, 1, 0.5, 1.5, 0.5, 12, 1],
}
TOKEN_LOSSES = {  # in units of sqrt(0.5); the fourth token is masked
    "plain": [-1, -1.3, -0.75, 0, -1.2, -1.25, 1, 0.8, 1.5, 0.8, 10, 1],
    "behavior": [-0.5, -0.5, -0.2, 0, -0.6, -1.3, 1, 0.8, 1.5, 0.8, 10, 1],
}
LOSSES = {  # in units of sqrt(0.5)
    "plain": {
        "loss": 9.6 / 12,
        "loss_sequence": (-5.5 / 6 + 15.1 / 6) / 2,
        "loss_fixed": 9.6 / 20,
        "loss_without_mask": 8.4 / 12,
        "loss_with_kl": 9.6 / 12 + 0.12 * (1 - math.log(2)) / 12 / UNIT,
    },
    "behavior": {
        "loss": 12 / 12,
        "loss_sequence": (-3.1 / 6 + 15.1 / 6) / 2,
        "loss_fixed": 12 / 20,
        "loss_without_mask": 11.99 / 12,
        "loss_with_kl": 12 / 12 + 0.12 * (1 - math.log(2)) / 12 / UNIT,
    },
}
VARIANTS = {
    "loss": LossConfig(),
    "loss_sequence": LossConfig(aggregation="sequence"),
    "loss_fixed": LossConfig(aggregation="fixed", fixed_length=10),
    "loss_without_mask": LossConfig(delta=0.0),
    "loss_with_kl": LossConfig(kl=0.12),
}


def denominators(setting: str) -> list[list[float]]:
    return EXAMPLE["loss"]["behavior_plain" if setting == "plain" else "behavior_with_tips"]


@pytest.mark.parametrize("setting", ["plain", "behavior"])
def test_ratios_mask_and_losses_of_each_token(setting):
    expected = EXAMPLE["loss"][setting]
    logprobs, delta = tensor(EXAMPLE["loss"]["current"]), EXAMPLE["loss"]["delta"]
    assert delta == LossConfig().delta == math.exp(-5)
    ratio = losses.importance_ratio(logprobs, tensor(denominators(setting)))
    assert ratio.tolist() == pytest.approx(tensor(expected["ratios"]).tolist(), rel=1e-12)
    assert ratio.tolist() == pytest.approx(RATIOS[setting], rel=1e-12)
    kept = losses.probable_enough(logprobs, delta) | torch.tensor([False] * 6 + [True] * 6)
    assert kept.reshape(2, 6).tolist() == EXAMPLE["loss"]["kept"]
    assert kept.tolist() == [True] * 3 + [False] + [True] * 8
    per_token, _ = losses.clipped_policy_loss(
        ratio, tensor([[a] * 6 for a in EXAMPLE["advantages"]]), clip_low=0.2, clip_high=0.3, dual_clip=10.0
    )
    per_token = torch.where(kept, per_token, torch.zeros_like(per_token))
    assert per_token.tolist() == pytest.approx(tensor(expected["token_losses"]).tolist(), abs=1e-12)
    assert (per_token / UNIT).tolist() == pytest.approx(TOKEN_LOSSES[setting], abs=1e-12)
    weights = losses.token_weights([6, 6], "token", fixed_length=10)
    assert weights == [1 / 12, 1 / 12]
    assert float(per_token.sum() / 12) == pytest.approx(expected["loss"], abs=1e-12)


def test_kl_of_each_token():
    found = losses.k3_divergence(tensor(EXAMPLE["loss"]["current"]), tensor(EXAMPLE["loss"]["reference"])).tolist()
    assert found == pytest.approx(EXAMPLE["loss"]["k3"] + [0.0] * 6, abs=1e-12)
    assert found[3] == pytest.approx(0.3068528194400546, abs=1e-12)


class Table(torch.nn.Module):
    """Log-probs in place of a language model: [episodes, tokens of the episode]."""

    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.rows = torch.nn.Parameter(torch.tensor(rows, dtype=torch.float64))


class TableLearner(Learner):
    """Its "hidden states" are the table's log-probs, one a token; of two words the sampled one has it."""

    def _hidden(self, model, packed):
        keys = [span.key for sequence in packed.sequences for span in sequence.spans]
        first = [6 * key.episode + 2 * key.turn for key in keys]
        return model.rows.reshape(-1, 1)[[row + token for row in first for token in (0, 1)]]

    def _logits(self, model, hidden):
        return torch.cat([hidden, torch.log1p(-hidden.exp())], dim=1)

    def _parts(self, packed):
        tokens = list(range(len(packed.targets)))
        words = torch.zeros(len(tokens), dtype=torch.long)
        yield _Part(places=slice(None), tokens=tokens, rows=torch.tensor(tokens), targets=words)


@pytest.mark.parametrize("setting", ["plain", "behavior"])
@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("micro_batch_tokens", [1, 4096])  # each sequence alone, or both together
def test_the_learner_finds_the_same_loss(group, setting, variant, micro_batch_tokens):
    chosen = VARIANTS[variant]
    trained = [
        sequence
        for trajectory, values in zip(group.trajectories, group_relative(group, RECIPE), strict=True)
        for sequence in sequences.trained(trajectory, values, masked_modes=MASKED_MODES[chosen.mask_modes])
    ]
    assert [(len(s.spans), s.num_trained, s.masks_improbable) for s in trained] == [(3, 6, True), (3, 6, False)]
    behavior = {
        SpanKey(0, episode, turn): tuple(row[2 * turn : 2 * turn + 2])
        for episode, row in enumerate(denominators(setting))
        for turn in range(3)
    }
    learner = TableLearner(
        Table(EXAMPLE["loss"]["current"]),
        LearnerConfig(micro_batch_tokens=micro_batch_tokens),
        chosen,
        temperature=1.0,
        reference=Table(EXAMPLE["loss"]["reference"]),
    )
    stats = learner.update(trained, behavior, 1e-3)
    assert stats.loss == pytest.approx(EXAMPLE["loss"][setting][variant], abs=1e-12)
    assert stats.loss / UNIT == pytest.approx(LOSSES[setting][variant], abs=1e-12)
    assert stats.num_tokens == 12
    assert stats.masked_fraction == pytest.approx(0 if variant == "loss_without_mask" else 1 / 12)
    assert stats.clip_fraction == pytest.approx(4 / 12)  # 1.5 at A > 0; 0.5, 0.5 and 12 at A < 0
    assert stats.ratio_max == pytest.approx(12)
    assert stats.kl == pytest.approx((1 - math.log(2)) / 12 if variant == "loss_with_kl" else 0.0)


# ---------------------------------------------------------------- docs/algorithm.md


def shown(value: Any) -> str:
    """A number as the page prints it: four digits, a true minus sign."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else f"{round(value, 12) + 0.0:.4g}".replace("-", "−")


def row(label: str, *values: Any) -> str:
    return "| " + " | ".join([label, *map(shown, values)]) + " |"


def printed_rows() -> list[str]:
    """Every row of the tables in the page's worked example."""
    tips, loss = EXAMPLE["tips"], EXAMPLE["loss"]
    nick = {tips["memory"][2]["text"]: "A", tips["memory"][1]["text"]: "B", tips["memory"][3]["text"]: "C"}

    def entries(rows) -> list[str]:
        return [
            row(str(e["born"]), NAMES[e["key"]], in_our_words(e["text"]), e["score"], str(e["source"])) for e in rows
        ]

    def found(texts) -> str:
        return ", ".join(nick[text] for text in texts)

    def retrieval(turn: int) -> str:
        cosines = [shown(value) for value in tips["similarities"][turn]]
        lists = [found(tips[kind][turn]) for kind in ("retrieved", "retrieved_by_similarity", "shown")]
        return row(NAMES[EXAMPLE["states"][0][turn]], *cosines, *lists)

    def both(per_episode) -> list[Any]:
        return [value for values in per_episode for value in values]

    def in_units(values) -> list[float]:
        return [value / UNIT for value in values]

    before, after = dict(EXAMPLE["novelty_snapshot"]), dict(EXAMPLE["novelty_after"])
    scaled = [0.01 * score for score in EXAMPLE["scores"]]
    distill = [
        row("π_θ without tips", *oracles.DISTILL_CURRENT),
        row("π_old without tips", *oracles.DISTILL_BEHAVIOR_PLAIN),
        row("π_old with tips", *oracles.DISTILL_BEHAVIOR_TIPS),
        row("ρ, `plain`", *loss["plain"]["ratios"][0]),
        row("ρ, `behavior`", *loss["behavior"]["ratios"][0]),
        row("π_θ ≥ δ = 0.0067", *loss["kept"][0]),
        row("loss, `plain`", *in_units(loss["plain"]["token_losses"][0])),
        row("loss, `behavior`", *in_units(loss["behavior"]["token_losses"][0])),
        row("π_ref without tips", *map(math.exp, loss["reference"][0])),
        row("k3", *loss["k3"]),
    ]
    plain = [
        row("π_θ", *oracles.PLAIN_CURRENT),
        row("π_old", *oracles.PLAIN_BEHAVIOR),
        row("ρ", *loss["plain"]["ratios"][1]),
        row("loss", *in_units(loss["plain"]["token_losses"][1])),
    ]
    kinds = {
        "token": "loss",
        "sequence": "loss_sequence",
        "fixed, length 10": "loss_fixed",
        "token, without the mask": "loss_without_mask",
        "token, with KL coefficient 0.12": "loss_with_kl",
    }
    return [
        *entries(tips["memory"]),
        *[retrieval(turn) for turn in range(3)],
        row("state", *[NAMES[state] for state in both(EXAMPLE["states"])]),
        row("action", *both(oracles.EPISODE_ACTIONS)),
        row("reward", *both(EXAMPLE["rewards"])),
        row("n", *[1 / value for value in both(EXAMPLE["novelties"])]),
        row("novelty 1 / n", *both(EXAMPLE["novelties"])),
        *[row(NAMES[key], before.get(key, "none"), visits) for key, visits in after.items()],
        row("score", *EXAMPLE["scores"]),
        row("score × 0.01", *scaled),
        row("Σ novelty", *map(sum, EXAMPLE["novelties"])),
        row("return R", *EXAMPLE["returns"]),
        row("R − mean R", *EXAMPLE["advantages_without_std"]),
        row("advantage A", *EXAMPLE["advantages"]),
        *distill,
        *plain,
        *[row(label, loss["plain"][kind], loss["behavior"][kind]) for label, kind in kinds.items()],
        *entries(tips["memory_after"]),
    ]


def table_bodies(text: str) -> list[str]:
    """The rows of all Markdown tables, without their two header lines."""
    bodies: list[str] = []
    lines = text.splitlines()
    for number, line in enumerate(lines):
        header = number + 1 < len(lines) and re.fullmatch(r"\|[-| ]+\|", lines[number + 1])
        if line.startswith("|") and not header and not re.fullmatch(r"\|[-| ]+\|", line):
            bodies.append(line)
    return bodies


def test_the_page_prints_exactly_the_numbers_of_the_example():
    _, found, section = DOC.read_text(encoding="utf-8").partition("\n## The worked example\n")
    assert found
    assert table_bodies(section) == printed_rows()


def test_every_function_that_the_page_names_exists_where_its_link_points():
    text = DOC.read_text(encoding="utf-8")
    links = re.findall(r"\[`([\w.]+)`\]\(([^)]+)\)", text)
    assert len(links) > 20
    for name, target in links:
        path = (DOC.parent / target).resolve()
        assert path.is_file(), f"{name} links to {target}, which does not exist"
        parts_of_name = name.split(".")
        module = ".".join(path.relative_to(DOC.parents[1] / "src" / "empo2").with_suffix("").parts)
        module = module.removesuffix(".__init__")
        assert name.startswith(module + "."), f"{name} links to {target}"
        found: Any = importlib.import_module(f"empo2.{module}")
        for attribute in parts_of_name[len(module.split(".")) :]:
            assert hasattr(found, attribute), f"{name} does not exist"
            found = getattr(found, attribute)
        assert callable(found)


def test_every_dotted_name_on_the_page_is_a_linked_function_or_a_config_value():
    text = re.sub(r"\[`[\w.]+`\]\([^)]+\)", "", DOC.read_text(encoding="utf-8"))
    sections = configs.sections()
    for name in re.findall(r"`([a-z_]+\.[a-z_.]+)[^`]*`", text):
        section, _, field = name.partition(".")
        assert section in sections, name
        assert field in configs.field_help(sections[section]), name


def test_the_page_names_every_equation():
    text = DOC.read_text(encoding="utf-8")
    for function in (
        "modes.draw_modes", "memory.TipMemory.commit", "memory.TipMemory.retrieve", "novelty.NoveltyCounter.rewards",
        "novelty.NoveltyCounter.commit", "advantages.episode_return", "advantages.group_advantages",
        "algorithms.group_relative", "losses.importance_ratio", "losses.probable_enough", "losses.clipped_policy_loss",
        "losses.token_weights", "losses.k3_divergence", "losses.entropy", "learner.learning_rate",
    ):  # fmt: skip
        assert f"[`{function}`]" in text, function
