"""One process at a time works on a part of the cache; what a killed one left is removed."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def working_alone(folder: Path, tag: str) -> Iterator[bool]:
    """Waits until no other process is in here for ``tag``; a dead one's lock is free again.

    Leftover files ``*.TAG.*.tmp`` below ``folder``, which is made if missing, are deleted. Yields
    False where locks do not work (some network file systems, read-only folders): all is correct
    without, only done more than once.
    """
    with contextlib.ExitStack() as stack:
        alone = False
        with contextlib.suppress(OSError):  # writing will say what is wrong, if it comes to that
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((folder / f"lock-{tag}").open("wb"))
            fcntl.flock(file, fcntl.LOCK_EX)
            alone = True
        if alone:
            for path in folder.rglob(f"*.{tag}.*.tmp"):
                path.unlink(missing_ok=True)
        yield alone
