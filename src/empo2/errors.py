"""Every exception that empo2 raises on purpose.

Empo2Error
├── UsageError            what the user asked for is impossible; the command line prints it and exits with 2
│   ├── ConfigError       a recipe's key or value
│   └── MissingPart       a model, a package or a runtime that is not there; the text names the command that brings it
├── EnvironmentCrashed    an environment died or hung (the pool replaces it and replays the episode)
├── EpisodeDiverged       the replay in a fresh environment differs from the record (the episode is run again)
├── CheckpointError       a checkpoint is incomplete or its checksums do not fit
└── TrainingDiverged      NaN or infinity in three updates in a row, in the weights, or in what is sampled from
"""


class Empo2Error(Exception):
    """Base of all errors that empo2 raises on purpose."""


class UsageError(Empo2Error):
    """What the user asked for is impossible. One sentence: the value, the rule, the remedy."""


class ConfigError(UsageError):
    """A key or value of a recipe breaks a rule."""


class MissingPart(UsageError):
    """A model file, package or runtime is missing; the text names the command that brings it."""


class EnvironmentCrashed(Empo2Error):
    """An environment process died, or a call outran its time limit."""


class EpisodeDiverged(Empo2Error):
    """Recorded actions, replayed in a fresh environment, gave other observations."""


class CheckpointError(Empo2Error):
    """A checkpoint is incomplete or damaged."""


class TrainingDiverged(Empo2Error):
    """NaN or infinity in three updates in a row, in the weights, or in the logits that are sampled from."""
