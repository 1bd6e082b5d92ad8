"""What this machine offers, read from the system without importing anything heavy.

Reading is kept apart from judging: every parser is a function of text, and ``doctor.py`` decides
what the facts mean.
"""

import errno
import importlib.util
import mmap
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from everstep.checkpoint.host_memory import cgroup_folders, parse_meminfo, text_of
from everstep.cluster.host import address_of

UNLIMITED = resource.RLIM_INFINITY


@dataclass(frozen=True, kw_only=True)
class Cpu:
    """Processors that this process may use."""

    name: str
    cores: int
    """Cores of the affinity mask."""
    quota: float | None
    """Cores that the control group grants; None = no limit."""
    flags: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Host memory, in bytes."""

    total_bytes: int
    available_bytes: int
    limit_bytes: int | None
    """What the control group allows; None = no limit below the total."""
    shm_bytes: int | None
    """Size of /dev/shm; None = there is none."""
    shm_free_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Resource limits (soft, hard); ``UNLIMITED`` = none."""

    open_files: tuple[int, int]
    locked_bytes: tuple[int, int]


@dataclass(frozen=True)
class Interface:
    """A network interface of this host."""

    name: str
    address: str | None
    """IPv4 address; None = it has none."""


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver reports it."""

    name: str
    memory_bytes: int | None
    driver: str | None


@dataclass(frozen=True, kw_only=True)
class Disk:
    """The file system below a directory."""

    path: str
    kind: str
    free_bytes: int
    writable: str | None
    """None = a file could be written; else why not."""
    direct_io: str | None
    """None = an O_DIRECT write worked; else why not."""


def read_cpu() -> Cpu:
    """Name, cores, quota and instruction-set flags of the processors."""
    text = text_of(Path("/proc/cpuinfo"))
    affinity = getattr(os, "sched_getaffinity", None)
    return Cpu(
        name=parse_cpu_name(text) or platform.machine(),
        cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
        quota=min(filter(None, map(_cgroup_cores, cgroup_folders("cpu"))), default=None),
        flags=parse_cpu_flags(text),
    )


def parse_cpu_name(cpuinfo: str) -> str | None:
    """The 'model name' of /proc/cpuinfo; Arm kernels give none."""
    match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return match[1].strip() if match else None


def parse_cpu_flags(cpuinfo: str) -> frozenset[str]:
    """The 'flags' (x86) or 'Features' (Arm) of the first processor."""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return frozenset(match[1].split()) if match else frozenset()


def read_memory() -> Memory:
    """Memory of the host, the limit of the control group, and /dev/shm."""
    sizes = parse_meminfo(text_of(Path("/proc/meminfo")))
    total = sizes.get("MemTotal", 0)
    limits = [limit for limit in map(_cgroup_bytes, cgroup_folders("memory")) if limit is not None]
    limit = min(limits, default=total)
    try:
        shm = os.statvfs("/dev/shm")
    except OSError:
        shm = None
    return Memory(
        total_bytes=total,
        available_bytes=sizes.get("MemAvailable", 0),
        limit_bytes=limit if limit < total else None,
        shm_bytes=shm.f_blocks * shm.f_frsize if shm else None,
        shm_free_bytes=shm.f_bavail * shm.f_frsize if shm else None,
    )


def read_limits() -> Limits:
    """Soft and hard limits of open files and of locked memory."""
    return Limits(
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE),
        locked_bytes=resource.getrlimit(resource.RLIMIT_MEMLOCK),
    )


def read_numa(root: Path = Path("/sys/devices/system/node")) -> tuple[int, ...]:
    """Memory of each NUMA node that has some, in bytes; empty where the system does not tell."""
    sizes = []
    for folder in sorted(root.glob("node[0-9]*"), key=lambda path: int(path.name[4:])):
        match = re.search(r"MemTotal:\s+(\d+) kB", text_of(folder / "meminfo"))
        if match and int(match[1]):
            sizes.append(int(match[1]) * 1024)
    return tuple(sizes)


def read_interfaces() -> tuple[Interface, ...]:
    """The network interfaces, with the address of each."""
    names = sorted(name for _, name in socket.if_nameindex())
    return tuple(Interface(name, address_of(name)) for name in names)


def count_gpus(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> int:
    """NVIDIA GPUs that a CUDA program started now would see; takes microseconds."""
    return len(visible_gpus(environment, devices))


def visible_gpus(
    environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")
) -> list[str]:
    """Names of the GPUs that a CUDA program would see, as CUDA_VISIBLE_DEVICES has them."""
    present = len([d for d in devices.glob("nvidia[0-9]*") if d.name[6:].isdigit()])
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(index) for index in range(present)]
    usable = []
    for entry in (name.strip() for name in visible.split(",")):
        # CUDA ignores everything after the first entry that names no device
        if not entry or (not entry.isdigit() and not entry.startswith(("GPU-", "MIG-"))):
            break
        usable.append(entry)
    return usable[:present]


def read_gpus() -> tuple[Gpu, ...]:
    """All GPUs of the host from nvidia-smi, else from the driver's /proc files."""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version"]
        try:
            answer = subprocess.run(
                [*query, "--format=csv,noheader,nounits"],
                capture_output=True,
                text=True,
                timeout=20,
                check=True,
            )
            return parse_nvidia_smi(answer.stdout)
        except (OSError, subprocess.SubprocessError):
            pass  # a broken driver: what /proc knows is still worth showing
    files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    names = [re.search(r"^Model:\s*(.+)$", text_of(file), re.MULTILINE) for file in files]
    return tuple(Gpu(match[1].strip() if match else "NVIDIA GPU", None, None) for match in names)


