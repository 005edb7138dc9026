"""Experiments: what is refused, what runs in which order, what is taken up again, what is reported."""

import copy
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from empo2 import config as configs
from empo2 import experiment
from empo2.config import read_toml
from empo2.errors import CheckpointError, ConfigError, MissingPart, UsageError
from empo2.experiment import cells, gather
from empo2.experiment.plan import differences, slug
from empo2.report import curves
from empo2.run import RunFolder

GOOD: dict[str, Any] = {
    "name": "coin",
    "recipe": "smoke",
    "compare": ["empo2", "grpo"],
    "seeds": [11, 12],
    "settings": {"eval.every": 1, "train.steps": 2},
    "arms": {
        "empo2": {},
        "grpo": {"train.algorithm": "grpo", "modes.p": 0.0, "novelty.coefficient": 0.0},
    },
}


def changed(**changes: Any) -> dict[str, Any]:
    """The good file with keys (`arms.grpo.seeds` written arms__grpo__seeds) changed; None removes one."""
    values = copy.deepcopy(GOOD)
    for name, value in changes.items():
        *way, last = name.split("__")
        table = values
        for part in way:
            table = table.setdefault(part, {})
        if value is None:
            del table[last]
        else:
            table[last] = value
    return values


def write(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "coin-experiment.toml"
    path.write_text(tomli_w.dumps(values))
    return path


def load(folder: Path, **changes: Any) -> experiment.Experiment:
    return experiment.load(write(folder, changed(**changes)))


# --- the file ---


def test_cells_hold_whole_recipes_and_seeds_come_first(tmp_path: Path):
    made = load(tmp_path, tasks={"easy": {"env.tasks": ["coin-3"]}, "hard": {"env.tasks": ["coin-5"]}}, threads=2)
    assert [(cell.seed, cell.task, cell.arm) for cell in made.cells] == [
        (seed, task, arm) for seed in (11, 12) for task in ("easy", "hard") for arm in ("empo2", "grpo")
    ]
    hard = next(cell for cell in made.cells if (cell.seed, cell.task, cell.arm) == (12, "hard", "grpo"))
    assert hard.recipe.env.tasks == ("coin-5",)
    assert (hard.recipe.train.seed, hard.recipe.train.threads, hard.recipe.train.steps) == (12, 2, 2)
    assert (hard.recipe.train.algorithm, hard.recipe.modes.p, hard.recipe.eval.every) == ("grpo", 0, 1)
    assert hard.recipe.learner.lr == 1e-3, "what nobody sets is the recipe's"
    assert hard.place == Path("hard/grpo/seed-12")
    assert (made.measure, made.tasks, made.keep_checkpoints) == ("eval_train_score_mean", ("easy", "hard"), False)


def test_an_arm_may_have_fewer_seeds_and_more_steps(tmp_path: Path):
    made = load(tmp_path, **{"arms__GRPO + novelty": {"seeds": [12], "train": {"steps": 9}, "modes.p": 0.0}})
    assert [(cell.arm, cell.seed) for cell in made.cells] == [
        ("empo2", 11), ("grpo", 11), ("empo2", 12), ("grpo", 12), ("GRPO + novelty", 12)
    ]  # fmt: skip
    assert made.cells[-1].recipe.train.steps == 9, "dotted keys without quotes mean the same"
    assert made.cells[-1].place == Path("smoke/grpo-novelty/seed-12")
    assert made.tasks == ("smoke",), "without [tasks] there is the recipe's own"


def test_a_recipe_beside_the_file_comes_before_a_shipped_one(tmp_path: Path):
    (tmp_path / "mine.toml").write_text('[model]\npath = "tiny-random"\n[learner]\nlr = 0.5\n')
    assert load(tmp_path, recipe="mine.toml").cells[0].recipe.learner.lr == 0.5


def test_tips_are_evaluated_only_where_an_arm_has_them(tmp_path: Path):
    made = load(tmp_path, evaluate_tips=True)
    with_tips = ("none", "own", "other")
    assert [cell.evaluates for cell in made.cells] == [with_tips, ("none",), with_tips, ("none",)]
    assert {cell.evaluates for cell in load(tmp_path).cells} == {()}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": [1]}, ["unknown key seed", "'seeds'"]),
        ({"name": None}, ["no name", "text"]),
        ({"name": " "}, ["name is empty"]),
        ({"arms": None}, ["no arms"]),
        ({"arms": {}}, ["no arms", "[arms.empo2]"]),
        ({"arms__grpo": 3}, ["arms.grpo = 3", "table"]),
        ({"recipe": "smoky"}, ["no recipe 'smoky'", "'smoke'"]),
        ({"recipe": "missing.toml"}, ["no recipe file", "missing.toml"]),
        ({"seeds": None}, ["no seeds", "a list"]),
        ({"seeds": []}, ["seeds = []", "at least one"]),
        ({"seeds": [1, 2, 1]}, ["seeds", "seed 1 twice"]),
        ({"seeds": [1, -2]}, ["seeds", "-2", "from 0"]),
        ({"seeds": [1, 2.5]}, ["seeds", "2.5", "whole number"]),
        ({"seeds": [True]}, ["seeds", "True", "whole number"]),
        ({"arms__grpo__seeds": [11, 11]}, ["arms.grpo.seeds", "twice"]),
        ({"arms__grpo__seeds": [11]}, ["'empo2' (seeds [11, 12])", "'grpo' (seeds [11])", "equal seeds"]),
        ({"compare": ["empo2", "gripo"]}, ["'gripo'", "no arm", "'grpo'"]),
        ({"compare": ["empo2", "empo2"]}, ["'empo2' twice"]),
        ({"compare": ["empo2"]}, ["compare", "two arms"]),
        ({"compare": "empo2"}, ["compare", "a list"]),
        ({"compare": [["empo2"], "grpo"]}, ["compare", "no arm"]),
        ({"also_compare": ["empo2", "grpo"]}, ["also_compare = 'empo2'", "two arms"]),
        ({"also_compare": [["grpo", "gripo"]]}, ["also_compare", "'gripo'", "no arm", "'grpo'"]),
        ({"also_compare": [["empo2", "grpo"]]}, ["also_compare", "['empo2', 'grpo']", "already"]),
        ({"also_compare": [["grpo", "empo2"], ["grpo", "empo2"]]}, ["['grpo', 'empo2']", "already"]),
        (
            {
                "also_compare": [["a", "b"]],
                "arms__a": {"seeds": [11]},
                "arms__b": {"seeds": [12]},
            },
            ["also_compare", "'a' (seeds [11])", "'b' (seeds [12])", "share no seed"],
        ),
        ({"name": "../../x"}, ["name", "without folders"]),
        ({"name": ".."}, ["name", "without folders"]),
        ({"name": "a\0b"}, ["name", "control characters"]),
        ({"arms__gr\npo": {"modes.p": 0.0}}, ["arms", "'gr\\npo'", "line breaks"]),
        ({"tips_temperature": float("inf")}, ["tips_temperature", "at least 0"]),
        ({"tips_temperature": -5}, ["tips_temperature", "-1 for the recipe's", "got -5"]),
        ({"tips_temperature": 10**400}, ["tips_temperature", "at least 0"]),
        ({"ratio_from": float("nan")}, ["ratio_from", "between 0"]),
        ({"ratio_from": float("inf")}, ["ratio_from", "between 0"]),
        ({"ratio_from": 10**400}, ["ratio_from", "between 0"]),
        ({"threads": 10**20}, ["threads", "between 1"]),
        ({"arms__grpo__modes": {"p": 0.0}}, ["[arms.grpo] sets modes.p twice"]),
        ({"arms__grpo__collect.max_action_tokens": 1}, ["collect.max_action_tokens"]),
        ({"measure": "eval_train_score"}, ["measure", "'eval_train_score_mean'"]),
        ({"settings__eval.train_variations": 0}, ["never evaluated", "eval.train_variations is 0"]),
        ({"measure": "eval_score_mean", "settings__eval.num_variations": 0}, ["never", "eval.num_variations is 0"]),
        ({"threads": 0}, ["threads must be between 1", "got 0"]),
        ({"threads": 1.5}, ["threads = 1.5", "whole number"]),
        ({"threads": True}, ["threads = True", "whole number"]),
        ({"tips_episodes": 0}, ["tips_episodes", "between 1"]),
        ({"ratio_from": -1}, ["ratio_from", "between 0"]),
        ({"evaluate_tips": "yes"}, ["evaluate_tips", "true or false"]),
        ({"evaluate_tips": True, "settings__modes.p": 0.0}, ["evaluate_tips", "no arm acts with tips"]),
        ({"settings__train.seed": 3}, ["[settings]", "train.seed", "'seeds'"]),
        ({"arms__grpo__train.threads": 3}, ["[arms.grpo]", "train.threads", "'threads'"]),
        ({"settings__steps": 3}, ["[settings]", "'steps' is not a setting", "section.key"]),
        ({"settings": [1]}, ["settings", "table"]),
        ({"settings__train.stps": 3}, ["unknown key train.stps", "'steps'", "arm 'empo2'"]),
        ({"arms__grpo__modes.p": 7.0}, ["arm 'grpo'", "modes.p", "0…1"]),
        ({"arms__grpo__train.algorithm": "grop"}, ["arm 'grpo'", "no algorithm 'grop'", "'grpo'"]),
        ({"arms__grpo__modes.p": 0.5}, ["arm 'grpo'", "grpo acts without tips"]),
        ({"arms__GRPO": {"modes.p": 0.0}}, ["'grpo' and 'GRPO'", "share the folder grpo"]),
        ({"arms__+": {}}, ["'+'", "no folder name"]),
        ({"tasks": {"a": {"env.taks": ["coin-3"]}}}, ["task 'a'", "env.taks", "'tasks'"]),
        ({"settings__eval.every": 0}, ["eval.every must be at least 1", "got 0"]),
        ({"arms__grpo__eval.every": 2}, ["eval.every is 1 in arm 'empo2' and 2 in 'grpo'"]),
        ({"arms__grpo__env.max_turns": 3}, ["env.max_turns is 6", "3 in 'grpo'", "[settings]"]),
        ({"arms__grpo__model.max_tokens": 512}, ["model.max_tokens"]),
        ({"arms__grpo__prompt.examples": 0}, ["prompt.examples"]),
        ({"arms__grpo__collect.group_size": 4}, ["collect.group_size"]),
        ({"arms__other": {"train.steps": 1}}, ["arm 'other' has train.steps = 1", "after 2", "never reaches"]),
        ({"arms__other": {"seeds": [13]}}, ["arm 'other' (seeds [13])", "shares no seed", "[11, 12]"]),
        ({"tasks": {"a": {}, "b": {"env.max_turns": 6}}}, ["'a' and 'b' have equal settings"]),
        ({"arms__grpo__collect.groups_per_step": 4}, ["collect.groups_per_step"]),
        (
            {"arms__grpo__train.steps": 3, "settings__learner.schedule": "cosine"},
            ["learner.schedule = 'cosine'", "train.steps differ"],
        ),
    ],
)
def test_what_cannot_be_run_or_compared_is_refused(tmp_path: Path, changes: dict[str, Any], words: list[str]):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, **changes)
    for word in words:
        assert word in str(caught.value)


