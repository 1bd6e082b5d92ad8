"""Python processes in which this package cannot be imported: what a stranger's program sees."""

import os
import subprocess
import sys
from pathlib import Path

_BLOCKED = """
import sys

class _Blocked:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "everstep":
            raise ImportError(f"{name} is not to be had here")

sys.meta_path.insert(0, _Blocked)
try:
    import everstep
except ImportError:
    pass
else:
    raise SystemExit("everstep can be imported")
"""


def run_foreign(code: str, folder: Path, timeout_s: float = 60) -> str:
    """Run a program in a folder, without everstep; its output. A failure shows all of it."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-I", "-c", _BLOCKED + code],
        cwd=folder,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout_s,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
