"""The everstep command line as a user runs it: real processes, deadlines, no leftovers."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from everstep.cli import main

DEADLINE_S = 100.0
_MARK = "EVERSTEP_TEST_MARK"


class Command:
    """One run of ``python -m everstep``, in a process group of its own."""

    def __init__(
        self,
        args: Sequence[str],
        cwd: Path,
        launcher: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self._mark = uuid.uuid4().hex
        front = [*launcher] if launcher else [sys.executable]
        if args[0] == "train" and not launcher and not {"--launcher", "--address"} & {*args}:
            args = [*args, "--launcher", "local"]  # Ray, where a test does not ask for it, is slow
        environment = {k: v for k, v in os.environ.items() if k not in _RANK_VARIABLES}
        environment |= {_MARK: self._mark, "COLUMNS": "100", "PYTHONUNBUFFERED": "1"}
        environment |= variables or {}
        root = str(Path(__file__).resolve().parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(cwd), root, os.environ.get("PYTHONPATH")])
        )
        self.output_file = cwd / f"output-{self._mark[:8]}.txt"
        with self.output_file.open("wb") as out:
            self.process = subprocess.Popen(
                [*front, "-m", "everstep", *args],
                cwd=cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, timeout_s: float = DEADLINE_S) -> int:
        """Exit code; kills everything and fails when it takes too long."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise AssertionError(f"still running after {timeout_s} s:\n{self.output}") from None

    @property
    def output(self) -> str:
        """What the user saw, both streams."""
        return self.output_file.read_text(errors="replace")

    def interrupt(self) -> None:
        """Ctrl-C, as a terminal sends it: to the whole foreground process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def alive(self) -> list[int]:
        """Every living process that this command started, itself included."""
        return [
            pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._ours(pid)
        ]

    def kill_all(self) -> None:
        """SIGKILL to the command and all that it started, at one moment, as a node dies.

        All are stopped first: else a keeper would still make durable what the killed trainers left.
        """
        stopped: set[int] = set()
        while left := {*self.alive()} - stopped:
            self._signal(left, signal.SIGSTOP)
            stopped |= left
        self._signal(stopped, signal.SIGKILL)
        self.process.wait()

    @staticmethod
    def _signal(pids: Iterable[int], number: signal.Signals) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def assert_nothing_left(self, within_s: float = 40.0) -> None:
        """No process of it may be left, at the latest after a moment."""
        if not wait_until(lambda: not self.alive(), within_s):
            raise AssertionError(f"left behind: {self.alive()}\n{self.output}")

    def _ours(self, pid: int) -> bool:
        try:
            if f"{_MARK}={self._mark}".encode() not in Path(f"/proc/{pid}/environ").read_bytes():
                return False
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False


@contextmanager
def command(
    *args: str,
    cwd: Path,
    launcher: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
) -> Iterator[Command]:
    """Start the command line; whatever happens, nothing of it runs on afterwards."""
    started = Command(args, cwd, launcher, variables)
    try:
        yield started
    finally:
        started.kill_all()


def run(
    *args: str,
    cwd: Path,
    timeout_s: float = DEADLINE_S,
    variables: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    """Exit code and output of a command that ends by itself and leaves nothing behind."""
    with command(*args, cwd=cwd, variables=variables) as started:
        code = started.wait(timeout_s)
        started.assert_nothing_left()
        return code, started.output


def exit_code(*arguments: object) -> int:
    """That of ``everstep ARGUMENTS``, run in this process."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def wait_until(condition: Callable[[], bool], timeout_s: float = DEADLINE_S) -> bool:
    """Poll a condition; False when it did not become true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` that are complete."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(x) for x in path.read_text().splitlines(keepends=True) if x.endswith("\n")]


def losses(run_dir: Path) -> dict[int, float]:
    """Loss by step; a step that is there twice is an error."""
    lines = metrics(run_dir)
    found = {line["step"]: line["loss"] for line in lines}
    assert len(found) == len(lines), "a step appears twice in metrics.jsonl"
    return found


def committed_steps(run_dir: Path) -> list[int]:
    """Steps whose manifest is there, ascending."""
    return sorted(
        int(p.parent.name.split("-")[1]) for p in run_dir.glob("checkpoints/step-*/manifest.json")
    )


def final_bytes(run_dir: Path) -> dict[str, bytes]:
    """For each writer of the newest checkpoint, the bytes of its pack."""
    step = committed_steps(run_dir)[-1]
    (folder,) = run_dir.glob(f"checkpoints/step-{step:08d}-*")
    return {p.name.rpartition("-")[0]: p.read_bytes() for p in folder.glob("rank-*.safetensors")}


_RANK_VARIABLES = {
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID",
}  # fmt: skip
