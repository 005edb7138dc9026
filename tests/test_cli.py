"""The command line as its users meet it: whole processes, exit codes, words."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from empo2 import cli


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
    for episode in episodes:
        assert episode["tip"] is not None
        for turn in episode["turns"]:
            assert len(turn["logprobs"]) == len(turn["completion_ids"])
            assert {"observation", "tips", "prompt", "plain", "reward", "novelty", "advantage"} <= set(turn)
        total = sum(turn["reward"] * 0.01 + turn["novelty"] for turn in episode["turns"])
        assert episode["return"] == pytest.approx(total)


def test_resuming_a_finished_run_prints_its_summary(smoke_run: Path):
    before = (smoke_run / "metrics.jsonl").read_bytes()
    done = run("train", "--resume", "--run", str(smoke_run))
    assert done.returncode == 0, done.stderr
    assert "before" in done.stdout
    assert (smoke_run / "metrics.jsonl").read_bytes() == before


def test_evaluating_a_run_with_and_without_its_memory(smoke_run: Path):
    plain, tips = (
        run("evaluate", str(smoke_run), "--split", "train", "--episodes", "1", "--memory", memory, "--json")
        for memory in ("none", "run")
    )
    assert plain.returncode == tips.returncode == 0, plain.stderr + tips.stderr
    assert json.loads(plain.stdout)["memory_entries"] == 0
    assert json.loads(tips.stdout)["memory_entries"] > 0
    assert len(json.loads(tips.stdout)["tasks"]) == 4
    table = run("evaluate", str(smoke_run), "--variations", "1", "--episodes", "1")
    assert table.returncode == 0, table.stderr
    assert "toy/coin-3/80" in table.stdout


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
        (["fetch", "gpt-5"], ["nothing to fetch"]),
        (["envs", "chess"], ["no environment 'chess'"]),
    ],
)
def test_the_impossible_is_refused_in_one_sentence_with_exit_code_2(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMPO2_CACHE", str(tmp_path / "cache"))
    if arguments[0] == "train" and "--run" not in arguments:
        arguments = [*arguments, "--run", str(tmp_path / "run")]
    status = cli.main(arguments)
    error = capsys.readouterr().err
    assert status == 2
    assert len(error.strip().splitlines()) == 1
    for word in words:
        assert word in error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_folder_is_not_overwritten(smoke_run: Path, capsys):
    assert cli.main(["train", "smoke", "--run", str(smoke_run)]) == 2
    assert "--resume" in capsys.readouterr().err


def test_light_commands_import_nothing_heavy():
    code = (
        "import sys, empo2, empo2.cli, empo2.config\n"
        "try: empo2.cli.main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "empo2.config.from_dict(empo2.cli._recipe_values('smoke'))\n"
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
    assert line.split()[1:] == ["10", "5", "5"]


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
