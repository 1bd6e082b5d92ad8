"""Commands that are suggested to the user, ready to be pasted into a shell."""

import shlex
from pathlib import Path


def resume_command(run_dir: Path, nproc: int | None, *overrides: str) -> str:
    """Goes on with a run as it was last configured, whatever the command line was then.

    ``nproc`` is its number of ranks; None where another launcher decides that.
    """
    words = ["everstep", "train", str(run_dir / "config.yaml"), *overrides]
    words += ["--run-dir", str(run_dir)]
    return shlex.join(words if nproc is None else [*words, "--nproc", str(nproc)])
