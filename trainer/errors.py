"""Errors of the trainer; see ``everstep.checkpoint.errors`` for the rules that they follow."""

from everstep.checkpoint.errors import EverstepError


class ConfigError(EverstepError):
    """The configuration cannot be run: unknown key, bad value, mesh that does not fit."""


class DataError(EverstepError):
    """The training data is missing, unreadable, too small, or not what the run began with."""
