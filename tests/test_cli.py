"""The command line as its users meet it: whole processes, exit codes, words."""

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from empo2 import cli
from empo2.cli import evaluate as evaluate_command

LOCKS = Path(__file__).parents[1] / "docs/results/small/locks.toml"


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "empo2", *arguments], capture_output=True, text=True, timeout=280, **options
    )


SHORT = ("--train.steps", "2", "--train.checkpoint_every", "1")


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    done = run("train", "smoke", "--run", str(folder), *SHORT)
    assert done.returncode == 0, done.stderr
    assert "evaluation before training" in done.stdout
    assert "step 2/2" in done.stdout
    assert "trained model" in done.stdout
    return folder


def test_the_run_folder_tells_the_whole_story(smoke_run: Path):
    names = {path.name for path in smoke_run.iterdir()}
    assert {"config.toml", "run.json", "metrics.jsonl", "evaluations.jsonl", "memory.sqlite", "trajectories"} <= names
    told = json.loads((smoke_run / "run.json").read_text())
    assert told["packages"]["torch"]
    assert told["seed"] == 0
    required = """step policy_version num_episodes mode_plain mode_with_tips mode_distill score_mean return_mean
        novelty_mean novelty_share_of_advantage distinct_states success_rate valid_action_rate zero_advantage_groups
        tips_written tips_retrieved_mean loss entropy ratio_mean ratio_max clip_fraction masked_token_fraction
        grad_norm tokens_sampled tokens_trained seconds_collect seconds_tips seconds_train seconds_total""".split()
    lines = [json.loads(line) for line in (smoke_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert set(required) <= set(line)
    assert "eval_score_mean" in lines[-1]
    model = smoke_run / "checkpoints" / "step_000002" / "model"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in model.iterdir()}


def test_trajectories_hold_what_happened(smoke_run: Path):
    from empo2.run import RunFolder

    episodes = RunFolder(smoke_run).trajectories(2)
    assert len(episodes) == json.loads((smoke_run / "metrics.jsonl").read_text().splitlines()[1])["num_episodes"]
    assert any(episode["tip"] for episode in episodes)
    for episode in episodes:
        assert episode["tip_tokens"] > 0
        for turn in episode["turns"]:
            assert len(turn["logprobs"]) == len(turn["completion_ids"])
            assert {"observation", "tips", "prompt", "plain", "reward", "novelty", "advantage"} <= set(turn)
        total = sum(turn["reward"] * 0.01 + turn["novelty"] for turn in episode["turns"])
        assert episode["return"] == pytest.approx(total)


def test_a_run_that_finds_nothing_goes_on_and_says_so(tmp_path: Path):
    """One turn is never enough: GRPO has no signal in any group, and makes no update."""
    nothing = ("--train.algorithm", "grpo", "--modes.p", "0", "--novelty.coefficient", "0", "--env.max_turns", "1")
    done = run("train", "smoke", "--run", str(tmp_path / "run"), *SHORT, *nothing)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nothing to learn from") == 2
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(line["updates"], line["loss"], line["grad_norm"]) for line in lines] == [(0, None, None)] * 2


