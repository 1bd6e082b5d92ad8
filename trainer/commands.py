"""Commands that are suggested to the user, ready to be pasted into a shell."""

import shlex
from collections.abc import Sequence
from pathlib import Path

RESUBMIT_VARIABLE = "EVERSTEP_RESUBMIT"
"""Set for a run that was submitted to a cluster: the command that did it."""


def resume_command(
    run_dir: Path,
    nproc: int | None,
    *overrides: str,
    launch: Sequence[str] = (),
    submitted: str | None = None,
) -> str:
    """Goes on with a run as it was last configured, whatever the command line was then.

    ``nproc`` is its number of ranks; None where another launcher decides that. ``launch`` are
    options such as ``--launcher`` that were given, and are to be given again. ``submitted`` is the
    value of RESUBMIT_VARIABLE: a run that was submitted to a cluster is submitted again.
    """
    if submitted:
        changed = {override.partition("=")[0] for override in overrides}
        words = [word for word in shlex.split(submitted) if word.partition("=")[0] not in changed]
        return shlex.join([*words, *overrides])
    words = ["everstep", "train", str(run_dir / "config.yaml"), *overrides]
    words += ["--run-dir", str(run_dir), *launch]
    return shlex.join(words if nproc is None else [*words, "--nproc", str(nproc)])
