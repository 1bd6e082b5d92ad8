"""The examples do what they say: killed and run again, they end as if nothing had happened."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.compare import compare_steps
from everstep.checkpoint.keeper import control
from tests.support import cli

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = (
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node=2",
    "--max-restarts=3",
    "--monitor-interval=0.1",
)
JOB = "example"


@pytest.fixture
def runtime() -> Iterator[Path]:
    """A short path, as sockets need, for the keepers of a test; none is left afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="everstep-", dir="/tmp"))
    yield folder
    with contextlib.suppress(FileNotFoundError):
        control.stop(JOB, place=folder / "everstep", now=True)
    shutil.rmtree(folder)


class Example:
    """One run of an example, with its output in a file."""

    def __init__(
        self, name: str, folder: Path, *options: str, ranks: int = 1, runtime: Path | None = None
    ) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.log = folder / f"log-{len(list(folder.iterdir()))}"
        paths = [str(ROOT), os.environ.get("PYTHONPATH")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            # else a restarted group may meet the addresses of the one before, and wait for it
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            **({"XDG_RUNTIME_DIR": str(runtime)} if runtime else {}),
        }
        launcher = TORCHRUN if ranks > 1 else ()
        keeper = ("--keeper-job", JOB) if runtime else ()
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, *launcher, str(ROOT / "examples" / f"{name}.py")),
                    *("--directory", "checkpoints", *options, *keeper),
                ],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, pattern: str, timeout_s: float = 150) -> None:
        found = cli.wait_until(
            lambda: re.search(pattern, self.output) is not None or self.process.poll() is not None,
            timeout_s,
        )
        assert found, self.output
        assert re.search(pattern, self.output), self.output

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]

    def finish(self) -> str:
        assert self.process.wait(200) == 0, self.output
        return self.output

    def __enter__(self) -> "Example":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            workers = self.workers() if self.process.poll() is None else []
            for pid in [*workers, self.process.pid]:
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def assert_same_end(one: Path, other: Path, step: int) -> None:
    """Every bit of model, optimizer, torch's generators and objects of a step is the same."""
    directories = [CheckpointDirectory(folder / "checkpoints") for folder in (one, other)]
    found = [directory.find(step) for directory in directories]
    assert None not in found
    readers = [d.reader(f) for d, f in zip(directories, found, strict=True) if f is not None]
    with readers[0] as first, readers[1] as second:
        names = first.manifest.tensors.keys() | second.manifest.tensors.keys()
        seeded = [name for name in names if not name.endswith((".python", ".numpy"))]
        result = compare_steps(first, second, names=seeded)
    assert result.equal, [t for t in result.tensors if not t.equal]


def last_loss(output: str) -> str:
    return output[output.rindex("loss") :].splitlines()[0]


@pytest.mark.chaos
@pytest.mark.timeout(300)
def test_own_loop_killed_and_run_again_ends_as_if_it_was_not(tmp_path: Path) -> None:
    with Example("own_loop", tmp_path / "whole", "--steps", "400") as whole:
        expected = whole.finish()
    with Example("own_loop", tmp_path / "twice", "--steps", "400") as killed:
        assert cli.wait_until(
            lambda: bool([*(tmp_path / "twice").glob("checkpoints/step-*/manifest.json")]), 60
        ), killed.output
    with Example("own_loop", tmp_path / "twice", "--steps", "400") as again:
        resumed = again.finish()
    assert "starting at step 0" in expected
    assert "starting at step 0" not in resumed
    assert last_loss(resumed) == last_loss(expected)
    assert_same_end(tmp_path / "whole", tmp_path / "twice", 399)


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("name", "ranks"), [("own_loop", 1), ("ddp_loop", 2), ("fsdp2_loop", 2)])
def test_with_a_keeper_at_most_the_last_step_is_redone(
    name: str, ranks: int, tmp_path: Path, runtime: Path
) -> None:
    """Under torchrun, that is: workers are killed, and started again by torchrun itself."""
    with Example(name, tmp_path / "whole", ranks=ranks) as whole:
        expected = whole.finish()
    assert control.start(JOB, place=runtime / "everstep", linger_s=60)
    with Example(name, tmp_path / "twice", ranks=ranks, runtime=runtime) as killed:
        killed.wait_for(r"step 79:")
        for pid in killed.workers() or [killed.process.pid]:
            os.kill(pid, signal.SIGKILL)
        if ranks > 1:
            resumed = killed.finish()
    if ranks == 1:
        with Example(name, tmp_path / "twice", runtime=runtime) as again:
            resumed = again.finish()
    starts = [int(step) for step in re.findall(r"starting at step (\d+)", resumed)]
    assert starts[-1] >= 79
    assert last_loss(resumed) == last_loss(expected)
    assert_same_end(tmp_path / "whole", tmp_path / "twice", 199)


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(400)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_trainer_of_transformers_goes_on_at_the_exact_sample(
    ranks: int, tmp_path: Path, runtime: Path
) -> None:
    with Example("hf_trainer", tmp_path / "whole", ranks=ranks) as whole:
        expected = whole.finish()
    assert control.start(JOB, place=runtime / "everstep", linger_s=60)
    with Example("hf_trainer", tmp_path / "twice", ranks=ranks, runtime=runtime) as killed:
        killed.wait_for(r"(?s)'loss'.*'loss'.*'loss'")
        for pid in killed.workers() or [killed.process.pid]:
            os.kill(pid, signal.SIGKILL)
        if ranks > 1:
            resumed = killed.finish()
    if ranks == 1:
        with Example("hf_trainer", tmp_path / "twice", runtime=runtime) as again:
            resumed = again.finish()
    losses = [re.findall(r"'loss': '[^']*'", output) for output in (expected, resumed)]
    assert losses[1][-1] == losses[0][-1]
    assert len(losses[1]) < 2 * len(losses[0])
    assert_same_end(tmp_path / "whole", tmp_path / "twice", 59)