def test_further_pairs_may_have_fewer_seeds(tmp_path: Path):
    planned = load(tmp_path, also_compare=[["grpo", "third"]], arms__third={"modes.p": 0.0, "seeds": [12]})
    assert planned.also_compare == (("grpo", "third"),)
    assert load(tmp_path).also_compare == ()


def test_a_file_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="no experiment file"):
        experiment.load(tmp_path / "missing.toml")


def test_names_become_folders():
    assert [slug(name) for name in ("GRPO + novelty", "a/b", "lock-2.5", "../x")] == [
        "grpo-novelty",
        "a-b",
        "lock-2.5",
        "x",
    ]


def test_settings_that_differ_from_a_run_are_named(tmp_path: Path):
    recipe = load(tmp_path, **{"settings__model.sampler_dtype": "auto"}).cells[0].recipe
    ran = configs.to_dict(recipe)
    ran["train"] |= {"steps": 5, "checkpoint_every": 77, "gone": 1}
    ran["model"]["sampler_dtype"] = "float32"
    ran["warmup"]["lr"] = 7.0
    del ran["learner"]["lr"], ran["advantage"]["skip_below"]  # of a run from before there were such settings
    assert differences(recipe, ran) == ["train.steps = 5 (the file: 2)", "learner.lr = 1e-05 (the file: 0.001)"]


