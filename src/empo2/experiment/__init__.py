"""Experiments: arms × tasks × seeds of `empo2 train`, each a cell in a process of its own, and their report.

plan (the file → cells, refused where arms cannot be compared) → cells (run them: `run`) → gather (run folders → the
results folder: `report`). Everything can be killed at any moment and called again.
"""

from empo2.experiment.cells import run
from empo2.experiment.gather import report
from empo2.experiment.plan import Cell, Experiment, load

__all__ = ["Cell", "Experiment", "load", "report", "run"]
