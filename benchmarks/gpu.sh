#!/usr/bin/env bash
# On a machine with a GPU, in less than ten minutes: the tests that need one, then training and decoding (gpu.py).
# PYTHON chooses the interpreter; it needs empo2's dependencies and pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
export PYTHONPATH=src:tests
timeout 240 "$python" -m pytest -q -m gpu tests/test_gpu.py
timeout 340 "$python" benchmarks/gpu.py
