"""Trainers with a keeper, as processes that tell what they do and stop where they are to be killed.

All ranks train on the same batches, so that every number of ranks that is a power of two computes
the same bits: a run that went on with another layout is compared with one that was never
interrupted, exactly.
"""

import contextlib
import hashlib
import json
import os
import signal
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.keeper import control, segments
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.open_place import open_place
from everstep.checkpoint.stores import open_store
from everstep.checkpoint.verify import verify_packs
from tests.support.held_keeper import PROGRAM, VARIABLE
from tests.support.keepers import eventually, processes_of, users_of
from tests.support.spawn import PRELOAD

LIMIT_S = 60.0
JOB = "job"
POINTS = (
    "saving",
    "agreed",
    "unsealed",
    "copying",
    "copied",
    "half sealed",
    "sealed",
    "told",
    "ordering",
    "ordered",
    "updating",
    "posting",
)
"""Where trainers stop, in the order in which a step that is to be durable passes them."""
BEFORE_SEAL = POINTS[:6]
LOAD_POINTS = ("looked", "loading", "loaded")
"""Where they stop while they resume; the step is not looked at."""


@dataclass(frozen=True)
class Stop:
    """A rank waits at a point, the first time that it passes there with this step or a later one,
    until it is killed."""

    rank: int
    point: str
    step: int = 0


@dataclass(frozen=True, kw_only=True)
class Run:
    """What trainers do."""

    root: Path | str
    """Of the checkpoints."""
    place: Path
    """Of the keeper."""
    steps: int
    """The run ends with this one."""
    durable_every: int | None = 5
    width: int = 128
    dropout: float = 0.0
    """Above 0, only the same layout computes the same bits."""
    keep: int = 2
    stops: tuple[Stop, ...] = ()
    rate_bytes_per_s: float | None = None
    """How fast the keeper writes."""
    deadline_s: float = LIMIT_S
    """How long flushes wait for each other, and for storage that is away."""
    durable: tuple[int, ...] = ()
    """Steps that are saved with ``durable=True``."""
    pause_s: float = 0.0
    """After each step."""
    pause: Path | None = None
    """No step is begun while this file exists."""
    timeout_s: float = 30.0
    storage_options: Mapping[str, Any] | None = None