# --- running, with a program in empo2's place that takes no time ---

STUB = '''
"""Stands for `empo2`: writes what a run folder holds. Its behaviour is in behaviour.json, by the cell's seed."""
import json, os, pathlib, signal, sys, time, tomllib

arguments = sys.argv[1:]
here = pathlib.Path(__file__).parent
with (here / "calls.jsonl").open("a") as file:
    call = {"arguments": arguments, "threads": os.environ["OMP_NUM_THREADS"] + os.environ["MKL_NUM_THREADS"]}
    file.write(json.dumps(call | {"own session": os.getsid(0) == os.getpid()}) + "\\n")
behaviour = json.loads((here / "behaviour.json").read_text())
resumed = "--resume" in arguments
run = pathlib.Path(arguments[arguments.index("--run") + 1] if arguments[0] == "train" else arguments[1])
if arguments[0] == "evaluate":
    if not (run / "checkpoints").is_dir():
        sys.exit("empo2: no checkpoint")
    if behaviour.get("evaluate prints") == "":
        sys.exit()
    print("a library that talks")
    print(json.dumps({"score_mean": 0.5, "memory": arguments[-1], "model": str(run)}))
    sys.exit(behaviour.get("evaluate fails with", "") == arguments[-1])
recipe = run / "config.toml" if resumed else pathlib.Path(arguments[1])
text = recipe.read_text()
values = tomllib.loads(text)
seed, steps = values["train"]["seed"], values["train"]["steps"]
does = behaviour.get(f"{values['train']['algorithm']} {seed}", behaviour.get(str(seed), ""))
others = [path for path in run.parents[2].glob("*/*/*/checkpoints") if path.parent != run]
if does == "fails" or (does == "is alone" and others):
    sys.exit("Traceback\\n\\nempo2: it broke")
if not resumed:
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "weights").write_text("GBs")
    machine = {"processor": "P", "cores": 2}
    (run / "run.json").write_text(json.dumps({"code": "abc", "machine": machine, "packages": {}, "command": sys.argv}))
    (run / "config.toml").write_text(text)
if does == "fails once" and not resumed:
    sys.exit("empo2: it broke once")
if does == "waits":
    stopped = []
    signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
    (here / f"waiting-{seed}").touch()
    while len(stopped) < behaviour["presses"]:
        time.sleep(0.01)
    time.sleep(0.3)
    (here / f"interrupts-{seed}").write_text(str(len(stopped)))
    sys.exit(130)
if does == "ends when the page says":
    page, until = run.parents[3] / "results" / "results.md", time.monotonic() + 60
    while not page.exists() or behaviour["page"] not in page.read_text():
        if time.monotonic() > until:
            sys.exit("empo2: no such page")
        time.sleep(0.01)
lines = [{"step": s, "num_episodes": 18, "tokens_sampled": 10, "tokens_computed": 20, "seconds_total": 1.5,
          "updates": 1, "entropy": 1.0, "grad_norm": 1.0, "distinct_states": s,
          "valid_action_rate": 0.5, "success_rate": 0.1}
         for s in range(1, steps + 1)]
gain = 20.0 if values["train"]["algorithm"] == "empo2" else 5.0
scores = [{"step": s, "eval_train_score_mean": 10 + gain * s + seed / 10, "eval_score_mean": 1.0}
          for s in range(0, steps + 1)]
for name, content in (("metrics", lines), ("evaluations", scores)):
    (run / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in content))
if does == "fails at the end":
    sys.exit("empo2: the disk is full")
if does == "kills itself":
    os.kill(os.getpid(), signal.SIGKILL)
'''


class Stub:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "stub.py").write_text(STUB)
        self.behaves()

    def behaves(self, **by_seed: Any) -> None:
        (self.folder / "behaviour.json").write_text(json.dumps(by_seed))

    def calls(self) -> list[list[str]]:
        """Arguments of each call since the last time they were asked for."""
        path = self.folder / "calls.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        path.unlink(missing_ok=True)
        assert {line["threads"] for line in lines} <= {"11"}
        assert all(line["own session"] for line in lines), "a terminal's Ctrl-C must not reach cells twice"
        return [line["arguments"] for line in lines]


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    """Also draws no figures, which take most of the time of a report (test_report.py draws them)."""
    folder = tmp_path / "stub"
    folder.mkdir()
    for name in ("draw_curves", "draw_diagnostics"):
        monkeypatch.setattr(curves, name, lambda study, folder: None)
    monkeypatch.setattr(cells, "EMPO2", (sys.executable, str(folder / "stub.py")))
    return Stub(folder)


