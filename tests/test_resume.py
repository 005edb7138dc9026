"""The determinism contract: same run bit for bit, whatever happened on the way."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from empo2 import cli
from empo2 import run as runs_folder
from empo2.errors import CheckpointError, UsageError
from empo2.run import RunFolder
from runs import fingerprint, run_training, smoke, without_evaluation


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> RunFolder:
    """Six steps without interruption."""
    return run_training(tmp_path_factory.mktemp("straight") / "run", smoke())


def test_the_smoke_run_exercises_all_modes_and_updates(straight: RunFolder):
    lines = straight.metrics()
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for mode in ("plain", "with_tips", "distill"):
        assert sum(line[f"mode_{mode}"] for line in lines) > 0
    assert all(line["updates"] > 0 for line in lines)
    assert all(line["sampler_gap_max"] < 1e-4 for line in lines), "trainer and sampler disagree in float32"


def test_the_same_recipe_gives_the_same_run(straight: RunFolder, tmp_path: Path):
    assert fingerprint(run_training(tmp_path / "run", smoke())) == fingerprint(straight)


def test_another_seed_gives_another_run(straight: RunFolder, tmp_path: Path):
    other = run_training(tmp_path / "run", smoke(("train.seed", 1)))
    assert fingerprint(other)["sha256"] != fingerprint(straight)["sha256"]


def test_stopping_after_three_steps_and_resuming_equals_going_straight(straight: RunFolder, tmp_path: Path):
    run_training(tmp_path / "run", smoke(), stop_after=3)
    assert fingerprint(run_training(tmp_path / "run", smoke())) == fingerprint(straight)


def test_what_a_run_goes_on_with_is_noted_where_it_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = run_training(tmp_path / "run", smoke(), stop_after=3)
    resume = ["train", "--resume", "--run", str(run.path)]
    begun = run.provenance()
    assert begun["precision"] == {"sampler": "float32", "trainer": "float32"}
    run.note_resumption(run.config())
    assert run.provenance() == begun, "the same code on the same machine"
    monkeypatch.setattr("empo2.run.code_version", lambda: "younger")
    assert cli.main(resume) == 0
    noted = run.provenance()["resumed"]
    assert [(part["code"], part["machine"]) for part in noted] == [("younger", begun["machine"])]
    assert run.provenance() | {"resumed": noted} == begun | {"resumed": noted}, "what it began with stays"
    run.note_resumption(run.config())
    assert run.provenance()["resumed"] == noted


def test_a_run_does_not_go_on_in_another_environment(tmp_path: Path):
    run = RunFolder.create(tmp_path / "run", smoke(), {"checksum": "a"})
    assert run.provenance()["environment"] == {"checksum": "a"}
    run.note_resumption(run.config(), {"checksum": "a"})
    with pytest.raises(UsageError, match="put its files back, or start a new run"):
        run.note_resumption(run.config(), {"checksum": "b"})


def test_a_finished_run_made_longer_equals_one_planned_so(straight: RunFolder, tmp_path: Path):
    run = run_training(tmp_path / "run", smoke(("train.steps", 4)))
    resume = ["train", "--resume", "--run", str(run.path)]
    assert cli.main([*resume, "--train.steps", "6"]) == 0
    assert run.config() == straight.config()
    assert [part["steps"] for part in run.provenance()["resumed"]] == [6]
    assert without_evaluation(fingerprint(run)) == without_evaluation(fingerprint(straight))
    assert [line["step"] for line in run.evaluations()] == sorted({4, *(s["step"] for s in straight.evaluations())})


def test_a_run_is_made_longer_only_where_it_stays_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = run_training(tmp_path / "run", smoke(("train.steps", 2), ("learner.schedule", "linear")))
    before = (run.path / "config.toml").read_bytes()
    resume = ["train", "--resume", "--run", str(run.path)]
    for settings, said in [
        (["--train.steps", "1"], "only make it longer"),
        (["--train.steps", "3"], "its learning rate falls until step 2"),
        (["--train.seed", "3"], "the run's own recipe"),
        (["--train.steps", "3", "--train.seed", "3"], "the run's own recipe"),
    ]:
        assert cli.main([*resume, *settings]) == 2
        assert said in capsys.readouterr().err
    recipe = run.path / "config.toml"
    recipe.write_text(recipe.read_text().replace('"linear"', '"constant"'))
    shutil.move(run.path / "checkpoints", tmp_path / "checkpoints")
    assert cli.main([*resume, "--train.steps", "3"]) == 1
    assert "holds no checkpoint any more" in capsys.readouterr().err
    assert recipe.read_bytes() == before.replace(b'"linear"', b'"constant"')


def test_the_gpu_is_noted_only_where_one_is_used(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: f"GPU {device}")
    assert [runs_folder.gpu(device) for device in ("cpu", "auto", "cuda:1")] == [None, "GPU None", "GPU cuda:1"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert runs_folder.gpu("auto") is None


def test_kill_9_and_resume_equals_going_straight(straight: RunFolder, tmp_path: Path):
    """Killed after the fourth step, saved at the third: metrics, memory and novelty of step four are taken back."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "empo2", "train"]
    process = subprocess.Popen([*command, "smoke", "--run", str(folder)], stdout=subprocess.DEVNULL)
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 4):
        assert time.monotonic() < deadline, "the run wrote no fourth step"
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    run = RunFolder.open(folder)
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [3]
    resumed = subprocess.run([*command, "--resume", "--run", str(folder)], capture_output=True, text=True, timeout=200)
    assert resumed.returncode == 0, resumed.stderr
    assert fingerprint(run) == fingerprint(straight)
    assert [line["step"] for line in run.evaluations()] == [line["step"] for line in straight.evaluations()]
    assert run.trajectories(5) == straight.trajectories(5)


