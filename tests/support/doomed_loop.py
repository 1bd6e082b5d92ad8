"""An example whose ranks are killed: ``torchrun ... -m tests.support.doomed_loop DEATHS SCRIPT``.

DEATHS is ``RANK@STEP,...``: the first before torchrun has started the workers again, the second
after it has done so once, and so on. A rank is killed when it is to save that step.
"""

import os
import runpy
import signal
import sys
from typing import Any

from everstep.checkpoint.checkpointer import Checkpointer


def main(deaths: str, script: str) -> None:
    """Run the script; its arguments follow."""
    restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    planned = [tuple(map(int, death.split("@"))) for death in deaths.split(",") if death]
    mine = planned[restarts] if restarts < len(planned) else None
    save = Checkpointer.save

    def doomed_save(self: Any, step: int, *args: Any, **kwargs: Any) -> Any:
        if (int(os.environ["RANK"]), step) == mine:
            os.kill(os.getpid(), signal.SIGKILL)
        return save(self, step, *args, **kwargs)

    Checkpointer.save = doomed_save  # type: ignore[method-assign]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    deaths, script, *rest = sys.argv[1:]
    sys.argv = [script, *rest]
    main(deaths, script)
