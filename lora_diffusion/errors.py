"""The errors a user may meet, one small tree.

Every message says what happened, with the value, and what to do about it. The command line prints it as one line;
`exit_code` is 2 where the call itself was wrong (misuse) and 1 where a correct call failed.
"""

from __future__ import annotations


class LoraDiffusionError(Exception):
    """Anything this project raises on purpose."""

    exit_code = 1


class ConfigError(LoraDiffusionError):
    """A setting that cannot be used: unknown, out of range, or in conflict with another."""

    exit_code = 2


class AdapterFormatError(LoraDiffusionError):
    """A file that is not a readable adapter."""

    exit_code = 2


class AdapterMismatchError(LoraDiffusionError):
    """An adapter (or a target pattern) that does not fit the model in hand."""

    exit_code = 2


class ModelNotFoundError(LoraDiffusionError):
    """A base model that is not where it was said to be."""

    exit_code = 2


class DatasetError(LoraDiffusionError):
    """Training data that is missing or cannot be read."""

    exit_code = 2


class TrainingError(LoraDiffusionError):
    """A run that started well and cannot go on, for example because its loss is NaN."""

    exit_code = 1