def run(made: experiment.Experiment, folder: Path, *, jobs: int | None = 2, arms: list[str] | None = None):
    heard: list[str] = []
    status = experiment.run(made, folder / "out", folder / "results", jobs, arms, heard.append)
    return status, heard


def page(folder: Path) -> str:
    return (folder / "results" / "results.md").read_text()


def test_all_cells_run_once_and_the_report_is_made(tmp_path: Path, stub: Stub):
    made = load(tmp_path)
    stub.behaves(**{"11": "is alone", "12": "is alone"})
    status, heard = run(made, tmp_path, jobs=1)
    assert status == 0, "checkpoints are deleted as soon as a cell is done"
    places = [tmp_path / "out" / cell.place for cell in made.cells]
    assert stub.calls() == [["train", f"{place}.toml", "--run", str(place)] for place in places]
    assert heard[0].startswith("4 cells, 0 of them done; 1 at once, 1 thread(s) each")
    assert sum(": finished" in line for line in heard) == 4
    assert "difference 30.0, 95 % interval 30.0 to 30.0, 2 seeds" in page(tmp_path)
    assert (places[0].parent / "seed-11.log").read_text().startswith("$ empo2 train")
    (places[0] / "checkpoints").mkdir()  # as a call leaves it that is killed before it could delete them
    status, heard = run(made, tmp_path)
    assert status == 0
    assert stub.calls() == [], "finished cells are not run again"
    assert heard[0].startswith("4 cells, 4 of them done")
    assert not (places[0] / "checkpoints").exists()


def test_the_report_is_made_while_cells_run(tmp_path: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cells, "REPORT_EVERY_S", 0.0)
    finished: list[str] = []

    def hear(line: str) -> None:
        if line.startswith("[4/4]"):
            finished.extend(re.findall(r"(\d of 4) cells are finished", page(tmp_path)))

    assert experiment.run(load(tmp_path), tmp_path / "out", tmp_path / "results", 1, None, hear) == 0
    assert finished, "a report before the last cell's end"


def test_a_cell_that_ends_right_after_a_report_is_in_the_next_without_another_end(
    tmp_path: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cells, "REPORT_EVERY_S", 2.0)
    stub.behaves(**{"grpo 12": "ends when the page says", "page": "3 of 4 cells are finished"})
    assert run(load(tmp_path), tmp_path)[0] == 0


def test_a_report_that_fails_while_cells_run_does_not_end_them(
    tmp_path: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cells, "REPORT_EVERY_S", 0.0)
    made = load(tmp_path)
    assert run(made, tmp_path, arms=["empo2"])[0] == 0
    (tmp_path / "out/smoke/empo2/seed-11/run.json").write_bytes(b"[]")
    heard: list[str] = []
    with pytest.raises(CheckpointError, match=r"run\.json"):
        experiment.run(made, tmp_path / "out", tmp_path / "results", 1, ["grpo"], heard.append)
    assert sum(": finished" in line for line in heard) == 2
    assert any(line.startswith("no report yet: ") for line in heard)


def test_one_arm_and_kept_checkpoints(tmp_path: Path, stub: Stub):
    made = load(tmp_path, keep_checkpoints=True)
    assert run(made, tmp_path, arms=["grpo"], jobs=1)[0] == 0
    assert [call[3].rpartition("/")[2] for call in stub.calls()] == ["seed-11", "seed-12"]
    assert (tmp_path / "out/smoke/grpo/seed-11/checkpoints/weights").exists()
    assert "| smoke | empo2 | 11 | not run yet |" in page(tmp_path)


def test_a_failed_cell_is_tried_twice_shown_as_failed_and_tried_again_next_time(tmp_path: Path, stub: Stub):
    stub.behaves(**{"12": "fails once", "grpo 11": "fails"})
    made = load(tmp_path)
    status, heard = run(made, tmp_path, jobs=1)
    assert status == 1
    assert [call[1] for call in stub.calls() if "seed-12" in call[-1]].count("--resume") == 2, "both arms resumed"
    assert any("grpo, seed 11: failed; see" in line for line in heard)
    assert "| smoke | grpo | 11 | failed: empo2: it broke |" in page(tmp_path)
    assert "| grpo | 1/2 | 11.2 | 21.2 |" in page(tmp_path), "the mean is of the seed that finished, nothing is zero"
    failed = tmp_path / "results/cells/smoke/grpo/seed-11/failed.json"
    assert json.loads(failed.read_text())["failed"][-2:] == ["Traceback", "empo2: it broke"]
    shutil.rmtree(tmp_path / "out/smoke/grpo")
    experiment.report(made, tmp_path / "out", tmp_path / "results")
    assert "failed: empo2: it broke" in page(tmp_path), "the results know it without the run folder"
    stub.behaves()
    assert run(made, tmp_path)[0] == 0
    assert [Path(call[-1]).name for call in stub.calls()] == ["seed-11"], "of seed 12 the copy is left"
    assert "Missing cells" not in page(tmp_path)
    assert not failed.exists()


