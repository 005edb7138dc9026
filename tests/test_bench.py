"""`empo2 bench`: what it measures is measured, and its table says it."""

import json
import time

import pytest
import torch

from empo2 import bench, models
from empo2.cli import main
from empo2.config import from_dict, read_recipe, to_dict
from runs import smoke


def test_the_matrix_peak_is_that_of_the_fastest_product(monkeypatch):
    monkeypatch.setattr(bench, "CPU_SHAPES", ((64, 64, 64), (256, 256, 256)))
    seconds = iter([2.0, 0.5])
    monkeypatch.setattr(bench, "_seconds", lambda work, kind: work() is None or next(seconds))
    assert bench.matrix_peak(torch.float32, "cpu") == 2 * 256**3 / 0.5


def test_seconds_are_the_median_without_the_first_two(monkeypatch):
    taken = iter([9.0, 9.0, 1.0, 5.0, 2.0])
    clock = [0.0]

    def work() -> None:
        clock[0] += next(taken)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert bench._seconds(work, "cpu", repeats=3) == 2.0


def test_training_flops_of_a_small_model_counted_by_hand():
    model = models.tiny_model(100, 0, width=8, layers=2)
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8  # 4 heads and 2 key heads of width 2
    layer = attention + 3 * 8 * 24 + 2 * 8  # two norms
    assert bench.training_flops(model, 10, 3, 55) == 6 * 2 * layer * 10 + 6 * 100 * 8 * 3 + 12 * 2 * 8 * 55


def test_steps_are_measured_after_a_first_one():
    told: list[int] = []
    found = bench.measure_steps(smoke(), 2, told.append)
    assert told == [1, 2, 3]
    assert len(found) == 2
    for step in found:
        parts = sum(step[f"seconds_{part}"] for part in ("collect", "tips", "train", "other"))
        assert step["seconds_total"] == pytest.approx(parts)
        assert step["sampler_tokens_reused"] > step["tokens_sampled"] > 0
        assert step["sampler_tokens_computed"] > step["tokens_sampled"]
    assert found[0]["tokens_sampled"] != found[1]["tokens_sampled"]


def test_the_command_prints_a_table_and_writes_json(capsys, tmp_path):
    path = tmp_path / "bench.json"
    assert main(["bench", "smoke", "--steps", "1", "--json", str(path), "--collect.group_size", "3"]) == 0
    said = capsys.readouterr().out
    for word in ("matrix peak", "float32", "GB/s", "collect", "tips", "train", "other", "a step", "cache hits"):
        assert word in said
    found = json.loads(path.read_text())
    assert found["settings"]["collect"]["group_size"] == 3
    assert found["machine"]["matrix_peak_flops"]["float32"] > 1e8
    assert found["machine"]["read_bytes_per_second"] > 1e7
    assert len(found["steps"]) == 1
    assert found["settings"] == to_dict(from_dict(read_recipe("smoke") | {"collect": found["settings"]["collect"]}))


def test_without_steps_only_the_machine_is_measured(capsys, monkeypatch):
    monkeypatch.setattr(bench, "measure_steps", lambda *_: pytest.fail("a step was measured"))
    assert main(["bench", "smoke", "--steps", "0"]) == 0
    assert "matrix peak" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "-1"], "--steps must be at least 0"),
        (["--json", "nowhere/at/all.json"], "there is no folder"),
        (["--collect.group_size", "1"], "collect.group_size"),
    ],
)
def test_bad_input_is_refused(arguments, said, capsys):
    assert main(["bench", "smoke", *arguments]) == 2
    assert said in capsys.readouterr().err
