"""Warm-up: what is imitated, that it is imitation, and that it never touches the games that are trained on."""

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from empo2 import config, models
from empo2.assemble import assemble, imitated_tasks, make_suite, prompt_rules, train_tasks
from empo2.chat import ChatFormat
from empo2.cli import main
from empo2.config import Config, LearnerConfig, LossConfig
from empo2.envs.lock import HOUSES, LockEnvironment, way_out
from empo2.errors import MissingPart, UsageError
from empo2.examples import WorkedExamples
from empo2.learner import Learner
from empo2.lessons import Classroom, Lesson, lessons, tip_of
from empo2.lowrank import added
from empo2.types import StepResult, Task
from empo2.walks import Walk, elsewhere, failed_walks, follow, random_walk, walk_to_the_goal
from empo2.warmup import other_games


def recipe(*overrides: tuple[str, Any]) -> Config:
    return config.from_dict(config.with_overrides(config.read_recipe("lock"), overrides))


def game(variation: int, rooms: int = 4) -> Task:
    return Task(environment="lock", name=f"lock-{rooms}", variation=variation)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    doors = [" ".join(doors) for doors in HOUSES.values()]
    return models.word_tokenizer(
        [
            "Reply with one door. New task. Find the way out. Tips from earlier attempts at this task: - Solved in "
            "room one two three four. Nothing found, Action taken: (final score: 1 0) You are. Doors: , "
            "A dead end. No such",
            *doors,
        ]
    )


@pytest.fixture(scope="module")
def classroom(tokenizer: Any) -> Classroom:
    rules = prompt_rules(recipe(), ChatFormat.of(tokenizer), make_suite(recipe()))
    return Classroom(rules=rules, examples=WorkedExamples(0, {}), suffix="action", longest=1000)


def right_way(variation: int) -> Walk:
    tries = (walk_to_the_goal(LockEnvironment(), game(variation), 4, random.Random(seed)) for seed in range(99))
    return next(way for way in tries if way)


class Corridor:
    """Ten rooms in a row; the goal is in the last one. Only here do walks have detours."""

    def reset(self, task: Task, seed: int) -> tuple[str, dict[str, Any]]:
        self.room = 3
        return self._look(), self._info()

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.room += 1 if action == "on" else -1
        return self._look(), float(self.room == 9), self.room == 9, False, self._info()

    def close(self) -> None:
        pass

    def _look(self) -> str:
        return f"You are in room {self.room}."

    def _info(self) -> dict[str, Any]:
        return {"state": self._look(), "actions": ("back", "on") if self.room else ("on",), "success": self.room == 9}


def test_a_walk_takes_what_changes_something_each_as_often():
    rng, environment = random.Random(0), LockEnvironment()
    walks = [random_walk(environment, game(0), 4, rng) for _ in range(3000)]
    first = [walk.actions[0] for walk in walks]
    for door in HOUSES["wood"]:
        assert first.count(door) / len(first) == pytest.approx(1 / 3, abs=0.03)
    assert {len(walk.actions) for walk in walks} == {1, 2, 3, 4}
    assert sum(walk.success for walk in walks) / len(walks) == pytest.approx(1 / 81, abs=0.008)


def test_a_walk_ends_at_the_recipes_turns():
    assert len(random_walk(Corridor(), game(0), 2, random.Random(0)).actions) == 2


def test_detours_are_cut_from_a_walk_to_the_goal():
    ways = [walk_to_the_goal(Corridor(), game(0), 6, random.Random(seed)) for seed in range(20)]
    assert {way.actions for way in ways if way} == {("on",) * 6}
    assert sum(way is None for way in ways) < 20


def test_there_is_no_walk_to_a_goal_too_far():
    assert all(walk_to_the_goal(Corridor(), game(0), 5, random.Random(seed)) is None for seed in range(20))


def test_a_lock_is_tried_again_after_a_dead_end():
    found = [walk_to_the_goal(LockEnvironment(), game(v), 4, random.Random(v)) for v in range(60)]
    assert 10 <= sum(way is not None for way in found) < 60
    assert all(way.actions == way_out(4, variation)[1] for variation, way in enumerate(found) if way)


def test_following():
    way = right_way(0)
    rng = random.Random(0)
    assert follow(LockEnvironment(), way, rng, faithful=1.0, turns=4).actions == way.actions
    erring = [follow(LockEnvironment(), way, rng, faithful=0.7, turns=4) for _ in range(2000)]
    took = [walk.actions[0] == way.actions[0] for walk in erring]
    assert sum(took) / len(took) == pytest.approx(0.7 + 0.3 / 3, abs=0.03)


