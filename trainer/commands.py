"""Commands that are suggested to the user, ready to be pasted into a shell."""

import shlex
from collections.abc import Sequence
from pathlib import Path


def resume_command(
    run_dir: Path, nproc: int | None, *overrides: str, launch: Sequence[str] = ()
) -> str:
    """Goes on with a run as it was last configured, whatever the command line was then.

    ``nproc`` is its number of ranks; None where another launcher decides that. ``launch`` are
    options such as ``--launcher`` that were given, and are to be given again.
    """
    words = ["everstep", "train", str(run_dir / "config.yaml"), *overrides]
    words += ["--run-dir", str(run_dir), *launch]
    return shlex.join(words if nproc is None else [*words, "--nproc", str(nproc)])
