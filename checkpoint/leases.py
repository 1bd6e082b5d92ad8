"""Who is reading a step: retention leaves alone what somebody holds.

Where steps are files of a shared file system, a reader holds a shared lock on the manifest, which
the kernel drops with its process. On object stores it puts a small object into the step's folder
and takes it away again; one that its reader left behind counts for ``LEASE_S``.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator

from everstep.checkpoint.errors import ManifestError
from everstep.checkpoint.records import decode_record, encode_record, read_record
from everstep.checkpoint.store import Store

LEASE_S = 6 * 3600.0
_KIND, _VERSION = "everstep_lease", 1


@contextlib.contextmanager
def held_for_reading(
    store: Store, step_key: str, manifest_key: str, *, now_s: float | None = None
) -> Iterator[None]:
    """Keep a committed step from being retired while the context is open.

    A reader that may not write, or a file system without locks, holds nothing, silently.
    """
    path = store.local_path(manifest_key)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            if path is not None:
                stack.enter_context(_flock(str(path), fcntl.LOCK_SH))
            else:
                key = f"{step_key}/leases/{os.urandom(8).hex()}.json"
                since_s = time.time() if now_s is None else now_s
                store.put(key, encode_record(_KIND, _VERSION, {"since_s": since_s}))
                stack.callback(_take_away, store, key)
        yield


@contextlib.contextmanager
def free_to_delete(
    store: Store, step_key: str, manifest_key: str, *, now_s: float | None = None
) -> Iterator[bool]:
    """Whether nobody holds a committed step; no new local reader can while the context is open."""
    path = store.local_path(manifest_key)
    if path is None:
        now_s = time.time() if now_s is None else now_s
        yield all(
            _since_s(store, f"{step_key}/leases/{name}") < now_s - LEASE_S
            for name in store.list(f"{step_key}/leases")
        )
        return
    with contextlib.ExitStack() as stack:
        free = True
        try:
            stack.enter_context(_flock(str(path), fcntl.LOCK_EX))
        except BlockingIOError:
            free = False
        except OSError:
            pass  # gone already, or a file system without locks
        yield free


@contextlib.contextmanager
def _flock(path: str, kind: int) -> Iterator[None]:
    """Raises BlockingIOError when it is held otherwise, OSError where there are no locks."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # NFS locks exclusively only what is writable
    except OSError:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
        try:
            yield
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)  # a forked child may have the descriptor, too
    finally:
        os.close(fd)


def _since_s(store: Store, key: str) -> float:
    try:
        since_s = decode_record(read_record(store, key), _KIND, _VERSION, key).get("since_s")
    except ManifestError:
        return 0.0  # taken away meanwhile, or no lease
    return float(since_s) if isinstance(since_s, int | float) else 0.0


def _take_away(store: Store, key: str) -> None:
    with contextlib.suppress(OSError):
        store.delete(key)
