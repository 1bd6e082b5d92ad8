"""Records every change of files below a folder, and what a disk may show of them after a crash.

What was done is a list of operations. ``replay`` makes of a prefix of it what a file system may
show that promises only what POSIX does: bytes are sure to stay once their file was synced, names
once their folder was. Everything else may be there or not: after a power cut, files whose bytes
were not synced may be whole, empty or cut, and names that were not synced old or new.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Op:
    """One change: of a name in a folder, or of the bytes of an inode."""

    kind: str
    """create, mkdir, link, unlink, rmdir (names); write, truncate (bytes); sync, sync_folder."""
    path: str
    """Relative to the recorded folder; of names, the name; of bytes, unused."""
    inode: int = 0
    """Number of the file or folder, counted from the first one created."""
    offset: int = 0
    data: bytes = b""


@dataclass
class Recording:
    """The operations of a piece of work, in order."""

    root: Path
    ops: list[Op] = field(default_factory=list)


@contextmanager
def recording(root: Path) -> Iterator[Recording]:
    """Record what this process does to files below ``root`` through ``os``, in the context."""
    recorder = _Recorder(root)
    real = {name: getattr(os, name) for name in _CALLS}
    for name in _CALLS:
        setattr(os, name, recorder.wrapped(name, real[name]))
    try:
        yield recorder.recording
    finally:
        for name, call in real.items():
            setattr(os, name, call)


_CALLS = (
    "open", "close", "write", "ftruncate", "fdatasync", "fsync", "link", "unlink", "mkdir", "rmdir",
)  # fmt: skip


class _Recorder:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.recording = Recording(root)
        self.inodes: dict[str, int] = {}
        self.open: dict[int, tuple[str, int]] = {}
        """Descriptor -> (path, position)."""

    def inside(self, path: Any, dir_fd: int | None = None) -> str | None:
        text = os.fspath(path)
        if dir_fd is not None:  # as shutil.rmtree calls it
            text = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), text)
        text = os.path.abspath(text)
        below = os.path.relpath(text, self.root)
        return None if below.startswith("..") else below

    def number(self, path: str) -> int:
        return self.inodes.setdefault(path, len(self.inodes) + 1)

    def wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        note = getattr(self, f"_{name}")

        def call(*args: Any, **kwargs: Any) -> Any:
            result = real(*args, **kwargs)
            note(result, *args, **kwargs)
            return result

        return call

    def add(self, kind: str, path: str, **facts: Any) -> None:
        self.recording.ops.append(Op(kind, path, **facts))

    def _open(self, fd: int, path: Any, flags: int, mode: int = 0, **more: Any) -> None:
        below = self.inside(path, more.get("dir_fd"))
        if below is None:
            return
        if flags & os.O_CREAT and flags & os.O_EXCL:
            self.inodes.pop(below, None)
            self.inodes[below] = 1 + max(self.inodes.values(), default=0)
            self.add("create", below, inode=self.inodes[below])
        self.open[fd] = (below, 0)

    def _close(self, _: None, fd: int) -> None:
        self.open.pop(fd, None)

    def _write(self, count: int, fd: int, data: Any) -> None:
        if fd in self.open:
            path, position = self.open[fd]
            written = bytes(memoryview(data)[:count])
            self.add("write", path, inode=self.number(path), offset=position, data=written)
            self.open[fd] = (path, position + count)

    def _ftruncate(self, _: None, fd: int, size: int) -> None:
        if fd in self.open:
            path, _position = self.open[fd]
            self.add("truncate", path, inode=self.number(path), offset=size)

    def _fsync(self, _: None, fd: int) -> None:
        if fd in self.open:
            path, _position = self.open[fd]
            kind = "sync_folder" if os.path.isdir(self.root / path) else "sync"
            self.add(kind, path, inode=self.inodes.get(path, 0))

    _fdatasync = _fsync

    def _link(self, _: None, old: Any, new: Any, **more: Any) -> None:
        before, after = self.inside(old), self.inside(new)
        if before is not None and after is not None:
            self.inodes[after] = self.inodes[before]
            self.add("link", after, inode=self.inodes[after])

    def _unlink(self, _: None, path: Any, **more: Any) -> None:
        below = self.inside(path, more.get("dir_fd"))
        if below is not None:
            self.inodes.pop(below, None)
            self.add("unlink", below)

    def _mkdir(self, _: None, path: Any, *args: Any, **more: Any) -> None:
        below = self.inside(path)
        if below is not None:
            self.add("mkdir", below)

    def _rmdir(self, _: None, path: Any, **more: Any) -> None:
        below = self.inside(path, more.get("dir_fd"))
        if below is not None:
            self.add("rmdir", below)


NAMES = ("create", "mkdir", "link", "unlink", "rmdir")
BYTES = ("write", "truncate")


def unsynced(ops: list[Op]) -> list[int]:
    """Which operations of a prefix may be lost: those that no later sync vouches for."""
    lost: list[int] = []
    for index, op in enumerate(ops):
        later = ops[index + 1 :]
        folder = os.path.dirname(op.path) or "."
        if op.kind in NAMES:
            sure = any(s.kind == "sync_folder" and s.path == folder for s in later)
        elif op.kind in BYTES:
            sure = any(s.kind == "sync" and s.inode == op.inode for s in later)
        else:
            continue
        if not sure:
            lost.append(index)
    return lost


@dataclass(frozen=True)
class Changes:
    """How a folder differs from what it was: equal changes are the same disk."""

    gone: frozenset[str]
    files: frozenset[tuple[str, bytes | None]]
    """Name and content, None for a folder."""

    def apply(self, base: Path, folder: Path) -> None:
        """Make ``folder``: ``base`` with these changes."""
        shutil.copytree(base, folder)
        for path in sorted(self.gone, key=len, reverse=True):
            there = folder / path
            if there.is_dir():
                shutil.rmtree(there)  # a folder whose removal was kept has lost what is in it
            else:
                there.unlink(missing_ok=True)
        for path, content in sorted(self.files, key=lambda file: file[0]):
            there = folder / path
            if not there.parent.is_dir():
                continue  # the name of its folder was dropped, and the file with it
            if content is None:
                there.mkdir(exist_ok=True)
            else:
                there.write_bytes(content)


def replay(ops: list[Op], dropped: set[int]) -> Changes:
    """What is on the disk after these operations, without those that are dropped."""
    names: dict[str, int | None] = {}
    """Name -> inode, None for a folder."""
    contents: dict[int, bytearray] = {}
    gone: set[str] = set()
    for index, op in enumerate(ops):
        data = contents.setdefault(op.inode, bytearray())
        if index in dropped:
            continue
        match op.kind:
            case "create" | "link" | "mkdir":
                names[op.path] = None if op.kind == "mkdir" else op.inode
                gone.discard(op.path)
            case "unlink" | "rmdir":
                names.pop(op.path, None)
                gone.add(op.path)
            case "write":
                data[op.offset : op.offset + len(op.data)] = op.data
            case "truncate":
                del data[op.offset :]
                data.extend(bytes(op.offset - len(data)))
    files = {(p, None if inode is None else bytes(contents[inode])) for p, inode in names.items()}
    return Changes(frozenset(gone), frozenset(files))
