"""A launcher as a process of its own, for tests that send signals to it and look what is left.

Run as a program it is that launcher: ``python -m tests.support.launched WORKER RUN_DIR RANKS
GRACE_S RESTARTS local|external``.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 40.0
_TAG = "EVERSTEP_TEST_TAG"


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Poll until something is true; fails after a deadline."""
    deadline_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited for {LIMIT_S} s: {what}"
        time.sleep(0.01)


class Launched:
    """A launcher of fake workers, in a process group of its own; a context manager.

    At exit everything that carries its mark is killed.
    """

    def __init__(
        self,
        worker: str,
        run_dir: Path,
        *,
        ranks: int = 2,
        grace_s: float = 30.0,
        restarts: int = 0,
        kind: str = "local",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._tag = uuid.uuid4().hex
        self._output = run_dir.parent / f"{self._tag}.out"
        self._errors = run_dir.parent / f"{self._tag}.err"
        arguments = [worker, str(run_dir), str(ranks), str(grace_s), str(restarts), kind]
        with self._output.open("wb") as output, self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.launched", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                cwd=ROOT,
                env={
                    **os.environ,
                    "PYTHONPATH": str(ROOT),
                    "COLUMNS": "100",
                    _TAG: self._tag,
                    **(environment or {}),
                },
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """Standard output so far."""
        return self._output.read_text(encoding="utf-8")

    @property
    def errors(self) -> str:
        """Standard error so far."""
        return self._errors.read_text(encoding="utf-8")

    def wait_for_output(self, text: str) -> None:
        """Wait until ``text`` was printed."""
        wait_for(lambda: text in self.output, f"{text!r} in {self.output!r}, {self.errors!r}")

    def interrupt_group(self) -> None:
        """What a terminal does on Ctrl-C: SIGINT to the whole foreground process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def wait(self) -> int:
        """Exit code."""
        return self.process.wait(LIMIT_S)

    def alive(self) -> list[str]:
        """Command lines of processes that this launcher or its descendants left running."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z" and self._tag.encode() in (entry / "environ").read_bytes():
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                    found.append(f"{entry.name}: {command.decode(errors='replace')}")
        return found

    def assert_nothing_left(self) -> None:
        """Every process is gone, at the latest a moment after the launcher."""
        wait_for(lambda: not self.alive(), f"still there: {self.alive()}")

    def __enter__(self) -> "Launched":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for line in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(line.partition(":")[0]), signal.SIGKILL)
        self.process.wait(LIMIT_S)


def _main() -> int:
    from rich.console import Console

    from everstep.cluster.external import run_external
    from everstep.cluster.run import run_local
    from everstep.trainer.config import CheckpointConfig, LaunchConfig, RunConfig, TrainConfig

    worker, run_dir, ranks, grace_s, restarts, kind = sys.argv[1:]
    config = RunConfig(
        name="fake",
        train=TrainConfig(steps=20, grace_s=float(grace_s)),
        launch=LaunchConfig(max_restarts=int(restarts)),
        checkpoint=CheckpointConfig(memory=None),
    )
    target = f"tests.support.fake_workers:{worker}"
    if kind == "external":
        return run_external(config, Path(run_dir), "auto", Console(), target=target)
    return run_local(
        config,
        Path(run_dir),
        "auto",
        int(ranks),
        Console(),
        target=target,
        preload=[],
        store=False,
    )


if __name__ == "__main__":
    sys.exit(_main())
