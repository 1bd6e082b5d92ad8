"""The processes of a keeper: ``python -m everstep.checkpoint.keeper.main``.

Started by ``control.start``, as a supervisor, which starts the keeper as a second process.
"""

import argparse
import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everstep.checkpoint.keeper.place import KeeperPlace
from everstep.checkpoint.keeper.supervisor import Supervisor
from everstep.checkpoint.keeper.wire import Channel

if TYPE_CHECKING:
    from everstep.checkpoint.keeper.flushes import FlushSlot
    from everstep.checkpoint.keeper.server import (
        DataPlane,
        DataPlaneFactory,
        ReadSlot,
        SealedSlots,
    )

MODULE = "everstep.checkpoint.keeper.main"
_LOCK_WAIT_S = 1.0


def main(
    arguments: Sequence[str],
    *,
    module: str = MODULE,
    flush: "FlushSlot | None" = None,
    data_plane_factory: "DataPlaneFactory | None" = None,
) -> int:
    """Be a supervisor, or a keeper; returns the exit code.

    Args:
        arguments: as ``control.start`` makes them.
        module: that processes started by this one run; it calls this function.
        flush: makes snapshots durable; default: ``snapshots.flush.flush_slot``.
        data_plane_factory: see ``server.Keeper``; default: a data plane on ``--interface``, where
            one is named.
    """
    options = _parse(arguments)
    if options.detach and os.fork():
        return 0  # the process that goes on is nobody's child
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    if options.role == "keeper":
        return _keep(options, module, flush, data_plane_factory)
    return _supervise(options, module)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=MODULE)
    parser.add_argument("--role", choices=("supervisor", "keeper"), required=True)
    parser.add_argument("--job", required=True)
    parser.add_argument("--place", type=Path, required=True)
    parser.add_argument("--budget-bytes", type=int, required=True)
    parser.add_argument("--linger-s", type=float, required=True)
    parser.add_argument("--interface")
    parser.add_argument("--detach", action="store_true")
    for name in ("--listen-fd", "--lock-fd", "--channel-fd", "--keeper-pid"):
        parser.add_argument(name, type=int, default=-1)
    return parser.parse_args(arguments)


def _command(options: argparse.Namespace, module: str, role: str, **fds: int) -> list[str]:
    told = {
        "role": role,
        "job": options.job,
        "place": options.place,
        "budget_bytes": options.budget_bytes,
        "linger_s": options.linger_s,
        **({"interface": options.interface} if options.interface else {}),
        **fds,
    }
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in told.items()]
    return [sys.executable, "-m", module, *flags]


def _supervise(options: argparse.Namespace, module: str) -> int:
    place = KeeperPlace.of(options.job, options.place)
    place.make()
    channel = None
    if options.channel_fd >= 0:  # in the place of one that was killed
        channel = Channel(socket.socket(fileno=options.channel_fd))
        lock, listener = options.lock_fd, socket.socket(fileno=options.listen_fd)
    else:
        held = place.lock(wait_s=_LOCK_WAIT_S)
        if held is None:
            return 0  # somebody was faster
        lock, listener = held, place.listen()
        place.make_token()

    def command(channel_fd: int) -> list[str]:
        fds = {"listen_fd": listener.fileno(), "lock_fd": lock, "channel_fd": channel_fd}
        return _command(options, module, "keeper", **fds)

    supervisor = Supervisor(command, [listener.fileno(), lock], _log)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, supervisor.terminate)
    done = supervisor.run(channel, max(options.keeper_pid, 0))
    place.clear()
    os.close(lock)
    return 0 if done else 1


def _keep(
    options: argparse.Namespace,
    module: str,
    flush: "FlushSlot | None",
    data_plane_factory: "DataPlaneFactory | None",
) -> int:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # until it can be done; the supervisor repeats it
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # threads that nobody needs
    from everstep.checkpoint.keeper.deputy import Deputy
    from everstep.checkpoint.keeper.server import Keeper

    for fd in (options.listen_fd, options.lock_fd, options.channel_fd):
        os.set_inheritable(fd, False)
    listener = socket.socket(fileno=options.listen_fd)

    def new_supervisor() -> Channel | None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        fds = {
            "listen_fd": options.listen_fd,
            "lock_fd": options.lock_fd,
            "channel_fd": theirs.fileno(),
        }
        command = _command(options, module, "supervisor", **fds, keeper_pid=os.getpid())
        with theirs:
            process = subprocess.Popen(
                command,
                pass_fds=list(fds.values()),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        process.returncode = 0  # it outlives this one
        return Channel(ours)

    if data_plane_factory is None and options.interface is not None:
        data_plane_factory = _data_plane
    keeper = Keeper(
        listener,
        Deputy(Channel(socket.socket(fileno=options.channel_fd))),
        budget_bytes=options.budget_bytes,
        linger_s=options.linger_s,
        flush=flush or _flush_slot(),
        log=_log,
        token=KeeperPlace.of(options.job, options.place).make_token(),
        data_plane_factory=data_plane_factory or (_data_plane if options.interface else None),
        interface=options.interface,
        new_supervisor=new_supervisor,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: keeper.terminate())
    keeper.run()
    return 0


def _data_plane(
    read_slot: "ReadSlot", sealed_slots: "SealedSlots", token: bytes, interface: str | None
) -> "DataPlane":
    from everstep.checkpoint.keeper.transport import DataPlane

    return DataPlane(read_slot, token, sealed_slots=sealed_slots, interface=interface)


def _flush_slot() -> "FlushSlot":
    def flush(*arguments: Any, **named: Any) -> Any:
        # what it imports is needed at the first flush only
        from everstep.checkpoint.snapshots.flush import flush_slot

        return flush_slot(*arguments, **named)

    return flush


def _log(line: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {os.getpid()} {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
