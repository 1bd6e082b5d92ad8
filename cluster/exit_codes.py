"""Exit codes of a run, for scripts and schedulers that decide what to do next."""

from everstep.trainer.rank_spec import EXIT_DONE, EXIT_STOPPED

DONE = EXIT_DONE
"""All steps are done."""
FAILED = 1
"""A rank failed; what was saved before is there."""
USAGE = 2
"""The command line or the configuration cannot be run; trying again is of no use."""
STOPPED = EXIT_STOPPED
"""Stopped on request, and saved: the same command goes on."""
INTERRUPTED = 130
"""Stopped at once by a second Ctrl-C, without saving (128 + SIGINT, as shells have it)."""

_USAGE_ERRORS = frozenset({"ConfigError"})


def of_error(type_name: str) -> int:
    """Exit code for the error that ended a run, by the name of its class."""
    return USAGE if type_name in _USAGE_ERRORS else FAILED
