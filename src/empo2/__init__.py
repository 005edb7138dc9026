"""EMPO²: LLM agents that explore, remember with tips, and need no memory once trained.

The pipeline, in order (each name is a module):

    modes → collect (sampler × envs, memory) → novelty → advantages → sequences → losses, learner → memory, novelty

`train` composes it into the loop. Importing this package loads nothing heavy.
"""

__version__ = "0.1.0"