class _Log:
    """Lines of JSON, each of which is there whatever kills this process next."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def __call__(self, **told: Any) -> None:
        os.write(self._fd, (json.dumps(told) + "\n").encode())


# --- in the process of a rank ---


def reference(steps: int, dropout: float = 0.0, width: int = Run.width) -> list[str]:
    """The digest of the state after each step, of a run that nothing interrupts."""
    import torch

    torch.set_num_threads(1)
    model = _model(width, dropout)
    optimizer = _optimizer(model)
    found = []
    for step in range(steps + 1):
        _train_step(model, optimizer, step)
        found.append(_digest(model, optimizer, step + 1))
    return found


def _model(width: int, dropout: float) -> Any:
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(width, width), nn.Dropout(dropout)]
    return nn.Sequential(*layers)


def _optimizer(model: Any) -> Any:
    import torch

    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def _train_step(model: Any, optimizer: Any, batch: int) -> None:
    import torch

    generator = torch.Generator().manual_seed(batch)
    width = model[0].in_features
    model(torch.randn(4, width, generator=generator)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _digest(model: Any, optimizer: Any, batches: int) -> str:
    """Of parameters, moments, step counts and the place in the data; every rank calls it."""
    import torch
    from torch.distributed.tensor import DTensor

    found = hashlib.blake2b(str(batches).encode(), digest_size=8)
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"], state["step"]):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            found.update(whole.detach().to(torch.float32).numpy().tobytes())
    return found.hexdigest()


def _train(run: Run, rank: int, world_size: int, rendezvous: str, log_path: Path) -> None:
    """The life of a rank; runs in a process of its own."""
    with log_path.with_suffix(".out").open("ab", buffering=0) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    log = _Log(log_path)
    warnings.simplefilter("always")
    warnings.showwarning = lambda message, category, *_, **__: log(
        warning=str(message), of=category.__name__
    )
    try:
        _train_until(run, rank, world_size, rendezvous, log)
    except Exception as error:
        log(error=type(error).__name__, text=str(error))
        os._exit(1)
    os._exit(0)  # gloo's threads are of no interest any more


def _train_until(run: Run, rank: int, world_size: int, rendezvous: str, log: _Log) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    from everstep.checkpoint.checkpointer import Checkpointer
    from everstep.checkpoint.keeper.client import KeeperMemory
    from everstep.checkpoint.torch_collective import ProcessGroupCollective
    from everstep.checkpoint.torch_state import State
    from tests.support.checkpoints import Counter

    torch.set_num_threads(1)
    reach = _install(log, [(s.point, s.step) for s in run.stops if s.rank == rank])
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size
    )
    model = _model(run.width, run.dropout)
    for layer in model:
        if any(True for _ in layer.parameters()):
            fully_shard(layer)
    fully_shard(model)
    optimizer = _optimizer(model)
    data = Counter(0)
    state = State(model=model, optimizer=optimizer, data=data)
    memory = KeeperMemory(JOB, rank=rank, world_size=world_size, place=run.place)
    with Checkpointer(
        run.root,
        keep=run.keep,
        collective=ProcessGroupCollective(timeout_s=run.timeout_s),
        memory=memory,
        durable_every=run.durable_every,
        timeout_s=run.timeout_s,
        storage_options=run.storage_options,
    ) as checkpointer:
        engine = checkpointer._engine
        assert engine is not None
        engine._order_facts["deadline_s"] = run.deadline_s
        if run.rate_bytes_per_s is not None:
            engine._flush_rate = lambda _: run.rate_bytes_per_s  # type: ignore[method-assign]
        start = checkpointer.load(state, on_bytes=lambda n: reach("loading", 0))
        loaded = checkpointer.loaded
        told = {} if loaded is None else {"why": loaded.why, "path": loaded.path}
        if start:
            told["digest"] = _digest(model, optimizer, data.value)
        log(start=start, **told)
        reach("loaded", 0)
        for step in range(start, run.steps + 1):
            assert data.value == step
            _train_step(model, optimizer, step)
            data.value += 1
            handle = checkpointer.save(step, state, durable=step in run.durable or None)
            log(saved=step, skipped=handle.skipped)
            time.sleep(run.pause_s)
            while run.pause is not None and run.pause.exists():
                time.sleep(0.005)
        log(final=_digest(model, optimizer, data.value))
    log(taken=checkpointer.report().taken, skipped_steps=checkpointer.report().skipped)


def _install(log: _Log, wanted: list[tuple[str, int]]) -> Callable[[str, int], None]:
    """Have functions of the product tell where they are, and stop there where it is wanted."""
    from everstep.checkpoint.keeper.client import KeeperMemory
    from everstep.checkpoint.snapshots import agreement, board, capture, engine, flushing
    from everstep.checkpoint.snapshots.restore import Candidates

    now = {"saved": -1, "sealed": -1}

    def reach(point: str, step: int) -> None:
        if any(name == point and step >= at for name, at in wanted):
            log(at=point, step=step)
            while True:
                time.sleep(60)

    def around(
        owner: Any,
        name: str,
        step_of: Callable[..., int],
        before: str | None = None,
        after: str | None = None,
    ) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                reach(before, step_of(*args))
            result = real(*args, **kwargs)
            if after is not None:
                reach(after, step_of(*args))
            return result

        setattr(owner, name, call)

    def of_save(_: object, step: int, *__: object) -> int:
        now["saved"] = step
        return step

    real_write_seal = capture.write_seal

    def write_seal(slot: Any, part: bytes, seal: Any) -> None:
        class Stopping(np.ndarray):  # type: ignore[type-arg]
            def __setitem__(self, key: Any, value: Any) -> None:
                if key == slice(None, 8):  # the magic, which comes last
                    reach("half sealed", seal.step_id.step)
                super().__setitem__(key, value)

        real_write_seal(slot.view(Stopping), part, seal)
        now["sealed"] = seal.step_id.step
        log(sealed=seal.step_id.step)

    flushing._RETRY_S = 0.05
    capture.write_seal = write_seal
    around(engine.SnapshotEngine, "save", of_save, "saving")
    around(engine.SnapshotEngine, "_begin", lambda _, step, *__: int(step), "agreed")
    around(board, "unseal", lambda *_: now["saved"], after="unsealed")
    around(capture.HostPlan, "begin", lambda *_: now["saved"], after="copying")
    around(capture.CapturePlan, "seal", lambda _, __, step_id, *___: int(step_id.step), "copied")
    around(KeeperMemory, "sealed", lambda *_: now["sealed"], "sealed", "told")
    around(KeeperMemory, "flush", lambda *_: now["sealed"], "ordering", "ordered")
    around(engine.SnapshotEngine, "_fence", lambda *_: now["saved"], "updating")
    around(agreement.Agreement, "_exchange", lambda _, step: int(step) - 1, "posting")
    around(Candidates, "open", lambda *_: 0, "looked")
    return reach


# --- in the process of the test ---


class Trainers:
    """The processes of one attempt; a context manager, which kills what is left of them."""

    def __init__(self, run: Run, world_size: int, folder: Path) -> None:
        name = uuid.uuid4().hex[:8]
        self.run, self.world_size = run, world_size
        self._logs = [folder / f"{name}.{rank}" for rank in range(world_size)]
        context = get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        rendezvous = str(folder / f"{name}.rendezvous")
        self._processes: list[BaseProcess] = []
        for rank, log in enumerate(self._logs):
            args = (run, rank, world_size, rendezvous, log)
            process = context.Process(target=_train, args=args, daemon=True)
            process.start()
            self._processes.append(process)

    def lines(self, rank: int = 0) -> list[dict[str, Any]]:
        """What a rank has told so far."""
        path = self._logs[rank]
        whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
        return [json.loads(line) for line in whole.split("\n") if line]

    def told(self, key: str, rank: int = 0) -> list[Any]:
        """All values of one name that it has told."""
        return [line[key] for line in self.lines(rank) if key in line]

    def newest_sealed(self) -> int:
        """The newest step that all ranks have said to have sealed; -1 for none."""
        return min(max(self.told("sealed", rank), default=-1) for rank in range(self.world_size))

    def wait_stopped(self) -> list[int]:
        """Until all ranks that are to stop have; the steps at which they did."""
        ranks = sorted({stop.rank for stop in self.run.stops})
        self.wait_for(lambda: all(self.told("at", rank) for rank in ranks))
        return [line["step"] for rank in ranks for line in self.lines(rank) if "at" in line]

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Until something is true, as long as nobody fails."""

        def is_so() -> bool:
            errors = [
                line for r in range(self.world_size) for line in self.lines(r) if "error" in line
            ]
            assert not errors, errors
            return bool(condition())

        eventually(is_so, LIMIT_S)

    def wait_saved(self, step: int) -> None:
        """Until all ranks have saved a step."""
        self.wait_for(
            lambda: all(
                max(self.told("saved", rank), default=-1) >= step for rank in range(self.world_size)
            )
        )

    def kill(self, *ranks: int) -> None:
        """SIGKILL; of all ranks, if none is named."""
        for rank in ranks or range(self.world_size):
            self._processes[rank].kill()
        for rank in ranks or range(self.world_size):
            self._processes[rank].join(LIMIT_S)

    def wait_any(self) -> None:
        """Until one of them has ended."""
        assert connection.wait([p.sentinel for p in self._processes], LIMIT_S)

    def join(self) -> list[int | None]:
        """Exit codes, when all have ended."""
        for process in self._processes:
            process.join(LIMIT_S)
        return [process.exitcode for process in self._processes]

    def finish(self) -> dict[str, Any]:
        """All that rank 0 told, after all ended well; of equal names, the last."""
        codes = self.join()
        output = [log.with_suffix(".out") for log in self._logs]
        texts = [path.read_text(errors="replace")[-2000:] for path in output if path.exists()]
        lines = [self.lines(rank)[-3:] for rank in range(self.world_size)]
        assert codes == [0] * self.world_size, (codes, lines, texts)
        return {key: value for line in self.lines() for key, value in line.items()}

    def __enter__(self) -> "Trainers":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for process in self._processes:
            process.close()


