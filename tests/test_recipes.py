"""Every shipped recipe trains a few steps, with the real models and simulators (`make test-real`)."""

import json
from pathlib import Path

import pytest

from empo2 import cli, models
from empo2.config import from_dict, read_recipe, shipped_recipes

#: Less of everything that takes time; what the recipe is about stays.
SMALLER = {
    "train.steps": "2",
    "env.live": "4",
    "env.max_turns": "3",
    "collect.groups_per_step": "1",
    "collect.group_size": "4",
    "eval.num_variations": "1",
    "eval.train_variations": "0",
}
ANOTHER_MODEL = {
    "Qwen/Qwen2.5-7B-Instruct": {"model.path": "smollm2-135m-instruct", "collect.max_action_tokens": "24"},
    "./runs/lock-warm": {"model.path": "tiny-random"},
}


@pytest.mark.real
@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_trains(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = from_dict(read_recipe(name))
    known = recipe.model.path in (models.TINY, *models.fetchable())
    settings = SMALLER | ({} if known else ANOTHER_MODEL[recipe.model.path])
    flags = [word for key, value in settings.items() for word in (f"--{key}", value)]
    assert cli.main(["train", name, "--run", str(tmp_path / "run"), *flags]) == 0, capsys.readouterr().err
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    assert steps[-1]["eval_episodes"] >= 1
    assert all(step["seconds_total"] > 0 for step in steps)
    assert (tmp_path / "run" / "checkpoints" / "step_000002" / "model").is_dir()
