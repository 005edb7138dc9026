"""The most memory that a training run takes, all its processes together (proportional set size; Linux).

python benchmarks/memory.py [RECIPE [FLAGS …]]        # default: the default recipe, all of its steps, no evaluation
"""

import subprocess
import sys
import tempfile
import time

import psutil

FLAGS = ["--eval.num_variations", "0", "--eval.train_variations", "0"]


def pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return 0


recipe, flags = (sys.argv[1:2] or ["default"])[0], sys.argv[2:] or FLAGS
with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, "-m", "empo2", "train", recipe, "--run", f"{folder}/run", *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    most, at_most = 0, []
    while process.poll() is None:
        try:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            break
        sizes = [(pss(member), "own" if member.pid == process.pid else "below") for member in family]
        if sum(size for size, _ in sizes) > most:
            most, at_most = sum(size for size, _ in sizes), sizes
        time.sleep(0.3)
    if process.wait():
        sys.exit(process.returncode)
own = sum(size for size, where in at_most if where == "own")
print(f"most: {most / 1e9:.2f} GB in {len(at_most)} processes, {own / 1e9:.2f} GB of it in the training process")