class Star:
    """Four places around a hall: where an action leads is said, except for the door."""

    PLACES = ("attic", "cellar", "garden", "shed")

    def reset(self, task: Task, seed: int) -> tuple[str, dict[str, Any]]:
        self.at = "hall"
        return self._look(), self._info()

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.at = action.removeprefix("go to ") if self.at == "hall" else "hall"
        return self._look(), 0.0, False, False, self._info()

    def close(self) -> None:
        pass

    def _look(self) -> str:
        return f"You are in the {self.at}."

    def _info(self) -> dict[str, Any]:
        places = self.PLACES if self.at == "hall" else ("hall",)
        return {
            "state": self._look(),
            "actions": tuple(f"go to {place}" for place in places),
            "leads": {f"go to {place}": place for place in places if place != "shed"},
        }


def star_walk(*actions: str) -> Walk:
    """That walk in the star."""
    environment, waiting = Star(), list(actions)
    observation, info = environment.reset(game(0), 0)
    answers = tuple(StepResult(**dict(zip(("observation", "reward", "terminated", "truncated", "info"),
                                          environment.step(action), strict=True))) for action in waiting)  # fmt: skip
    return Walk(task=game(0), observation=observation, info=info, actions=actions, answers=answers)


def test_elsewhere_is_where_failed_walks_were_not():
    """One took the attic; one was in the cellar before it took the attic from the hall: garden and shed are left."""
    failed = (star_walk("go to attic"), star_walk("go to cellar", "go to hall", "go to attic"))
    assert failed[1].places() == {"hall", "cellar"}
    rng = random.Random(0)

    def firsts(walks: tuple[Walk, ...], faithful: float) -> set[str]:
        found = (elsewhere(Star(), walks, rng, faithful=faithful, turns=1).actions[0] for _ in range(200))
        return {action.removeprefix("go to ") for action in found}

    assert firsts(failed, 1.0) == {"garden", "shed"}
    assert firsts(failed, 0.5) == set(Star.PLACES)
    everywhere = tuple(star_walk(f"go to {place}") for place in Star.PLACES)
    assert firsts(everywhere, 1.0) == set(Star.PLACES), "all was tried: anything goes"
    known = (star_walk(*[way for place in Star.PLACES for way in (f"go to {place}", "go to hall")], "go to shed"),)
    assert firsts(known, 1.0) == {"attic", "cellar", "garden"}, "every place was seen: another action than the last"
    way = elsewhere(Star(), failed, rng, faithful=1.0, turns=2)
    assert way.actions[1] == "go to hall", "no failed walk acted there"


def test_failed_walks_failed_and_differ():
    found = failed_walks(LockEnvironment(), game(0, 2), 4, random.Random(0), 3)
    assert len(found) == 3
    assert not any(walk.success for walk in found)
    assert len({walk.actions for walk in found}) == 3
    assert len(failed_walks(Corridor(), game(0), 1, random.Random(0), 3)) == 2, "there are but two of one action"


def test_lessons_with_failures():
    """Half of the lessons with tips show failures only, the other half show them below the way."""
    settings = replace(recipe().warmup, tips=0.8, failures=0.5)
    found = lessons(settings, LockEnvironment(), [game(v, 2) for v in range(50)], turns=4, seed=0, k=3)
    taught = list(itertools.islice(found, 600))
    shown = [tuple(walk.success for walk in lesson.shown) for lesson in taught]
    assert {(), (True, False, False), (False, False, False)} <= set(shown)
    assert not any(True in each[1:] for each in shown), "the way comes first"
    assert sum(bool(each) and not each[0] for each in shown) / 600 == pytest.approx(0.4, abs=0.06)
    assert sum(bool(each) and each[0] for each in shown) / 600 == pytest.approx(0.4, abs=0.06)
    assert all({walk.task for walk in lesson.shown} <= {lesson.walk.task} for lesson in taught)
    tried = [
        (lesson.walk.actions[0], {walk.actions[0] for walk in lesson.shown})
        for lesson in taught
        if lesson.shown and not lesson.shown[0].success
    ]
    again = [action in before for action, before in tried if len(before) < 3]
    assert sum(again) / len(again) == pytest.approx((1 - settings.faithful) * 1.7 / 3, abs=0.05), "1.7 of 3 were tried"


def test_without_walks_that_fail_there_is_nothing_to_tell_of_failures():
    class Won(LockEnvironment):
        """Every walk is at its goal after one move."""

        def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
            observation, _, _, _, info = super().step(action)
            return observation, 1.0, True, False, {**info, "success": True}

    settings = replace(recipe().warmup, tips=1.0, failures=1.0)
    found = lessons(settings, Won(), [game(v, 2) for v in range(50)], turns=4, seed=0, k=3)
    with pytest.raises(UsageError, match=r"no walk failed in 1000 games.*warmup\.failures to 0"):
        next(found)