def test_a_failed_cell_is_begun_anew_or_gone_on_with(tmp_path: Path, stub: Stub):
    stub.behaves(**{"11": "fails", "12": "fails"})
    made = load(tmp_path)
    assert run(made, tmp_path)[0] == 1
    assert len(stub.calls()) == 8, "four cells, twice each"
    stub.behaves()
    assert run(made, tmp_path)[0] == 0
    assert len(stub.calls()) == 4


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_reaches_each_cell_as_often_as_pressed_and_the_next_call_goes_on(
    tmp_path: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch, presses: int
):
    """Once: a training saves. Twice: it ends at once."""
    stub.behaves(**{"11": "waits", "presses": presses})
    interrupt, sent = cells.Children.interrupt, []
    monkeypatch.setattr(cells.Children, "interrupt", lambda children: (sent.append(1), interrupt(children)))
    made = load(tmp_path)

    def press() -> None:
        deadline = time.monotonic() + 60
        while not (stub.folder / "waiting-11").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(presses):
            time.sleep(0.4)
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    threading.Thread(target=press).start()
    status, heard = run(made, tmp_path, jobs=1)
    assert status == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert any(line.startswith("stopping") for line in heard)
    assert (stub.folder / "interrupts-11").read_text() == str(presses)
    assert len(sent) == presses
    assert len(stub.calls()) == 1, "nothing is started after Ctrl-C, and nothing is tried again"
    assert "| smoke | empo2 | 11 | stopped: step 0 of 2 |" in page(tmp_path)
    assert "failed" not in page(tmp_path)
    stub.behaves()
    assert run(made, tmp_path)[0] == 0
    assert sum("--resume" in call for call in stub.calls()) == 1


def test_a_run_in_which_an_orphan_still_trains_is_waited_for(tmp_path: Path, stub: Stub):
    made = load(tmp_path)
    folder = tmp_path / "out" / made.cells[0].place
    stub.behaves(**{"11": "fails once"})
    folder.parent.mkdir(parents=True)
    cells.beside(folder, ".toml").write_text(tomli_w.dumps(experiment.plan.configs.to_dict(made.cells[0].recipe)))
    children = cells.Children(1)
    assert not cells._train(made.cells[0], folder, cells.beside(folder, ".log"), children)
    stub.calls()
    states: list[str] = []
    with RunFolder(folder).locked():
        worker = threading.Thread(target=lambda: states.append(cells.run_cell(made, made.cells[0], folder, children)))
        worker.start()
        time.sleep(1.0)
        assert stub.calls() == []
        assert gather.record(made.cells[0], tmp_path / "out", tmp_path / "results").state == "running"
    worker.join(30)
    assert states == ["finished"]
    assert [call[1] for call in stub.calls()] == ["--resume"]


def test_two_calls_cannot_share_an_out_folder(tmp_path: Path, stub: Stub):
    with cells._alone_in(tmp_path / "out"), pytest.raises(UsageError, match="another experiment runs in"):
        run(load(tmp_path), tmp_path)


def test_tips_are_evaluated_with_none_own_and_other(tmp_path: Path, stub: Stub):
    made = load(tmp_path, evaluate_tips=True, tips_episodes=3, tips_temperature=0.4, seeds=[11])
    assert run(made, tmp_path)[0] == 0
    asked = [call for call in stub.calls() if call[:2] == ["evaluate", str(tmp_path / "out/smoke/empo2/seed-11")]]
    common = [str(tmp_path / "out/smoke/empo2/seed-11"), "--split", "train", "--json", "--variations", "4"]
    common += ["--episodes", "3", "--eval.temperature", "0.4"]
    assert asked == [
        ["evaluate", *common],
        ["evaluate", *common, "--memory", "run", "--memory.source", "own"],
        ["evaluate", *common, "--memory", "run", "--memory.source", "other"],
    ]
    saved = json.loads((tmp_path / "results/cells/smoke/empo2/seed-11/tips.json").read_text())
    assert {name: found["memory"] for name, found in saved.items()} == {"none": "0.4", "own": "own", "other": "other"}
    assert saved["own"]["asked"] == {"episodes": 3, "temperature": 0.4}
    assert "model" not in saved["own"], "a folder of the machine"
    assert "## After training" in page(tmp_path)


def test_a_cell_whose_evaluation_failed_keeps_its_training(tmp_path: Path, stub: Stub):
    stub.behaves(**{"evaluate fails with": "other"})
    made = load(tmp_path, evaluate_tips=True, tips_episodes=3, seeds=[11])
    assert run(made, tmp_path)[0] == 1
    assert "| smoke | empo2 | 11 | trained, but not evaluated with tips: failed: " in page(tmp_path)
    assert "| empo2 | 1/1 |" in page(tmp_path)
    assert (tmp_path / "out/smoke/empo2/seed-11/checkpoints").exists(), "the next call needs them"
    assert [call[-1] for call in stub.calls() if call[0] == "evaluate" and "empo2/seed" in call[1]] == [
        "0.4", "own", "other", "other"
    ]  # fmt: skip
    stub.behaves()
    assert run(made, tmp_path)[0] == 0
    assert [call[-1] for call in stub.calls() if call[0] == "evaluate"] == ["other"], "what is there is kept"
    assert "Missing cells" not in page(tmp_path)


def test_tips_cannot_be_evaluated_when_the_checkpoints_are_gone(tmp_path: Path, stub: Stub):
    assert run(load(tmp_path, seeds=[11]), tmp_path)[0] == 0
    stub.calls()
    with pytest.raises(ConfigError, match="done and its checkpoint deleted"):
        run(load(tmp_path, seeds=[11], evaluate_tips=True), tmp_path)
    assert run(load(tmp_path, seeds=[11]), tmp_path)[0] == 0
    assert stub.calls() == [], "the training is done all the same"
    assert "Missing cells" not in page(tmp_path)


