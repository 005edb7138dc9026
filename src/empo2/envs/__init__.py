"""Environments: the contract (base), worker processes (pool), and the built-in ones."""

from empo2.envs.base import Suite, suite

__all__ = ["Suite", "suite"]
