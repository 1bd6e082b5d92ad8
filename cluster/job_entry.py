"""First thing that a job runs on the cluster: staged as a file, it needs nothing but Python.

``python job_entry.py VERSION everstep-arguments...`` sees that what training needs can be imported,
runs ``everstep`` with the arguments, hands signals on to it, and ends the log with a line that
tells the exit code, because Ray keeps none of a job that it was asked to stop.

This file is read by whatever Python the cluster has, hence the cautious syntax and no imports of
everstep.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import FrameType

NEEDED = ("everstep", "torch", "ray")
END = "everstep job ended with exit code"
OLDEST_PYTHON = (3, 11)


def missing(found: Callable[[str], object] = importlib.util.find_spec) -> str | None:
    """What is wrong with this Python, in one sentence; None where nothing is."""
    if sys.version_info < OLDEST_PYTHON:
        return "error: the job's Python is {} ({}), and everstep needs {} or newer: {}".format(
            sys.version.split()[0],
            sys.executable,
            ".".join(map(str, OLDEST_PYTHON)),
            "choose another one with --python",
        )
    absent = [name for name in NEEDED if found(name) is None]
    if not absent:
        return None
    names = " and ".join(filter(None, [", ".join(absent[:-1]), absent[-1]]))
    return (
        "error: {} cannot be imported by the job's Python on the cluster ({}): install {} on every "
        "node (in the image), add it to the job's runtime env with --pip, or choose another Python "
        "with --python".format(names, sys.executable, "it" if len(absent) == 1 else "them")
    )


def version_note(submitted: str) -> str | None:
    """A line for a cluster that has another version than the one that submits; None if the same."""
    try:
        here = importlib.metadata.version("everstep")
    except importlib.metadata.PackageNotFoundError:
        return None  # a source tree on the path
    if here == submitted:
        return None
    return f"note: this cluster has everstep {here}; the job was submitted with {submitted}"


def main(argv: Sequence[str]) -> int:
    """Run the job; returns its exit code."""
    submitted, arguments = argv[0], argv[1:]
    sys.path.append(os.getcwd())  # as `-m` will have it: everstep itself may have come along
    problem = missing()
    if problem is not None:
        print(problem, flush=True)
        return 1
    note = version_note(submitted)
    if note is not None:
        print(note, flush=True)
    # Ray blocks SIGINT in all its processes, and children inherit that.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    child = subprocess.Popen([sys.executable, "-m", "everstep", *arguments])

    def hand_on(signum: int, frame: FrameType | None) -> None:
        if child.poll() is None:
            child.send_signal(signum)

    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, hand_on)
    code = child.wait()
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    print(f"{END} {exit_code}", flush=True)
    sys.exit(exit_code)
