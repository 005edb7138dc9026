"""What the benchmarks that run a peer share: its environment, made once, and processes that print JSON last.

A peer's packages live in `.benchmarks/NAME` and nowhere else. The processes run one after another, never together.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
FOLDER = HERE.parent / ".benchmarks"


def peer_python(name: str) -> Path:
    """The interpreter of a peer's own environment (peers/NAME.txt on torch 2.13.0), which is made if it is missing."""
    folder = Path(os.environ.get(f"EMPO2_PEER_{name.upper()}") or FOLDER / name)
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        print(f"making {folder} …", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "torch==2.13.0"], check=True)
        subprocess.run([*pip, "-r", HERE / "peers" / f"{name}.txt"], check=True)
        if name == "vllm":  # they ask for a GPU's libraries when imported
            unwanted = ["torchvision", "torchaudio", "torchcodec"]
            subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *unwanted], check=True)
        ready.touch()
    return python


def run(python: Path | str, script: str, *arguments: Any, **environment: str) -> dict[str, Any]:
    """The JSON object that a script prints last. Raises CalledProcessError if it fails."""
    command = [str(python), str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def row(name: str, seconds: list[float], of: float) -> str:
    """One line of a table: each time, their median, and how many times ``of`` that is."""
    each = " ".join(f"{value:.1f}" for value in seconds)
    return f"{name:<44} {median(seconds):8.1f} s   {median(seconds) / of:6.2f} ×   ({each})"
