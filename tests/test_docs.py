"""The README and the docs say only what is there."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from empo2 import cli, config, experiment
from empo2.config import read_toml, recipe_folder
from empo2.experiment.plan import differences

ROOT = Path(__file__).parents[1]
STUDIES = [p for p in sorted((ROOT / "docs" / "results").glob("*/*.toml")) if (p.with_suffix("") / "cells").is_dir()]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(page: Path) -> list[str]:
    """Lines of shell blocks that run empo2 or make."""
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", page.read_text(), flags=re.S)
    lines = [line.split("#")[0].strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith(("empo2 ", "make ", ".venv/bin/empo2 "))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_in_the_docs_can_be_parsed(page: Path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for command in commands(page):
        words = shlex.split(command)
        if words[0] == "make":
            assert words[1] in targets, command
        else:
            parsed = cli.parser().parse_args(words[1:])
            recipe = getattr(parsed, "recipe", None)
            assert recipe in (None, "mine.toml", *config.shipped_recipes()) or (ROOT / recipe).exists(), command


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_relative_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_settings_named_in_the_docs_exist(page: Path):
    known = {f"{s}.{name}" for s, kind in config.sections().items() for name in config.field_help(kind)}
    sections = "|".join(config.sections())
    for name in re.findall(rf"`(?:--)?((?:{sections})\.[A-Za-z_0-9]+)", page.read_text()):
        module, _, member = name.partition(".")
        if member not in ("py", "toml", "jsonl", "sqlite") and name not in known:
            assert member in defined_in(module), f"{page.name}: {name}"


def defined_in(module: str) -> set[str]:
    """Functions and classes of a module of the package; empty if there is no such module."""
    path = ROOT / "src" / "empo2" / f"{module}.py"
    body = ast.parse(path.read_text()).body if path.exists() else []
    return {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_every_recipe_is_named_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    for path in recipe_folder().glob("*.toml"):
        assert path.stem in readme


def test_the_test_command_of_the_readme_is_what_ci_runs():
    assert "make test" in (ROOT / "README.md").read_text()
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("study", STUDIES, ids=lambda p: p.stem)
def test_committed_results_are_those_of_their_experiment_file(study: Path):
    """A recipe that changes changes the studies made with it, unless they say what they were made with."""
    cells = experiment.load(study).cells
    kept = [(cell, study.with_suffix("") / "cells" / cell.place / "config.toml") for cell in cells]
    found = [(cell, path) for cell, path in kept if path.exists()]
    assert found
    for cell, path in found:
        assert differences(cell.recipe, read_toml(path)) == [], path


@pytest.mark.parametrize("page", [ROOT / "docs" / "performance.md"], ids=lambda p: p.name)
def test_benchmarks_named_in_the_docs_are_those_that_are_there(page: Path):
    """Each that a person runs; the others are run by them."""
    named = set(re.findall(r"benchmarks/(\w+\.(?:py|sh))", page.read_text()))
    there = {path.name for path in (ROOT / "benchmarks").iterdir() if path.suffix in (".py", ".sh")}
    parts = {"episodes.py", "update.py", "sampling.py", "side_by_side.py", "gpu.py"}
    assert named == there - parts