def test_entries_of_several_walks(classroom: Classroom):
    """By state, in the order of the walks; what two walks say alike is there once."""
    walks = (random_walk(LockEnvironment(), game(0), 4, random.Random(seed)) for seed in range(99))
    failed = next(walk for walk in walks if len(walk.actions) == 2)
    entries = classroom.entries([right_way(0), failed, failed])
    one, two = (f"You are in room {room}. Doors: {', '.join(HOUSES['wood'])}." for room in ("one", "two"))
    assert [tip.score for tip in entries[one]] == [tip.score for tip in entries[two]] == [1.0, 0.0]
    assert entries[one][1].text.startswith("Nothing found in room one, in room two. Action taken in room one: ")
    assert len(entries) == 4


def test_lessons_are_in_other_games_than_are_trained_on_or_chosen_from():
    settings = recipe(("warmup.first_variation", 10), ("env.variations", [2, 11]), ("warmup.tasks", ["lock-4"]))
    suite = make_suite(settings)
    trained = train_tasks(settings, suite)
    games = other_games(settings, suite, trained)
    assert [task.variation for task in games] == [10, *range(12, 1000)]

    def taught_first(count: int) -> list[Lesson]:
        found = lessons(settings.warmup, LockEnvironment(), games, turns=4, seed=0, k=1)
        return list(itertools.islice(found, count))

    taught = taught_first(400)
    walked = {lesson.walk.task for lesson in taught} | {walk.task for lesson in taught for walk in lesson.shown}
    assert walked <= set(games)
    assert 0.1 < sum(len(lesson.shown) for lesson in taught) / 400 < 0.6
    assert all(walk.success for lesson in taught for walk in lesson.shown)
    assert taught_first(400) == taught, "seeded"
    with pytest.raises(UsageError, match="no train variation is left"):
        other_games(recipe(("warmup.first_variation", 1000)), suite, trained)


def test_train_variations_that_are_evaluated_as_unseen_are_not_walked_in():
    settings = recipe(("eval.split", "train"), ("eval.num_variations", 3), ("warmup.first_variation", 0))
    suite = make_suite(settings)
    trained = train_tasks(settings, suite)
    walked = {game.variation for game in other_games(settings, suite, trained)}
    assert [number for number in range(10) if number not in walked] == [0, 1, 2, 3, 4, 5, 6]


def test_a_lesson_in_tokens(classroom: Classroom, tokenizer: Any):
    """The tip of each state stands in the turn of that state; actions and the tip at the end are trained, no more."""
    way = right_way(0)
    house, doors = way_out(4, 0)
    (row,) = classroom.rows(Lesson(walk=way, shown=(way,)), 7)
    spans = [tokenizer.decode(row.token_ids[span.start : span.stop]) for span in row.spans]
    assert spans == [*(f"{door} <|im_end|>" for door in doors), "Solved in room four . <|im_end|>"]
    assert [span.key.group for span in row.spans] == [7] * 5
    assert all(span.advantage == 1.0 for span in row.spans)
    said = tokenizer.decode(row.token_ids)
    for room, door in zip(("one", "two", "three", "four"), doors, strict=True):
        tip = f"Solved in room four . Action taken in room {room} : {door} . ( final score : 1 )"
        here = f"You are in room {room} . Doors : {' , '.join(HOUSES[house])} . <|im_end|>"
        assert said.index(tip) < said.index(here), "the tip stands above what it is about"
    (plain,) = classroom.rows(Lesson(walk=way, shown=()), 0)
    assert "Tips" not in tokenizer.decode(plain.token_ids)
    assert [tokenizer.decode(plain.token_ids[s.start : s.stop]) for s in plain.spans] == spans


def test_a_tip_says_how_it_went(classroom: Classroom):
    walks = (random_walk(LockEnvironment(), game(0), 4, random.Random(seed)) for seed in range(99))
    failed = next(walk for walk in walks if not walk.success)
    trajectory, _ = classroom.play(failed, {})
    places = ", ".join(f"in room {room}" for room in ("one", "two", "three", "four")[: len(failed.actions)])
    assert tip_of(trajectory) == f"Nothing found {places}."
    assert tip_of(classroom.play(right_way(0), {})[0]) == "Solved in room four."
    unnamed = replace(trajectory, turns=tuple(replace(turn, state="dark") for turn in trajectory.turns))
    assert tip_of(unnamed) == "Nothing found."


