"""Who may import whom: arrows point down only (CONTRIBUTING.md)."""

import ast
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "empo2"

LAYERS = [
    {"errors", "types", "config", "streams", "cache", "__init__"},
    {
        "chat",
        "prompts",
        "modes",
        "advantages",
        "sequences",
        "losses",
        "lowrank",
        "attention_products",
    },  # pure: values in, values out
    # owners of state
    {"attention", "models", "store", "memory", "novelty", "embed", "envs", "sampler", "frozen", "learner"},
    {"episode", "examples", "collect", "run", "algorithms", "walks", "lessons"},
    {"update", "metrics", "precision", "allocator", "assemble", "doctor"},
    {"train", "evaluate", "display", "report", "play"},
    {"warmup", "experiment", "bench"},
    {"cli", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return parts[0]


def imports(path: Path) -> set[str]:
    """Top-level empo2 modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "empo2":
            rest = node.module.split(".")[1:]
            found |= {rest[0]} if rest else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("empo2.")}
    return found - {"__version__"}


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_arrows_point_down(path: Path):
    own = module_of(path)
    for other in imports(path) - {own}:
        assert RANK[other] <= RANK[own], f"{own} (layer {RANK[own]}) imports {other} (layer {RANK[other]})"


def test_no_module_imports_itself_through_another():
    graph: dict[str, set[str]] = {}
    for path in FILES:
        graph.setdefault(module_of(path), set()).update(imports(path) - {module_of(path)})

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join((*trail, name))
        for other in sorted(graph.get(name, ())):
            visit(other, (*trail, name))

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize(
    ("module", "unknown"),
    [
        ("envs", {"chat", "prompts", "models", "sampler", "learner", "memory", "modes"}),
        ("memory", {"envs", "sampler", "learner", "models", "chat"}),
        ("novelty", {"envs", "sampler", "learner", "models", "chat"}),
        ("learner", {"memory", "envs", "modes", "prompts", "chat", "episode"}),
        ("losses", {"config", "types"}),
    ],
)
def test_what_a_module_must_not_know(module: str, unknown: set[str]):
    paths = [path for path in FILES if module_of(path) == module]
    assert paths
    for path in paths:
        assert not imports(path) & unknown


def test_types_config_and_streams_need_the_standard_library_only():
    for name in ("errors", "types", "config", "streams"):
        for node in ast.walk(ast.parse((SOURCE / f"{name}.py").read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for found in names:
                top = found.split(".")[0]
                assert top in sys.stdlib_module_names or top == "empo2", f"{name} imports {found}"


def test_the_loop_has_no_branch_on_mode_and_fits_two_screens():
    text = (SOURCE / "train.py").read_text()
    assert "Mode." not in text
    assert "if mode" not in text
    loop = next(n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == "train")
    assert loop.end_lineno - loop.lineno < 70


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_every_module_says_what_it_is(path: Path):
    if path.name != "__init__.py" or path.read_text():
        assert ast.get_docstring(ast.parse(path.read_text()))


def test_no_exception_is_swallowed():
    """`except Exception` stands only where the exception is passed on to somebody."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                names = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type else {"everything"}
                if names & {"Exception", "BaseException", "everything"}:
                    passes_on = any(isinstance(n, ast.Raise) for n in ast.walk(node))
                    passes_on |= "answer = error" in ast.unparse(node)
                    # a verdict tells of it
                    passes_on |= path.name == "check.py" and any(
                        isinstance(n, ast.Return) and f"{node.name})" in ast.unparse(n) for n in ast.walk(node)
                    )
                    assert passes_on, f"{path.name}:{node.lineno}"


def test_every_package_folder_is_shipped():
    import tomllib

    listed = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {".".join(("empo2", *p.parent.relative_to(SOURCE).parts)) for p in SOURCE.rglob("__init__.py")}
    assert set(listed) == folders | {"empo2.recipes"}
