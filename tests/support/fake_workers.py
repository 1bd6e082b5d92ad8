"""Ranks without torch, for tests of the launcher: each does one thing that real ranks do.

Chosen by name: ``everstep``'s drivers run "tests.support.fake_workers:NAME".
"""

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

from everstep.trainer.errors import ConfigError, DataError
from everstep.trainer.rank_spec import RankSpec, Reporter, StopRequested

STEP_S = 0.02
LONG_S = 60.0


def train(spec: RankSpec, report: Reporter, should_stop: StopRequested) -> int:
    """20 steps; stops when asked, and saves then."""
    return _train(spec, report, should_stop, steps=20)


def train_long(spec: RankSpec, report: Reporter, should_stop: StopRequested) -> int:
    """More steps than any test waits for."""
    return _train(spec, report, should_stop, steps=int(LONG_S / STEP_S))


def _train(spec: RankSpec, report: Reporter, should_stop: StopRequested, steps: int) -> int:
    if spec.rank == 0:
        report({"kind": "message", "text": "corpus: 12 documents"})
    for step in range(1, steps + 1):
        time.sleep(STEP_S)
        if spec.rank == 0:
            report(_step(step, steps))
        if should_stop():
            if spec.rank == 0:
                report(_saved(step))
            report({"kind": "stopped", "step": step})
            return 75
    if spec.rank == 0:
        report({"kind": "eval", "step": steps, "loss": 1.5})
        report(_saved(steps))
        report({"kind": "summary", "lines": ["what was trained", "what to try next"]})
    report({"kind": "done", "step": steps})
    return 0


def _step(step: int, steps: int) -> dict[str, object]:
    return {
        "kind": "step",
        "step": step,
        "steps": steps,
        "loss": 5.0 / step,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "tokens_per_s": 12345.6,
        "step_time_s": STEP_S,
    }


def _saved(step: int) -> dict[str, object]:
    return {"kind": "saved", "step": step, "path": "checkpoints/x", "bytes": 10**6, "seconds": 0.1}


def describe(spec: RankSpec, report: Reporter, should_stop: StopRequested) -> int:
    """Say what this process sees of its place."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")
    report(
        {
            "kind": "seen",
            "environment": {name: os.environ.get(name) for name in names},
            "spec_rank": spec.rank,
            "store": spec.store,
            "torch": "torch" in sys.modules,
            "sigint_ignored": signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
        }
    )
    print(f"printed by rank {spec.rank}")
    return 0


def big_reports(spec: RankSpec, report: Reporter, should_stop: StopRequested) -> int:
    """Numbered reports that are larger than a socket's buffer together."""
    for number in range(40):
        report({"kind": "big", "number": number, "padding": "x" * 50_000})
    return 0


def return_3(spec: RankSpec, report: Reporter, should_stop: StopRequested) -> int:
    """End with a code that means nothing to the launcher."""
    return 3


def exit_3(spec: RankSpec, report: Reporter, should_stop: StopRequested) -> int:
    """End without a word."""
    os._exit(3)


def call_sys_exit(spec: RankSpec, report: Reporter, should_stop: StopRequested) -> int:
    """End the way a library must not."""
    sys.exit(0)


def rank_1_raises(spec: RankSpec, report: Reporter, should_stop: StopRequested) -> int:
    """Rank 1 has a bug; the others wait for it, as in a collective."""
    if spec.rank == 1:
        raise ValueError("boom\nand more about it")
    return _block(should_stop)


def all_raise(spec: RankSpec, report: Reporter, should_stop: StopRequested) -> int:
    """All ranks notice the same thing."""
    raise DataError("no file matches texts/*.txt: give data.source files that exist")


def config_error(spec: RankSpec, report: Reporter, should_stop: StopRequested) -> int:
    """The configuration turns out to be wrong in the ranks only."""
    raise ConfigError("model.factory='x:y' cannot be imported")


def rank_1_killed(spec: RankSpec, report: Reporter, should_stop: StopRequested) -> int:
    """Rank 1 is killed; the others notice a lost connection first."""
    if spec.rank == 1:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]")


def dies_once(spec: RankSpec, report: Reporter, should_stop: StopRequested) -> int:
    """Rank 1 dies in the first attempt, while the others wait; later attempts train.

    A driver in memory takes the report "dies" for the death.
    """
    report({"kind": "seen", "attempt": spec.attempt, "resume": spec.resume})
    if spec.attempt:
        return train(spec, report, should_stop)
    if spec.rank == 0:
        report(_step(1, 20))
        report(_saved(1))
    if spec.rank == 1:
        time.sleep(0.2)
        report({"kind": "dies"})
        child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({LONG_S})"])
        Path(spec.run_dir, "child").write_text(str(child.pid))
        os.kill(os.getpid(), signal.SIGKILL)
    return _block(should_stop)


def dies_always(spec: RankSpec, report: Reporter, should_stop: StopRequested) -> int:
    """Rank 1 dies in every attempt; the others wait."""
    if spec.rank == 1:
        report({"kind": "dies"})
    return _block(should_stop)


def hang_at_stop(spec: RankSpec, report: Reporter, should_stop: StopRequested) -> int:
    """Never stops, whoever asks."""
    if spec.rank == 0:
        report(_step(1, 100))
    return _block(should_stop)


def noisy(spec: RankSpec, report: Reporter, should_stop: StopRequested) -> int:
    """Warnings, equal lines, lines of one rank, and a trace that is printed by hand."""
    warnings.warn("old function", DeprecationWarning, stacklevel=1)
    warnings.simplefilter("always")
    for _ in range(3):
        warnings.warn("something odd", UserWarning, stacklevel=1)
    print("the same everywhere")
    if spec.rank == 1:
        print("only here", flush=True)
    try:
        raise KeyError("inner")
    except KeyError:
        sys.excepthook(*sys.exc_info())
    return 0


def with_child(spec: RankSpec, report: Reporter, should_stop: StopRequested) -> int:
    """Starts a process of its own that nobody ends, then hangs."""
    child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({LONG_S})"])
    report({"kind": "child", "pid": child.pid})
    Path(spec.run_dir, f"child-{spec.rank}").write_text(str(child.pid))
    return _block(should_stop)


def _block(should_stop: StopRequested) -> int:
    deadline_s = time.monotonic() + LONG_S
    while time.monotonic() < deadline_s:
        should_stop()  # a driver in memory ends its ranks here
        time.sleep(0.01)
    return 0