def test_resuming_a_finished_run_prints_its_summary(smoke_run: Path):
    before = (smoke_run / "metrics.jsonl").read_bytes()
    done = run("train", "--resume", "--run", str(smoke_run))
    assert done.returncode == 0, done.stderr
    assert "before" in done.stdout
    assert (smoke_run / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_whose_checkpoints_were_deleted_is_not_trained_anew(smoke_run: Path, tmp_path: Path):
    """As an experiment leaves its finished cells, which may never have saved before their last step."""
    left = tmp_path / "left"
    shutil.copytree(smoke_run, left, ignore=shutil.ignore_patterns("checkpoints"))
    recipe = (left / "config.toml").read_text()
    (left / "config.toml").write_text(re.sub("checkpoint_every = .*", "checkpoint_every = 99", recipe))
    before = (left / "metrics.jsonl").read_bytes()
    evaluated = run("evaluate", str(left))
    assert (evaluated.returncode, "--resume" in evaluated.stderr) == (2, False)
    assert "holds no checkpoint any more" in evaluated.stderr
    done = run("train", "--resume", "--run", str(left))
    assert done.returncode == 0, done.stderr
    assert "trained model: deleted" in done.stdout
    assert (left / "metrics.jsonl").read_bytes() == before
    lines = before.splitlines(keepends=True)
    (left / "metrics.jsonl").write_bytes(b"".join(lines[:-1]))
    scores = (left / "evaluations.jsonl").read_bytes().splitlines(keepends=True)
    (left / "evaluations.jsonl").write_bytes(b"".join(scores[:-1]))
    stopped = run("train", "--resume", "--run", str(left))
    assert stopped.returncode != 0
    assert "holds no checkpoint any more" in stopped.stderr
    assert (left / "metrics.jsonl").read_bytes() == b"".join(lines[:-1])


def test_evaluating_a_run_with_and_without_its_memory(smoke_run: Path):
    plain, tips = (
        run("evaluate", str(smoke_run), "--split", "train", "--episodes", "1", "--memory", memory, "--json")
        for memory in ("none", "run")
    )
    assert plain.returncode == tips.returncode == 0, plain.stderr + tips.stderr
    assert json.loads(plain.stdout)["memory_entries"] == 0
    rows = json.loads(tips.stdout)["tasks"]
    assert json.loads(tips.stdout)["memory_entries"] == sum(row["memory_entries"] for row in rows) > 0
    assert rows != json.loads(plain.stdout)["tasks"], "tips change what is done"
    assert len(rows) == 2  # eval.num_variations of the recipe
    flags = ("--variations", "1", "--episodes", "1", "--memory", "run")
    table = run("evaluate", str(smoke_run), *flags)
    assert table.returncode == 0, table.stderr
    row = next(line for line in table.stdout.splitlines() if "toy/coin-3/80" in line)
    assert row.split("│")[-2].strip() == "0", "the scope of an unseen variation holds no tips"


def test_the_environments_catalogue_stands_below_the_table(capsys):
    numbers = {"episodes": 1, "score_mean": 0.0, "success_rate": 0.0, "valid_action_rate": 1.0, "turns_mean": 5.0}
    where = {"environment": {"name": "webshop", "products": 2000, "checksum": "3d18", "seed": 0}}
    result = {**where, "memory": "none", "split": "test", "tasks": [], **numbers}
    evaluate_command.print_evaluation(result, as_json=False)
    assert capsys.readouterr().out.splitlines()[-1] == "name webshop, products 2000, checksum 3d18, seed 0"


def test_a_rare_success_is_not_printed_as_zero(capsys):
    numbers = {"episodes": 64, "score_mean": 0.016, "success_rate": 0.016, "valid_action_rate": 1.0, "turns_mean": 5.0}
    where = {"environment": {"name": "textworld-express"}}
    result = {**where, "memory": "none", "split": "train", "tasks": [{"task": "coin-11/9", **numbers}], **numbers}
    evaluate_command.print_evaluation(result, as_json=False)
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-2].split("│")]
    assert cells[3:5] == ["0.02", "1.6"]