def test_ctrl_c_saves_and_says_how_to_resume(tmp_path: Path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "empo2", "train", "smoke", "--run", str(folder), "--train.steps", "500"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert f"empo2 train --resume --run {folder}" in printed
    run = RunFolder.open(folder)
    assert run.checkpoints()[-1].step == run.metrics()[-1]["step"]
    assert "Traceback" not in errors


def test_evaluating_more_often_changes_no_bit_of_training(straight: RunFolder, tmp_path: Path):
    often = run_training(tmp_path / "run", smoke(("eval.every", 1), ("eval.episodes", 3)))
    assert len(often.evaluations()) > len(straight.evaluations())
    assert without_evaluation(fingerprint(often)) == without_evaluation(fingerprint(straight))


def test_a_killed_worker_changes_no_bit_of_training(straight: RunFolder, tmp_path: Path):
    def kill_the_worker(parts, step):
        if step in (2, 4):
            os.kill(parts.pool._workers[0].process.pid, signal.SIGKILL)

    killed = run_training(tmp_path / "run", smoke(), meddle=kill_the_worker)
    assert fingerprint(killed) == fingerprint(straight)


def test_a_worker_killed_in_the_middle_of_episodes_changes_no_bit(straight: RunFolder, tmp_path: Path):
    counters = {}

    def kill_soon(parts, step):
        counters["pool"] = parts.pool.counters
        if step == 2:
            calls, start_step = iter(range(10_000)), parts.pool.start_step

            def start_step_and_kill(slot: int, action: str) -> None:
                if next(calls) == 20:
                    os.kill(parts.pool._workers[0].process.pid, signal.SIGKILL)
                start_step(slot, action)

            parts.pool.start_step = start_step_and_kill

    killed = run_training(tmp_path / "run", smoke(), meddle=kill_soon)
    assert counters["pool"].crashes == 1
    assert counters["pool"].replays > 0
    assert fingerprint(killed) == fingerprint(straight)


def test_damage_to_a_checkpoint_is_found(tmp_path: Path):
    recipe = smoke(("train.steps", 2), ("train.checkpoint_every", 1))
    run = run_training(tmp_path / "run", recipe)
    weights = run.checkpoints()[-1].model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        run_training(tmp_path / "run", smoke(("train.steps", 3)))


def test_a_run_whose_checkpoints_were_removed_is_not_begun_again(tmp_path: Path):
    recipe = smoke(("train.steps", 2), ("train.checkpoint_every", 1))
    run = run_training(tmp_path / "run", recipe)
    for checkpoint in run.checkpoints():
        shutil.rmtree(checkpoint.folder)
    before = run.metrics(), run.trajectories(2)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        run_training(tmp_path / "run", recipe)
    assert (run.metrics(), run.trajectories(2)) == before


def test_a_run_that_was_killed_while_it_wrote_its_first_checkpoint_goes_on(tmp_path: Path, monkeypatch):
    recipe = smoke(("train.steps", 2), ("train.checkpoint_every", 2))
    straight = run_training(tmp_path / "straight", recipe)

    def killed(*given, **named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            run_training(tmp_path / "killed", recipe)
    assert len(RunFolder(tmp_path / "killed").metrics()) == 2
    assert fingerprint(run_training(tmp_path / "killed", recipe)) == fingerprint(straight)


@pytest.mark.parametrize("name", ["checkpoints/step_000001/state.json", "metrics.jsonl", "run.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, capsys):
    run = run_training(tmp_path / "run", smoke(("train.steps", 1)))
    (run.path / name).write_text("{not this\n" * 200)
    assert cli.main(["train", "--resume", "--run", str(run.path)]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert name in error
    assert "damaged" in error


def test_a_changed_memory_is_found(tmp_path: Path):
    import sqlite3

    recipe = smoke(("train.steps", 2), ("train.checkpoint_every", 2))
    run = run_training(tmp_path / "run", recipe)
    with sqlite3.connect(run.store) as connection:
        connection.execute("UPDATE tips SET score = score + 1 WHERE id = 1")
    with pytest.raises(CheckpointError, match="memory"):
        run_training(tmp_path / "run", smoke(("train.steps", 3)))


def test_only_the_last_checkpoints_are_kept_and_nothing_half_written(straight: RunFolder, tmp_path: Path):
    run = run_training(tmp_path / "run", smoke(("train.checkpoint_every", 1), ("train.keep_checkpoints", 2)))
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [5, 6]
    assert not list((run.path / "checkpoints").glob(".writing*"))
