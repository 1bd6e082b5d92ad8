"""Another user of the host, or somebody on the network, gets no byte of a snapshot."""

import contextlib
import ctypes
import encodings.idna  # noqa: F401 - what another user cannot import any more
import errno
import json
import os
import select
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from everstep.checkpoint.errors import KeeperError
from everstep.checkpoint.keeper import control
from everstep.checkpoint.keeper.client import KeeperMemory
from everstep.checkpoint.keeper.remote_slots import RemoteSlots
from everstep.checkpoint.kernels import crc32c
from tests.support.keepers import SLOT_BYTES, holds, processes_of, seal
from tests.support.kills import in_process

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(60),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user"),
]
JOB, NOBODY = "job", 65534
_PIDFD_GETFD = 438  # the same on all architectures
_PTRACE_ATTACH = 16


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Every user can look into it, unlike the folders of pytest."""
    folder = Path(tempfile.mkdtemp(prefix="everstep-test-"))
    folder.chmod(0o777)
    yield folder
    while left := list(processes_of(folder / "place")):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
    shutil.rmtree(folder)


def _try(attempt: Callable[[], Any]) -> str:
    """The name of the error, or what came of it."""
    try:
        return f"got {attempt()!r}"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, type(error).__name__)
    except KeeperError:
        return "KeeperError"


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result


def _talk(address: str) -> int:
    """How many bytes somebody gets who knows no token, whatever is sent."""
    host, _, port = address.rpartition(":")
    found = 0
    for sent in (b"", bytes(64), b"GET / HTTP/1.0\r\n\r\n" * 10):
        with socket.create_connection((host, int(port)), 5) as connection:
            received = b""
            with contextlib.suppress(OSError):  # turned away while it still talks
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                while data := connection.recv(2**16):
                    received += data
        found = max(found, len(received))
    return found


def _connect(path: Path) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        with contextlib.suppress(BrokenPipeError):
            connection.sendall(b'evk1\x1c\x00\x00\x00\x00{"id": 1, "do": "holdings"}  ')
        assert select.select([connection], [], [], 10)[0]
        try:
            return connection.recv(100)
        except ConnectionResetError:
            return b""


def _be_a_stranger(place: Path, pids: list[int], address: str, report: Path) -> None:
    """Try whatever another user can try; runs in a process of its own."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    libc = ctypes.CDLL(None, use_errno=True)
    folder = place / JOB
    found = {
        "list": _try(lambda: os.listdir(folder)),
        "token": _try((folder / "token").read_bytes),
        "log": _try((folder / "keeper.log").read_bytes),
        "socket": _try(lambda: _connect(folder / "keeper.sock")),
        "network": _try(lambda: _talk(address)),
        "wrong token": _try(lambda: RemoteSlots(address, bytes(32), timeout_s=5).holdings()),
    }
    for pid in pids:
        proc = Path(f"/proc/{pid}")
        pidfd = os.pidfd_open(pid)
        for name in ("mem", "maps", "environ"):
            found[f"{name} {pid}"] = _try((proc / name).read_bytes)
        for name in ("fd", "map_files"):
            found[f"{name} {pid}"] = _try(lambda path=proc / name: os.listdir(path))  # type: ignore[misc]
        for fd in range(64):
            found[f"fd {pid} {fd}"] = _try((proc / "fd" / str(fd)).read_bytes)
            found[f"getfd {pid} {fd}"] = _try(
                lambda pidfd=pidfd, fd=fd: _checked(  # type: ignore[misc]
                    libc.syscall(_PIDFD_GETFD, pidfd, fd, 0)
                )
            )
        found[f"ptrace {pid}"] = _try(
            lambda pid=pid: _checked(libc.ptrace(_PTRACE_ATTACH, pid, 0, 0))  # type: ignore[misc]
        )
        found[f"kill {pid}"] = _try(lambda pid=pid: os.kill(pid, 9))  # type: ignore[misc]
    report.write_text(json.dumps(found))


def test_strangers_get_nothing(open_folder: Path) -> None:
    place = open_folder / "place"
    control.start(JOB, place=place, budget_bytes=2**28, interface="lo")
    memory = KeeperMemory(JOB, rank=0, world_size=1, place=place)
    step_id = seal(memory.reserve(SLOT_BYTES, 2)[0], 3)
    address = memory.address()
    assert address is not None
    pids = list(processes_of(place))
    assert len(pids) == 2

    def ask_a_stranger() -> dict[str, str]:
        report = open_folder / "report"
        report.unlink(missing_ok=True)
        assert in_process(_be_a_stranger, place, pids, address, report) == 0
        found: dict[str, str] = json.loads(report.read_text())
        return found

    found = ask_a_stranger()
    assert found.pop("network") == "got 32"  # random bytes, for the proof of who knows the token
    assert found.pop("wrong token") == "KeeperError"
    assert len(found) > 2 * (64 + 64)
    assert {k: v for k, v in found.items() if v not in ("EACCES", "EPERM")} == {}

    # somebody has opened the directory for everybody: the keeper looks who connects
    for path in (place, place / JOB, place / JOB / "keeper.sock"):
        path.chmod(0o777)
    found = ask_a_stranger()
    assert found["socket"] == "got b''"
    assert found["token"] == found["log"] == "EACCES"

    with contextlib.closing(RemoteSlots(address, memory.token())) as remote:
        ((told, part),) = remote.holdings()
    assert (told.step_id, crc32c(part)) == (step_id, told.part_crc32c)
    assert holds(memory.reserve(SLOT_BYTES, 2)[0], 3)
    for path in (place, place / JOB):
        path.chmod(0o700)
    memory.close()
    assert control.stop(JOB, place=place)