def test_evaluations_with_tips_are_those_that_the_file_asks_for(tmp_path: Path, stub: Stub):
    """Those of another temperature are not shown as if they were; with checkpoints they are made anew."""
    asked = {"evaluate_tips": True, "seeds": [11], "keep_checkpoints": True}
    assert run(load(tmp_path, tips_temperature=0.4, **asked), tmp_path)[0] == 0
    hotter = load(tmp_path, tips_temperature=1.0, **asked)
    experiment.report(hotter, tmp_path / "out", tmp_path / "results")
    assert "## After training" not in page(tmp_path)
    assert "| smoke | empo2 | 11 | trained, but not evaluated with tips: not yet |" in page(tmp_path)
    stub.calls()
    assert run(hotter, tmp_path)[0] == 0
    assert {call[0] for call in stub.calls()} == {"evaluate"}
    assert "sampling temperature: 1." in page(tmp_path)
    without = load(tmp_path, seeds=[11], keep_checkpoints=True)
    experiment.report(without, tmp_path / "out", tmp_path / "results")
    assert "## After training" not in page(tmp_path)


def test_a_cell_deleted_in_both_places_is_trained_again(tmp_path: Path, stub: Stub):
    made = load(tmp_path)
    assert run(made, tmp_path)[0] == 0
    for place in ("out", "results/cells"):
        shutil.rmtree(tmp_path / place / "smoke/empo2/seed-11")
    stub.calls()
    assert run(made, tmp_path)[0] == 0
    assert [call[0] for call in stub.calls()] == ["train"]


def test_elsewhere_it_goes_on_from_the_results(tmp_path: Path, stub: Stub):
    """A checkout on another machine has no run folders; what is finished counts, what is not whole is made anew."""
    stub.behaves(**{"grpo 11": "fails"})
    asked = {"seeds": [11], "evaluate_tips": True}
    assert run(load(tmp_path, **asked), tmp_path)[0] == 1
    shutil.rmtree(tmp_path / "out")
    stub.behaves()
    stub.calls()
    status, said = run(load(tmp_path, **asked), tmp_path)
    assert status == 0
    assert [call[0] for call in stub.calls()] == ["train", "evaluate"], "GRPO is evaluated without tips only"
    assert any("1 cell(s) done, from" in line for line in said)
    assert "Missing cells" not in page(tmp_path)
    shutil.rmtree(tmp_path / "out")
    copy = tmp_path / "results/cells/smoke/empo2/seed-11"
    (copy / "tips.json").unlink()
    with pytest.raises(ConfigError, match="was trained elsewhere, and its evaluations with tips are not those"):
        run(load(tmp_path, **asked), tmp_path)
    assert stub.calls() == [], "a finished training is not thrown away for want of an evaluation"
    shutil.rmtree(copy)
    assert run(load(tmp_path, **asked), tmp_path)[0] == 0
    assert [call[0] for call in stub.calls()] == ["train"] + 3 * ["evaluate"]


def test_with_checkpoints_kept_a_copy_in_the_results_is_not_enough(tmp_path: Path, stub: Stub):
    made = load(tmp_path, seeds=[11], keep_checkpoints=True)
    assert run(made, tmp_path)[0] == 0
    shutil.rmtree(tmp_path / "out")
    stub.calls()
    assert run(made, tmp_path)[0] == 0
    assert len(stub.calls()) == 2


def test_a_training_that_fails_after_its_last_step_is_not_finished(tmp_path: Path, stub: Stub):
    stub.behaves(**{"empo2 11": "fails at the end"})
    made = load(tmp_path)
    assert run(made, tmp_path)[0] == 1
    for gone in ("", "out"):  # the same from the copies
        if gone:
            shutil.rmtree(tmp_path / gone)
            experiment.report(made, tmp_path / "out", tmp_path / "results")
        assert "| smoke | empo2 | 11 | failed: empo2: the disk is full |" in page(tmp_path)
        assert "| empo2 | 1/2 |" in page(tmp_path)


def test_an_other_without_other_tasks_is_refused_before_training(tmp_path: Path, stub: Stub):
    with pytest.raises(ConfigError, match="needs tasks with memories of their own"):
        run(load(tmp_path, evaluate_tips=True, **{"settings__env.num_variations": 1}), tmp_path)
    assert stub.calls() == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("seed-11.state.json", b""),
        ("seed-11/tips.json", b'{"none": '),
        ("seed-11/run.json", b"[]"),
        ("seed-11/config.toml", b""),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, stub: Stub, name: str, content: bytes):
    made = load(tmp_path)
    assert run(made, tmp_path)[0] == 0
    (tmp_path / "out/smoke/empo2" / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}.* is .*damaged"):
        experiment.report(made, tmp_path / "out", tmp_path / "results")


def test_a_damaged_copy_is_named(tmp_path: Path, stub: Stub):
    made = load(tmp_path)
    assert run(made, tmp_path)[0] == 0
    shutil.rmtree(tmp_path / "out")
    path = tmp_path / "results/cells/smoke/empo2/seed-11/metrics.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl\.gz is damaged"):
        experiment.report(made, tmp_path / "out", tmp_path / "results")


def test_a_cell_that_was_killed_says_so(tmp_path: Path, stub: Stub):
    stub.behaves(**{"11": "kills itself"})
    assert run(load(tmp_path, seeds=[11]), tmp_path)[0] == 1
    assert "failed: ended by SIGKILL" in page(tmp_path)


def test_nothing_runs_where_something_is_wrong(tmp_path: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch):
    made = load(tmp_path)
    with pytest.raises(UsageError, match=r"no arm 'gripo'.*'grpo'"):
        run(made, tmp_path, arms=["gripo"])
    with pytest.raises(UsageError, match="--jobs must be at least 1, got 0"):
        run(made, tmp_path, jobs=0)
    with pytest.raises(ConfigError, match="coin-7"):
        run(load(tmp_path, **{"settings__env.tasks": ["coin-7"]}), tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPart, match=r"empo2\[report\]"):
        run(made, tmp_path)
    assert stub.calls() == []