def test_an_update_is_one_of_supervised_learning(classroom: Classroom, tokenizer: Any):
    """The gradient equals that of the mean cross-entropy of the trained tokens, computed the plain way."""
    rows = [
        row
        for number, walk in enumerate((right_way(0), random_walk(LockEnvironment(), game(5), 4, random.Random(1))))
        for row in classroom.rows(Lesson(walk=walk, shown=()), number)
    ]

    plain = models.tiny_model(len(tokenizer), 0).double()
    losses = []
    for row in rows:
        ids = torch.tensor([row.token_ids])
        logits = plain(input_ids=ids).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        losses += [each[span.start - 1 : span.stop - 1] for span in row.spans]
    torch.cat(losses).mean().backward()
    trained = models.with_own_attention(models.tiny_model(len(tokenizer), 0)).double()
    learner = Learner(trained, LearnerConfig(max_grad_norm=0.0), LossConfig(), temperature=1.0)
    seen = {}
    for name, parameter in trained.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.update({name: p.grad.clone()}))
    learner.update(rows, {}, 1e-4)
    for name, parameter in plain.named_parameters():
        assert (seen[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name


FEW = [("warmup.updates", 3), ("warmup.batch", 4), ("warmup.episodes", 4), ("warmup.readers", 2), ("train.threads", 1)]


def test_the_whole_command(tmp_path: Path, capsys):
    """It writes an ordinary model folder that says what it was made from, and does not write over one."""
    folder = tmp_path / "warm"
    flags = [part for name, value in FEW for part in (f"--{name}", str(value))]
    assert main(["warmup", "lock", "--model.path", str(folder), *flags]) == 0
    said = capsys.readouterr().out
    assert f"warmed model: {folder}" in said
    note = json.loads((folder / "warmup.json").read_text())
    assert note["from"] == "new-words"
    sizes = [f"{kind}-{rooms}" for kind in ("lock", "maze") for rooms in (2, 4, 6)]
    assert note["games"] == {name: [4, 999, 996] for name in sizes}
    assert note["left_out"] == {name: [] for name in sizes}
    assert note["warmup"]["updates"] == 3
    assert note["env"]["max_turns"] == 6, "what else decides which walks it saw"
    assert note["machine"]["cores"] >= 1
    assert note["threads"] == 1, "weights differ between processors"
    assert note["episodes"] == 16
    assert note["others_with_tips_episodes"] == note["others_without_tips_episodes"] == 8
    assert set(note["scores"]) == {f"lock/lock-4/{variation}" for variation in range(4)}
    parts = assemble(recipe(("model.path", str(folder))), ":memory:", with_learner=True)
    parts.close()
    shown = recipe(("model.path", str(folder)), ("env.variations", "3,4,999,0"))
    assert [task.variation for task in imitated_tasks(shown)] == [4, 999]
    assert imitated_tasks(recipe(("model.path", str(folder)))) == []
    (folder / "warmup.json").write_text('{"games": {"lock-4": 3}}')
    with pytest.raises(MissingPart, match=r"warmup\.json is damaged"):
        imitated_tasks(shown)
    assert main(["warmup", "lock", "--model.path", str(folder), *flags]) == 2
    assert "is there already" in capsys.readouterr().err


def test_what_was_left_out_of_a_warm_up_was_not_imitated(tmp_path: Path):
    folder = tmp_path / "warm"
    flags = [part for name, value in FEW for part in (f"--{name}", str(value))]
    assert main(["warmup", "lock", "--model.path", str(folder), "--env.variations", "5,7,0", *flags]) == 0
    shown = recipe(("model.path", str(folder)), ("env.variations", "4,5,6,7"))
    assert [task.variation for task in imitated_tasks(shown)] == [4, 6]


def test_what_is_missing_is_noticed_before_anything_is_learnt(tmp_path: Path, capsys, monkeypatch):
    flags = [part for name, value in FEW for part in (f"--{name}", str(value))]
    monkeypatch.setattr("empo2.warmup.imitate", lambda *_: pytest.fail("it learns already"))
    (tmp_path / "file").write_text("no folder")
    assert main(["warmup", "lock", "--model.path", str(tmp_path / "file/warm"), *flags]) == 2
    assert "cannot be made" in capsys.readouterr().err
    fetched: list[str] = []

    def fetch(name: str) -> None:
        fetched.append(name)
        raise MissingPart("no index")

    monkeypatch.setattr(models, "fetched", lambda name: None)
    monkeypatch.setattr(models, "fetch", fetch)
    flags += ["--model.embedder", "minilm"]
    assert main(["warmup", "lock", "--model.path", str(tmp_path / "warm"), *flags]) == 2
    assert fetched == [models.MINILM]


def test_a_policy_that_was_not_measured_does_not_lie_where_training_looks(tmp_path: Path, monkeypatch):
    flags = [part for name, value in FEW for part in (f"--{name}", str(value))]

    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("empo2.warmup.measured", interrupted)
    assert main(["warmup", "lock", "--model.path", str(tmp_path / "warm"), *flags]) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["warm-unmeasured"]


def test_without_games_that_have_a_way_to_the_goal_nothing_is_said_of_reading(tmp_path: Path, capsys):
    hopeless = [("env.tasks", "lock-6"), ("env.max_turns", 5), ("warmup.tips", 0), ("warmup.failures", 0)]
    flags = [part for name, value in [*FEW, *hopeless] for part in (f"--{name}", str(value))]
    assert main(["warmup", "lock", "--model.path", str(tmp_path / "warm"), *flags]) == 0
    said = capsys.readouterr().out
    assert "score on the recipe's tasks: 0.0000 (16 episodes without tips)" in said
    assert "other games" not in said


def test_our_own_models_are_not_written_over(capsys):
    assert main(["warmup", "lock", "--model.path", "tiny-random"]) == 2
    assert "name a new folder" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_weights(tmp_path: Path):
    flags = [part for name, value in FEW for part in (f"--{name}", str(value))]
    for name in ("one", "two"):
        assert main(["warmup", "lock", "--model.path", str(tmp_path / name), *flags]) == 0
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_difference_of_low_rank_can_be_passed_on(tmp_path: Path):
    """The base and the file beside the folder give the weights in the folder."""
    flags = [part for name, value in FEW for part in (f"--{name}", str(value))]
    base, warm = tmp_path / "base", tmp_path / "warm"
    assert main(["warmup", "lock", "--model.path", str(base), *flags]) == 0
    assert not (tmp_path / "base.safetensors").exists()
    flags += ["--warmup.base", str(base), "--warmup.rank", "2"]
    assert main(["warmup", "lock", "--model.path", str(warm), *flags]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (base, warm))
    change = load_file(tmp_path / "warm.safetensors")
    with safe_open(tmp_path / "warm.safetensors", "pt") as file:
        assert json.loads(file.metadata()["warmup"]) == json.loads((warm / "warmup.json").read_text())
    assert {tensor.shape[1] for name, tensor in change.items() if name.endswith(".B")} == {2}
    made = added(before, {name: tensor for name, tensor in change.items() if not name.startswith("lm_head")})
    assert all(torch.equal(made[name], after[name]) for name in after)
    assert any(not torch.equal(before[name], after[name]) for name in after)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"warmup.rank": "4"}, "warmup.rank keeps the difference from a base"),
        ({"env.name": "toy", "env.tasks": "coin-3", "warmup.tasks": ""}, "info['actions']"),
        ({"warmup.first_variation": "5000"}, "no train variation is left"),
        ({"warmup.tasks": "lock-99"}, "lock has no task 'lock-99'"),
        ({"warmup.tips": "1.5"}, "warmup.tips is a probability"),
        ({"warmup.base": "nowhere"}, "no/model"),
        ({"warmup.max_score": "-1"}, "more than warmup.max_score"),
        ({"memory.source": "other", "env.num_variations": "1"}, "needs tasks with memories of their own"),
        ({"model.max_tokens": "5000"}, "exceed the model's context"),
        ({"model.max_tokens": "32"}, "leaves no room for an action"),
        ({"warmup.tasks": "lock-6", "env.max_turns": "5", "warmup.tips": "1"}, "no walk got to the goal"),
        ({"train.algorithm": "grop"}, "no algorithm 'grop'"),
    ],
)
def test_what_cannot_be_warmed_up_is_refused(tmp_path: Path, capsys, changes, said):
    flags = [part for name, value in FEW for part in (f"--{name}", str(value))]
    flags += [part for name, value in changes.items() for part in (f"--{name}", value)]
    if changes.get("warmup.base"):
        flags[-1], said = str(tmp_path / "no/model"), "there is no model"
    assert main(["warmup", "lock", "--model.path", str(tmp_path / "warm"), *flags]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "warm").exists(), "nothing that training would take for a warmed model"
    if "max_score" in said:  # and again, over the policy that was refused
        assert main(["warmup", "lock", "--model.path", str(tmp_path / "warm"), *flags]) == 2
        assert said in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["warm-refused"]
    else:
        assert not list(tmp_path.glob("warm*")), "refused before anything was learnt"
