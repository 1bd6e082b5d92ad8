"""Targets that appear whole or not at all, and never replace anything."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from everstep.checkpoint.convert.errors import TargetExistsError, TargetFailedError
from everstep.checkpoint.direct_io import make_directory, sync_directory

OnBytes = Callable[[int], None]
"""Called with the bytes that were written so far."""
DEFAULT_BUDGET_BYTES = 256 * 2**20
MIN_BUDGET_BYTES = 2**20
_BLOCK_BYTES = 16 * 2**20
_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""What only writing meets: a full disk, a quota, the largest file of a file system, no writing."""
_SHARE = 8
"""Of these a conversion has: a block, its copy for the file, and what casts and means need."""


def block_bytes(budget_bytes: int) -> int:
    """How much to convert at a time within a memory budget; a multiple of 4096.

    Raises ValueError for a budget below ``MIN_BUDGET_BYTES``.
    """
    if budget_bytes < MIN_BUDGET_BYTES:
        raise ValueError(
            f"a memory budget of {budget_bytes} bytes is too small: give at least "
            f"{MIN_BUDGET_BYTES}"
        )
    return min(_BLOCK_BYTES, budget_bytes // _SHARE // 4096 * 4096)


@contextmanager
def new_target(target: Path) -> Iterator[Path]:
    """A temporary name beside ``target``; what the body makes there is durable under it afterwards.

    The body writes one file or one folder of synced files. After an error nothing is left.

    Raises:
        TargetExistsError: there is something at ``target``.
        TargetFailedError: the disk is full, or may not be written to.
        OSError: as the file system reports it.
    """
    if os.path.lexists(target):
        raise TargetExistsError(str(target))
    make_directory(target.absolute().parent)
    temporary = target.with_name(f".{target.name}.{os.urandom(4).hex()}.tmp")
    try:
        yield temporary
        if temporary.is_dir():
            sync_directory(temporary)
            _rename_folder(temporary, target)
        else:
            try:
                os.link(temporary, target)
            except FileExistsError:
                raise TargetExistsError(str(target)) from None
            temporary.unlink()
        sync_directory(target.absolute().parent)
    except Exception as error:
        if (refused := _refused(error)) is not None:
            raise TargetFailedError(str(target), str(refused.strerror)) from error
        raise
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _refused(error: BaseException | None) -> OSError | None:
    """What the file system said no to: the error itself, or one that it came from.

    ``torch.save`` hides it behind a complaint about its archive.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _REFUSED:
            return error
        error = error.__cause__ or error.__context__
    return None


def _rename_folder(temporary: Path, target: Path) -> None:
    if os.path.lexists(target):  # rename would replace a folder that is empty
        raise TargetExistsError(str(target))
    try:
        temporary.rename(target)
    except OSError as e:
        if target.exists():
            raise TargetExistsError(str(target)) from e
        raise


class ByteCount:
    """Adds up what was written, over several files, and tells it."""

    def __init__(self, on_bytes: OnBytes | None) -> None:
        self._on_bytes = on_bytes
        self.total = 0

    def add(self, count: int) -> None:
        """Count further bytes."""
        self.reach(self.total + count)

    def reach(self, total: int) -> None:
        """Set the count, where somebody else counts."""
        self.total = total
        if self._on_bytes is not None:
            self._on_bytes(self.total)