def test_runs_of_the_file_as_it_was_are_not_gone_on_with(tmp_path: Path, stub: Stub):
    assert run(load(tmp_path), tmp_path)[0] == 0
    longer = load(tmp_path, **{"settings__train.steps": 3})
    stub.calls()
    with pytest.raises(ConfigError, match=r"train\.steps = 2 \(the file: 3\)"):
        run(longer, tmp_path)
    assert stub.calls() == []
    experiment.report(longer, tmp_path / "out", tmp_path / "results")
    assert "| smoke | empo2 | 11 | other settings: train.steps = 2 (the file: 3) |" in page(tmp_path)
    shutil.rmtree(tmp_path / "out")
    copy = tmp_path / "results/cells/smoke/grpo/seed-11/config.toml"
    before = copy.read_bytes()
    with pytest.raises(ConfigError, match=r"grpo/seed-11 ran with train\.steps = 2 \(the file: 3\).*--results"):
        run(longer, tmp_path, arms=["grpo"])
    assert (stub.calls(), copy.read_bytes()) == ([], before), "they may be all that is left of a study"
    shutil.rmtree(tmp_path / "results/cells/smoke/empo2")
    assert run(longer, tmp_path, arms=["empo2"])[0] == 0
    assert "No seed is finished in both" in page(tmp_path), "copies of the file as it was are no partners"


def test_a_report_keeps_copies_that_a_run_of_other_settings_would_replace(tmp_path: Path, stub: Stub):
    made = load(tmp_path)
    assert run(made, tmp_path)[0] == 0
    own, copy = (tmp_path / place / "smoke/grpo/seed-11/config.toml" for place in ("out", "results/cells"))
    before = copy.read_bytes()
    own.write_text(own.read_text().replace("lr = 0.001", "lr = 0.009"))
    assert own.read_bytes() != before
    experiment.report(made, tmp_path / "out", tmp_path / "results")
    assert run(made, tmp_path, arms=["empo2"])[0] == 0
    assert copy.read_bytes() == before
    assert "| smoke | grpo | 11 | other settings: learner.lr = 0.009" in page(tmp_path)


def test_a_copy_is_written_whole_or_not_at_all(tmp_path: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch):
    made = load(tmp_path)
    assert run(made, tmp_path)[0] == 0
    copy = tmp_path / "results/cells/smoke/empo2/seed-11"
    for path in copy.iterdir():
        path.unlink()
    flushed: list[Path] = []

    def is_full(path: Path) -> None:
        flushed.append(path)
        if len(flushed) > 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("empo2.run.flush", is_full)
    with pytest.raises(OSError, match="No space"):
        experiment.report(made, tmp_path / "out", tmp_path / "results")
    whole = [path for path in copy.iterdir() if not path.name.endswith(".writing")]
    assert [path.name for path in whole] == ["evaluations.jsonl"], "config.toml, which makes a copy of it, comes after"
    monkeypatch.undo()
    assert not gather.is_trained(copy)


def test_a_done_cell_whose_run_is_no_longer_whole_is_run_again(tmp_path: Path, stub: Stub):
    made = load(tmp_path)
    assert run(made, tmp_path)[0] == 0
    folder = tmp_path / "out/smoke/empo2/seed-11"
    (folder / "metrics.jsonl").write_text("".join((folder / "metrics.jsonl").open().readlines()[:1]))
    (folder / "checkpoints").mkdir()
    stub.calls()
    assert run(made, tmp_path)[0] == 0
    assert [call[:2] for call in stub.calls()] == [["train", "--resume"]]
    assert "Missing cells" not in page(tmp_path)


def test_a_failed_cell_that_an_interrupted_call_did_not_try_stays_failed(tmp_path: Path, stub: Stub):
    made = load(tmp_path)
    stub.behaves(**{"12": "fails"})
    assert run(made, tmp_path)[0] == 1
    children = cells.Children(1)
    children.interrupt()
    cell = made.cells[-1]
    assert cells.run_cell(made, cell, tmp_path / "out" / cell.place, children) == "stopped"
    assert gather.failure(tmp_path / "out" / cell.place)[-1] == "empo2: it broke"


def test_an_evaluation_that_prints_nothing_is_a_failed_one(tmp_path: Path, stub: Stub):
    stub.behaves(**{"evaluate prints": ""})
    made = load(tmp_path, seeds=[11], evaluate_tips=True)
    assert run(made, tmp_path)[0] == 1
    assert "no result: it printed []" in page(tmp_path)


def test_results_that_cannot_be_written_are_refused_before_anything_runs(tmp_path: Path, stub: Stub):
    (tmp_path / "results").write_text("a file")
    with pytest.raises(UsageError, match=r"cannot be written to .*results .*choose another --results"):
        run(load(tmp_path), tmp_path)
    assert stub.calls() == []


def test_a_disk_that_is_full_for_a_while_ends_no_cell(tmp_path: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cells, "REPORT_EVERY_S", 0.0)
    heard: list[str] = []
    write_report, asked = cells.report, []

    def fails_once(*arguments: Any) -> None:
        asked.append(arguments)
        if len(asked) == 1:
            raise OSError(28, "No space left on device")
        write_report(*arguments)

    monkeypatch.setattr(cells, "report", fails_once)
    assert experiment.run(load(tmp_path), tmp_path / "out", tmp_path / "results", 1, None, heard.append) == 0
    assert any("no report yet" in line and "No space left" in line for line in heard)