def parse_nvidia_smi(csv: str) -> tuple[Gpu, ...]:
    """Lines of 'name, MiB of memory, driver version'."""
    gpus = []
    for line in csv.splitlines():
        name, _, rest = line.strip().rpartition(", ")
        name, _, mib = name.rpartition(", ")
        if name:
            gpus.append(Gpu(name, int(mib) * 2**20 if mib.isdigit() else None, rest))
    return tuple(gpus)


def has_infiniband() -> bool:
    """True where the kernel knows an RDMA network device."""
    return any(Path("/sys/class/infiniband").glob("*"))


def torch_cuda_build() -> str | None:
    """CUDA (or ROCm) version that the installed torch was built for, without importing it."""
    spec = importlib.util.find_spec("torch")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        return parse_torch_build(text_of(Path(folder) / "version.py"))
    return None


def parse_torch_build(version_py: str) -> str | None:
    """'CUDA 12.8' from the text of torch/version.py; None for a CPU build."""
    for name, label in (("cuda", "CUDA"), ("hip", "ROCm")):
        match = re.search(rf"^{name}\b[^=]*=\s*'([^']+)'", version_py, re.MULTILINE)
        if match:
            return f"{label} {match[1]}"
    return None


def read_disk(directory: Path) -> Disk:
    """The file system that ``directory`` is or will be on; tries a 4096-byte O_DIRECT write."""
    directory = directory.absolute()
    there = next(path for path in (directory, *directory.parents) if path.is_dir())
    space = os.statvfs(there)
    writable, direct_io = _try_writing(there)
    return Disk(
        path=str(there),
        kind=parse_mountinfo(text_of(Path("/proc/self/mountinfo")), str(there.resolve())),
        free_bytes=space.f_bavail * space.f_frsize,
        writable=writable,
        direct_io=direct_io,
    )


def parse_mountinfo(mountinfo: str, path: str) -> str:
    """Type of the file system that holds ``path``: of the longest mount point, the last mount."""
    best, kind = -1, "unknown"
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        if len(fields) < 5 or not after:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields[4]).rstrip("/")
        if (path == point or path.startswith(f"{point}/")) and len(point) >= best:
            best, kind = len(point), after.split()[0]
    return kind


def _try_writing(directory: Path) -> tuple[str | None, str | None]:
    """(why no file can be written, why O_DIRECT cannot be used); None = it can."""
    try:
        fd, name = tempfile.mkstemp(prefix=".everstep-doctor-", dir=directory)
    except OSError as error:
        reason = _reason(error)
        return reason, reason
    try:
        os.close(fd)
        return None, _try_direct_write(name)
    finally:
        os.unlink(name)


def _try_direct_write(name: str) -> str | None:
    if not hasattr(os, "O_DIRECT"):
        return "this system has no O_DIRECT"
    with mmap.mmap(-1, 4096) as page:  # memory that is aligned as O_DIRECT asks
        try:
            fd = os.open(name, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            return _reason(error)
        try:
            os.write(fd, page)
        except OSError as error:
            return _reason(error)
        finally:
            os.close(fd)
    return None


def _reason(error: OSError) -> str:
    if error.errno == errno.EINVAL:
        return "the file system refuses it"
    return error.strerror or str(error)


def _cgroup_bytes(folder: Path) -> int | None:
    for name in ("memory.max", "memory.limit_in_bytes"):
        text = text_of(folder / name).strip()
        if text.isdigit():
            return int(text)
    return None


def _cgroup_cores(folder: Path) -> float | None:
    words = text_of(folder / "cpu.max").split()
    if len(words) == 2 and words[0].isdigit():
        return int(words[0]) / int(words[1])
    quota = text_of(folder / "cpu.cfs_quota_us").strip()
    period = text_of(folder / "cpu.cfs_period_us").strip()
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None