class Survival:
    """One job: its directory, its keeper, one attempt after the other."""

    def __init__(
        self,
        folder: Path,
        *,
        root: Path | str | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.place = folder, folder / "place"
        self.root = root or folder / "checkpoints"
        self._storage_options = storage_options
        self._holds = folder / "holds"
        self._holds.mkdir()
        self._inodes: set[int] = set()

    def start_keeper(self, linger_s: float = 120.0) -> None:
        """A real one, with its supervisor."""
        os.environ[VARIABLE] = str(self._holds)
        control.start(
            JOB,
            place=self.place,
            budget_bytes=2**29,
            linger_s=linger_s,
            timeout_s=LIMIT_S,
            module=PROGRAM,
        )

    @contextlib.contextmanager
    def held(self, point: str) -> Iterator[Callable[..., None]]:
        """Every flush of the keeper waits at a point until this ends.

        Gives a function that waits until the flushes of some ranks are there.
        """
        (self._holds / point).touch()

        def wait_there(*ranks: int) -> None:
            paths = [self._holds / f"at {point} {rank}" for rank in ranks]
            eventually(lambda: all(path.exists() for path in paths), LIMIT_S)

        try:
            yield wait_there
        finally:
            (self._holds / point).unlink()
            for path in self._holds.glob(f"at {point} *"):
                path.unlink()

    def status(self) -> dict[str, Any]:
        """Of the keeper."""
        found = control.status(JOB, place=self.place, timeout_s=LIMIT_S)
        assert found is not None
        return found

    def keeper(self) -> int:
        """The process."""
        return int(self.status()["pid"])

    def supervisor(self) -> int:
        """The other process."""
        (found,) = set(processes_of(self.place)) - {self.keeper()}
        return found

    def kill(self, *pids: int) -> None:
        """SIGKILL, and wait until they are gone."""
        self.look_at_slots()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            eventually(lambda pid=pid: not lives(pid))  # type: ignore[misc]

    def attempt(self, world_size: int, run: Run) -> Trainers:
        """Start trainers."""
        return Trainers(run, world_size, self.folder)

    def run(self, steps: int, **changes: Any) -> Run:
        """What they do."""
        known = {"root": self.root, "place": self.place, "steps": steps}
        return Run(**{**known, "storage_options": self._storage_options, **changes})

    def directory(self) -> CheckpointDirectory:
        """Of the checkpoints."""
        return CheckpointDirectory(open_store(self.root, storage_options=self._storage_options))

    def whole_in_memory(self) -> list[StepId]:
        """Snapshots that all ranks of their generation have sealed, ascending."""
        self.look_at_slots()
        generations = self.directory().generations()
        found: dict[StepId, set[int]] = {}
        for slot in self.status()["slots"]:
            if slot["sealed"]:
                found.setdefault(StepId(slot["generation"], slot["step"]), set()).add(slot["rank"])
        return sorted(
            step_id
            for step_id, ranks in found.items()
            if len(ranks) == generations[step_id.generation].mesh["rank"]
        )

    def durable(self) -> list[int]:
        """Steps that are committed."""
        return [s.step for s in self.directory().lineage()]

    def assert_undamaged(self) -> None:
        """Every byte of what is committed is as it was written."""
        place = open_place(str(self.root), storage_options=self._storage_options)
        for step_id in place.directory.lineage():
            with place.open(step_id) as reader:
                assert not verify_packs(place.files(step_id), reader.manifest)

    def look_at_slots(self) -> None:
        """Remember the memory of the keeper, to look for it when everything has ended."""
        with contextlib.suppress(OSError):
            for fd in Path(f"/proc/{self.keeper()}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if segments.NAME in os.readlink(fd):
                        self._inodes.add(fd.stat().st_ino)

    def stop_keeper(self) -> None:
        """As ``everstep keeper stop``; nothing is left of it then."""
        self.look_at_slots()
        assert control.stop(JOB, place=self.place, timeout_s=LIMIT_S)
        self.assert_nothing_left()

    def assert_nothing_left(self) -> None:
        """No process, no memory, no socket, no lock, no file but the log."""
        eventually(lambda: not list(processes_of(self.place)))
        assert self._inodes, "there never was any memory"
        assert not users_of(self._inodes)
        assert str(self.place) not in Path("/proc/net/unix").read_text()
        held = {
            line.split()[5].rpartition(":")[2]
            for line in Path("/proc/locks").read_text().splitlines()
        }
        locks = [self.place / JOB / "lock"]
        if isinstance(self.root, Path):
            locks += [path for path in self.root.iterdir() if path.is_file()]
        assert not held & {str(path.stat().st_ino) for path in locks}
        left = sorted(path.name for path in (self.place / JOB).iterdir())
        assert left == ["keeper.log", "lock"], left

    def __enter__(self) -> "Survival":
        return self

    def __exit__(self, *_: object) -> None:
        while left := list(processes_of(self.place)):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def survival(folder: Path, **kwargs: Any) -> Iterator[Survival]:
    """A job with a running keeper; whatever is left of it afterwards is killed."""
    with Survival(folder, **kwargs) as job:
        job.start_keeper()
        yield job


def lives(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