# --- results ---


def test_the_results_are_made_again_without_the_run_folders(tmp_path: Path, stub: Stub):
    made = load(tmp_path)
    assert run(made, tmp_path)[0] == 0

    def content() -> dict[str, bytes]:
        files = (path for path in (tmp_path / "results").rglob("*") if path.is_file())
        return {str(path.relative_to(tmp_path)): path.read_bytes() for path in files}

    first = content()
    cell = "results/cells/smoke/empo2/seed-11/"
    assert {cell + name for name in ("config.toml", "run.json", "metrics.jsonl.gz", "evaluations.jsonl")} <= set(first)
    assert json.loads(first[cell + "run.json"])["command"] == ["empo2", "train", "seed-11.toml", "--run", "seed-11"]
    assert str(tmp_path).encode() not in b"".join(first.values()), "folders of the machine stay there"
    assert len(gzip.decompress(first[cell + "metrics.jsonl.gz"]).splitlines()) == 2
    time.sleep(1.1)  # a gzip header that held the time would differ
    experiment.report(made, tmp_path / "out", tmp_path / "results")
    assert content() == first
    shutil.rmtree(tmp_path / "out")
    for name in ("results.md", "results.json"):
        (tmp_path / "results" / name).unlink()
    experiment.report(made, tmp_path / "out", tmp_path / "results")
    assert content() == first


def test_a_run_folder_counts_more_than_its_copy(tmp_path: Path, stub: Stub):
    made = load(tmp_path)
    assert run(made, tmp_path)[0] == 0
    folder = tmp_path / "out/smoke/empo2/seed-11"
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(lines[0] + '{"step": 2, "cut short')
    experiment.report(made, tmp_path / "out", tmp_path / "results")
    assert "| smoke | empo2 | 11 | stopped: step 1 of 2 |" in page(tmp_path)


# --- whole experiments with the smoke recipe ---

REAL = {
    "settings__collect.groups_per_step": 2,
    "settings__collect.group_size": 4,
    "settings__train.checkpoint_every": 1,
}
RUN = """
import sys
from pathlib import Path
from empo2 import experiment
folder = Path(sys.argv[1])
made = experiment.load(folder / "coin-experiment.toml")
sys.exit(experiment.run(made, folder / "out", folder / "results", 2, None, print))
"""


def start(folder: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def finish(folder: Path) -> str:
    process = start(folder)
    told, _ = process.communicate(timeout=280)
    assert process.returncode == 0, told
    return told


def outcome(folder: Path) -> dict[str, Any]:
    """What must be equal however often it was killed: evaluations, and metrics without seconds."""
    found: dict[str, Any] = {}
    for path in sorted((folder / "results" / "cells").rglob("evaluations.jsonl")):
        name = str(path.parent.relative_to(folder / "results"))
        metrics = [
            json.loads(line) for line in gzip.decompress((path.parent / "metrics.jsonl.gz").read_bytes()).splitlines()
        ]
        kept = [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in metrics]
        found[name] = (path.read_text(), kept)
    return found


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms × two seeds, without interruption."""
    folder = tmp_path_factory.mktemp("straight")
    write(folder, changed(**REAL, evaluate_tips=True, tips_episodes=1))
    finish(folder)
    return folder


@pytest.mark.slow
def test_a_whole_experiment(straight: Path):
    cells_there = outcome(straight)
    assert set(cells_there) == {f"cells/smoke/{arm}/seed-{seed}" for arm in ("empo2", "grpo") for seed in (11, 12)}
    for evaluations, metrics in cells_there.values():
        assert [json.loads(line)["step"] for line in evaluations.splitlines()] == [0, 1, 2]
        assert [line["step"] for line in metrics] == [1, 2]
    assert len({evaluations for evaluations, _ in cells_there.values()}) > 1
    assert read_toml(straight / "out/smoke/grpo/seed-12/config.toml")["train"]["seed"] == 12
    assert not any((straight / "out").rglob("*.safetensors"))
    tips = json.loads((straight / "results/cells/smoke/empo2/seed-11/tips.json").read_text())
    assert {name: found["memory"] for name, found in tips.items()}["none"] == "none"
    assert tips["none"]["tasks"] != tips["own"]["tasks"]
    assert (straight / "results/curves.png").stat().st_size > 10_000
    text = page(straight)
    assert "At equal episodes (16) empo2 scores" in text
    assert "4 of 4 cells are finished" in text
    assert "own tips" in text


@pytest.mark.slow
@pytest.mark.parametrize("victims", ["the call", "everything"])
def test_kill_9_and_calling_again_equals_going_straight(straight: Path, tmp_path: Path, victims: str):
    """Only the call is killed: its cells train on as orphans and are waited for. Or everything, as when power fails."""
    write(tmp_path, changed(**REAL, evaluate_tips=True, tips_episodes=1))
    process = start(tmp_path)
    deadline = time.monotonic() + 200
    while not list((tmp_path / "out").glob("*/*/seed-11/metrics.jsonl")):
        assert time.monotonic() < deadline, "no cell wrote a first step"
        assert process.poll() is None
        time.sleep(0.005)
    orphans = children_of(process.pid)
    assert orphans
    process.kill()
    process.wait()
    if victims == "everything":
        for orphan in orphans:
            os.kill(orphan, signal.SIGKILL)
    finish(tmp_path)
    assert outcome(tmp_path) == outcome(straight)
    assert any("--resume" in log.read_text() for log in (tmp_path / "out").rglob("*.log"))


def children_of(pid: int) -> list[int]:
    """Processes that a process started (Linux)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it ended meanwhile
            continue
        if parent == pid:
            found.append(int(path.parent.name))
    return found
