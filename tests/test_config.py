"""Recipes: typed, checked, unknown keys refused with a suggestion."""

import dataclasses
from pathlib import Path

import pytest
import tomli_w

from empo2 import config
from empo2.algorithms import algorithm
from empo2.config import recipe_folder, shipped_recipes
from empo2.errors import ConfigError


def test_every_field_has_help_text():
    for section in config.sections().values():
        assert set(config.field_help(section)) == {field.name for field in dataclasses.fields(section)}


def test_a_config_survives_a_toml_file(tmp_path: Path):
    changed = config.from_dict(
        {"loss": {"dual_clip": "none"}, "memory": {"show_min_score": 3.5}, "env": {"tasks": ["a", "b"]}}
    )
    assert changed.loss.dual_clip is None
    (tmp_path / "r.toml").write_text(tomli_w.dumps(config.to_dict(changed)))
    assert config.from_dict(config.read_toml(tmp_path / "r.toml")) == changed


def test_text_from_a_command_line_is_read_as_the_fields_type():
    values = config.with_overrides(
        {"modes": {"p": 0.1}}, [("modes.p", "0.5"), ("env.tasks", "a,b"), ("collect.overlap", "false")]
    )
    made = config.from_dict(values)
    assert (made.modes.p, made.env.tasks, made.collect.overlap) == (0.5, ("a", "b"), False)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"collect": {"group_size": 1}}, ["group_size", "at least 2", "got 1", "collect.group_size"]),
        ({"modes": {"p": 1.5}}, ["modes.p", "0…1", "1.5"]),
        ({"modes": {"q": -0.1}}, ["modes.q", "0…1"]),
        ({"loss": {"clp_low": 0.1}}, ["unknown key loss.clp_low", "clip_low"]),
        ({"los": {"clip_low": 0.1}}, ["unknown section [los]", "loss"]),
        ({"loss": {"aggregation": "tokens"}}, ["aggregation", "'token'"]),
        ({"env": {"live": 2.5}}, ["env.live", "whole number"]),
        ({"env": {"live": True}}, ["env.live", "whole number"]),
        ({"learner": {"lr": "fast"}}, ["learner.lr", "a number"]),
        ({"learner": {"lr": float("nan")}}, ["learner.lr", "finite"]),
        ({"learner": {"lr": -1.0}}, ["learner.lr", "at least 0"]),
        ({"env": {"num_products": -1}}, ["env.num_products", "at least 0", "got -1"]),
        ({"env": {"limit_goals": -1}}, ["env.limit_goals", "at least 0", "got -1"]),
        ({"env": {"tasks": []}}, ["env.tasks", "at least one"]),
        ({"loss": {"dual_clip": 1.0}}, ["dual_clip", "above 1"]),
        ({"memory": {"threshold": 2}}, ["memory.threshold", "-1…1"]),
        ({"train": 3}, ["section"]),
    ],
)
def test_what_cannot_work_is_refused_with_value_rule_and_remedy(values, words):
    with pytest.raises(ConfigError) as caught:
        config.from_dict(values)
    for word in words:
        assert word in str(caught.value)


def test_files_that_are_not_recipes_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="no recipe file"):
        config.read_toml(tmp_path / "missing.toml")
    (tmp_path / "bad.toml").write_text("[train\nsteps = 3")
    with pytest.raises(ConfigError, match="not a valid TOML"):
        config.read_toml(tmp_path / "bad.toml")


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_valid_and_says_what_it_is(name: str):
    path = recipe_folder() / f"{name}.toml"
    assert path.read_text().startswith("#")
    algorithm(config.from_dict(config.read_toml(path)))


def test_a_grpo_recipe_cannot_hold_tips_or_novelty():
    for values in ({"modes": {"p": 0.5}, "novelty": {"coefficient": 0}}, {"modes": {"p": 0}}):
        with pytest.raises(ConfigError, match="grpo"):
            algorithm(config.from_dict({"train": {"algorithm": "grpo"}, **values}))
    with pytest.raises(ConfigError, match="'empo2'"):
        algorithm(config.from_dict({"train": {"algorithm": "empo"}}))


def test_grpo_twins_differ_in_name_tips_and_novelty_only():
    for name in ("default", "scienceworld"):
        own, twin = (config.read_toml(recipe_folder() / f"{n}.toml") for n in (name, f"{name}-grpo"))
        twin["train"].pop("algorithm")
        assert twin["modes"].pop("p") == 0
        assert twin["novelty"].pop("coefficient") == 0
        own.get("train", {}).pop("algorithm", None)
        own.get("modes", {}).pop("p", None)
        own.get("novelty", {}).pop("coefficient", None)
        assert {k: v for k, v in own.items() if v} == {k: v for k, v in twin.items() if v}
