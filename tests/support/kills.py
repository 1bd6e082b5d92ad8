"""A process that dies before a certain change of files."""

import os
import signal
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

from tests.support.spawn import PRELOAD

CHANGES = ("open", "write", "ftruncate", "fdatasync", "fsync", "link", "unlink", "mkdir", "rmdir")
"""Calls that change files or make them durable."""


def watch(before: Callable[[str, tuple[Any, ...]], None]) -> None:
    """Call ``before`` ahead of each change, in this process from now on."""

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name != "open" or args[1] & os.O_CREAT:
                before(name, args)
            return real(*args, **kwargs)

        return call

    for name in CHANGES:
        setattr(os, name, watched(name, getattr(os, name)))


def die_before(kill_at: int) -> list[str]:
    """SIGKILL this process before change number ``kill_at``; what it has changed until now."""
    lines: list[str] = []

    def before(name: str, args: tuple[Any, ...]) -> None:
        if len(lines) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        lines.append(f"{name} {args[0]}")

    watch(before)
    return lines


def in_process(act: Callable[..., None], *args: Any) -> int | None:
    """The exit code of a fresh process that calls ``act``; None when it does not end."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=act, args=args, daemon=True)
    process.start()
    process.join(60)
    code = process.exitcode
    process.kill()
    process.join()
    return code