def test_evaluation_with_memory_shows_the_tips_that_the_checkpoint_knew(smoke_run: Path, tmp_path: Path):
    """A run killed after its last checkpoint holds younger tips; they belong to no policy that is there."""
    run_copy = tmp_path / "run"
    shutil.copytree(smoke_run, run_copy)
    shutil.rmtree(run_copy / "checkpoints" / "step_000002")

    def entries() -> int:
        done = run(
            "evaluate",
            str(run_copy),
            "--split",
            "train",
            "--variations",
            "9",
            "--episodes",
            "1",
            "--memory",
            "run",
            "--json",
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["memory_entries"]

    with sqlite3.connect(run_copy / "memory.sqlite") as connection:
        born = dict(connection.execute("SELECT born_step, COUNT(*) FROM tips GROUP BY born_step"))
    assert born[2] > 0
    assert entries() == born[1]
    (run_copy / "memory.sqlite").unlink()
    done = run("evaluate", str(run_copy), "--memory", "run")
    assert (done.returncode, done.stdout) == (1, "")
    assert "memory.sqlite is missing" in done.stderr
    assert not (run_copy / "memory.sqlite").exists()


def test_evaluating_changes_nothing_in_the_run(smoke_run: Path):
    from empo2.models import file_sha256

    before = {path: file_sha256(path) for path in smoke_run.rglob("*") if path.is_file()}
    assert run("evaluate", str(smoke_run), "--episodes", "1", "--memory", "run", "--json").returncode == 0
    assert {path: file_sha256(path) for path in smoke_run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "smok"], ["no recipe 'smok'", "smoke"]),
        (["train", "no/such.toml"], ["no recipe file"]),
        (["train", "smoke", "--env.tasks", "coin-4"], ["no task 'coin-4'", "did you mean 'coin-"]),
        (["train", "smoke", "--env.variations", "99"], ["no train variation 99"]),
        (["train", "smoke", "--env.name", "toi"], ["no environment 'toi'"]),
        (["train", "smoke", "--train.algorithm", "ppo"], ["no algorithm 'ppo'"]),
        (["train", "smoke", "--model", "/no/such/model"], ["/no/such/model"]),
        (["train", "smoke", "--model.device", "warp"], ["model.device", "warp"]),
        (["train", "smoke", "--modes.p", "2"], ["modes.p", "0…1"]),
        (["train", "smoke", "--collect.group_size", "1"], ["at least 2"]),
        (["train", "smoke", "--model.max_tokens", "64"], ["leaves no room", "model.max_tokens"]),
        (["train", "smoke", "--model.max_tokens", "999999"], ["exceed the model's context"]),
        (["train", "smoke", "--prompt.examples", "500"], ["worked episodes", "prompt.examples"]),
        (["train", "--resume", "smoke", "--run", "."], ["the run's own recipe"]),
        (["train", "--resume", "--run", "/no/such/run"], ["holds no run"]),
        (["evaluate", "no-such-model"], ["no model 'no-such-model'"]),
        (["evaluate", "tiny-random", "--recipe", "smoke", "--memory", "run"], ["has no memory"]),
        (["evaluate", "tiny-random", "--recipe", "smoke", "--episodes", "0"], ["--episodes", "at least 1"]),
        (["train", "smoke", "--env.variations", "0,0,1"], ["env.variations", "twice"]),
        (["train", "smoke", "--env.tasks", "coin-3,coin-3"], ["env.tasks", "twice"]),
        (["train", "smoke", "--learner.beta1", "1.5"], ["learner.beta1", "below 1"]),
        (["train", "smoke", "--learner.eps", "-1"], ["learner.eps", "at least 0"]),
        (["train", "smoke", "--train.seed", "12345678901234567890"], ["train.seed"]),
        (["train", "smoke", "--model.device", "meta"], ["model.device", "meta"]),
        (["train", "smoke", "--learner.last_layers", "9"], ["last_layers", "2 layers"]),
        (["train", "smoke", "--memory.tip_tokens", "5000"], ["exceed the model's context", "memory.tip_tokens"]),
        (["train", "smoke", "--memory.max_tip_tokens", "5000"], ["exceed the model's context", "max_tip_tokens"]),
        (["train", "."], ["no recipe '.'"]),
        (["train", "smoke", "--run", "file"], ["cannot be made"]),
        (["train", "smoke", "--run", "file/below"], ["cannot be made"]),
        (["evaluate", "tiny-random", "--recipe", "smoke", "--eval.num_variations", "0"], ["nothing to evaluate"]),
        (["fetch", "gpt-5"], ["nothing to fetch"]),
        (["envs", "chess"], ["no environment 'chess'"]),
        (["experiment", "bad.toml"], ["no algorithm 'grop'", "'grpo'"]),
        (["experiment", str(LOCKS), "--report", "--arm", "typo"], ["--report runs nothing", "--arm"]),
        (["experiment", str(LOCKS), "--report", "--jobs", "0"], ["--report runs nothing", "--jobs"]),
    ],
)
def test_the_impossible_is_refused_in_one_sentence_with_exit_code_2(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMPO2_CACHE", str(tmp_path / "cache"))
    (tmp_path / "file").touch()
    (tmp_path / "bad.toml").write_text(
        'name = "bad"\nrecipe = "smoke"\ncompare = ["empo2", "other"]\nseeds = [1]\n[settings]\n"eval.every" = 1\n'
        '[arms.empo2]\n[arms.other]\n"train.algorithm" = "grop"\n'
    )
    if arguments[0] == "train" and "--run" not in arguments:
        arguments = [*arguments, "--run", str(tmp_path / "run")]
    status = cli.main(arguments)
    error = capsys.readouterr().err
    assert status == 2
    assert len(error.strip().splitlines()) == 1
    for word in words:
        assert word in error
    assert not (tmp_path / "run").exists(), "the mended recipe may use the same folder"


@pytest.mark.parametrize("flag", ["--train.step", "--loss.detla", "--memory.ent"])
def test_a_mistyped_flag_is_refused_with_the_nearest(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "smoke", flag, "1"])
    error = capsys.readouterr().err
    meant = {"--train.step": "train.steps", "--loss.detla": "loss.delta", "--memory.ent": "memory.entries"}[flag]
    assert f"no setting {flag}; did you mean '{meant}'?" in error


