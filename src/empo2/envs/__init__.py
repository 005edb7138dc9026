"""Environments: the contract (base), worker processes (pool), the built-in ones, and what makes one of your own."""

from empo2.envs.base import Suite, replayed, suite
from empo2.envs.simple import SimpleSuite
from empo2.types import Task, WorkedExample

__all__ = ["SimpleSuite", "Suite", "Task", "WorkedExample", "replayed", "suite"]
