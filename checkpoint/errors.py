"""Errors that everstep raises on purpose.

Every message is one sentence for a person: what was found, what was expected, the way out.
All facts are kept in ``args``, so that an error survives pickling between processes.
"""


class EverstepError(Exception):
    """Base of every deliberate error; the command line prints its message without a traceback."""


class CheckpointError(EverstepError):
    """Base of everything that can go wrong with a checkpoint."""