def test_two_processes_cannot_train_in_one_run(smoke_run: Path, capsys):
    from empo2.run import RunFolder

    with RunFolder.open(smoke_run).locked():
        assert cli.main(["train", "--resume", "--run", str(smoke_run)]) == 2
    assert "another process is training" in capsys.readouterr().err


def test_without_git_the_version_is_the_packages(monkeypatch):
    from empo2.run import code_version

    assert not code_version().startswith("empo2 ")
    monkeypatch.setenv("PATH", "")
    assert code_version().startswith("empo2 0.")


def test_a_run_folder_is_not_overwritten(smoke_run: Path, capsys):
    assert cli.main(["train", "smoke", "--run", str(smoke_run)]) == 2
    assert "--resume" in capsys.readouterr().err


def test_light_commands_import_nothing_heavy():
    code = (
        "import sys, empo2, empo2.cli, empo2.config\n"
        "try: empo2.cli.main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "empo2.config.from_dict(empo2.config.read_recipe('smoke'))\n"
        "heavy = {'torch', 'transformers', 'numpy', 'py4j', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr


def test_envs_lists_tasks_with_their_real_counts(capsys):
    assert cli.main(["envs"]) == 0
    printed = capsys.readouterr().out
    assert "scienceworld: 30 tasks" in printed
    line = next(line for line in printed.splitlines() if " power-component " in line)
    assert line.split()[1:] == ["10:", "0…9", "5:", "10…14", "5:", "15…19"]
    express = printed.split("textworld-express:")[1].split("\n\n")[0]
    for size in range(2, 12):
        line = next(line for line in express.splitlines() if f" coin-{size} " in line)
        assert line.split()[1:] == ["1000:", "0…999", "1000:", "10000…10999", "1000:", "20000…20999"], "seeds of games"


def test_help_names_every_setting(capsys):
    from empo2 import config

    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    printed = capsys.readouterr().out
    for section, kind in config.sections().items():
        for name in config.field_help(kind):
            assert f"--{section}.{name}" in printed


def test_doctor_reports_and_names_remedies(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("EMPO2_CACHE", str(tmp_path))
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "empo2 fetch smollm2-135m-instruct" in printed
    for part in ("Python", "torch", "memory", "disk", "Java runtime", "processor"):
        assert part in printed
