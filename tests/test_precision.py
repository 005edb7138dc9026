"""The fastest precision is measured once and remembered."""

import json

import pytest
import torch

from empo2 import precision
from empo2.assemble import resolved
from runs import smoke


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Seconds by precision, and a list of what was measured."""
    calls: list[torch.dtype] = []
    seconds = {torch.float32: 1.0, torch.bfloat16: 2.0}

    def measure(dtype: torch.dtype) -> float:
        calls.append(dtype)
        return seconds[dtype]

    monkeypatch.setenv("EMPO2_CACHE", str(tmp_path))
    monkeypatch.setattr(precision, "has_bf16_instructions", lambda: True)
    monkeypatch.setattr(precision, "_seconds", measure)
    return seconds, calls


def test_the_faster_one_is_taken_and_kept(measured):
    seconds, calls = measured
    assert precision.fastest("cpu") == "float32"
    seconds[torch.bfloat16] = 0.5
    assert precision.fastest("cpu") == "float32", "the same recipe must give the same run again"
    assert len(calls) == 2
    path = precision.cache_folder() / "precision.json"
    path.unlink()
    assert precision.fastest("cpu") == "bfloat16"
    (machine,) = json.loads(path.read_text())
    assert torch.__version__ in machine
    path.write_text("{torn")
    assert precision.fastest("cpu") == "bfloat16"


def test_nothing_is_measured_where_the_answer_is_known(measured, monkeypatch):
    assert precision.fastest("cuda") == "bfloat16"
    monkeypatch.setattr(precision, "has_bf16_instructions", lambda: False)
    assert precision.fastest("cpu") == "float32"
    assert measured[1] == []


def test_a_recipe_is_resolved_once(measured):
    recipe = resolved(smoke(("model.sampler_dtype", "auto"), ("model.trainer_dtype", "bfloat16")))
    assert (recipe.model.sampler_dtype, recipe.model.trainer_dtype) == ("float32", "bfloat16")
    assert resolved(recipe) == recipe


def test_the_measurement_measures():
    assert 0 < precision._seconds(torch.float32, repeats=1) < 10
