"""``everstep doctor``: judges what the machine offers, and says what to do about it.

``gather`` reads facts, ``diagnose`` is a pure function of them, ``report`` prints the findings,
``examine`` is all three.
"""

import platform
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module, metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from everstep import machine
from everstep.checkpoint.torch_version import TorchVersionError, check_version, torch_version
from everstep.words import size_words

GIB = 2**30
RUN_ROOT = Path("runs")
"""Directory that run directories are made in by default."""
REQUIRED = ("numpy", "pydantic", "pyyaml", "rich", "typer")
EXTRAS = {"hf": "tokenizers", "tensorboard": "tensorboard"}
"""Extra -> the package that it brings."""
_MATTERING_FLAGS = (
    *("sse4_2", "pclmulqdq", "avx2", "avx512f", "avx512vl", "vpclmulqdq", "gfni"),
    *("asimd", "crc32", "pmull", "sve"),
)
_VOLATILE = {"tmpfs": "memory", "ramfs": "memory", "overlay": "the layer of a container"}
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


class Status(StrEnum):
    """How a finding bears on training here."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    status: Status
    found: str
    advice: str = ""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything that ``diagnose`` looks at."""

    system: str
    python: tuple[int, int, int]
    everstep: str
    packages: Mapping[str, str | None]
    """Distribution -> installed version; None = not installed."""
    torch: str | None
    torch_build: str | None
    """'CUDA 12.8', or None for a CPU build."""
    kernels: Mapping[str, str] | None
    """What each native kernel runs on; None = the extension cannot be imported."""
    cpu: machine.Cpu
    memory: machine.Memory
    limits: machine.Limits
    gpus: tuple[machine.Gpu, ...]
    visible_gpus: int
    infiniband: bool
    numa_bytes: tuple[int, ...]
    """Memory of each NUMA node."""
    interfaces: tuple[machine.Interface, ...]
    disk: machine.Disk


def examine() -> int:
    """Report on the machine; returns the exit code."""
    return report(diagnose(gather(RUN_ROOT)), report_console(), "everstep train demo")


def report_console() -> Console:
    """Where reports go: as wide as the terminal, or 100 columns."""
    return Console(width=None if sys.stdout.isatty() else 100)


def gather(run_root: Path) -> Facts:
    """Read all facts; ``run_root`` is the directory that run directories are made in."""
    import everstep

    packages = (*REQUIRED, *EXTRAS.values())
    return Facts(
        system=platform.system(),
        python=sys.version_info[:3],
        everstep=everstep.__version__,
        packages={name: _version(name) for name in packages},
        torch=torch_version(),
        torch_build=machine.torch_cuda_build(),
        kernels=_kernels(),
        cpu=machine.read_cpu(),
        memory=machine.read_memory(),
        limits=machine.read_limits(),
        gpus=machine.read_gpus(),
        visible_gpus=machine.count_gpus(),
        infiniband=machine.has_infiniband(),
        numa_bytes=machine.read_numa(),
        interfaces=machine.read_interfaces(),
        disk=machine.read_disk(run_root),
    )


def diagnose(facts: Facts) -> list[Finding]:
    """Judge the machine; independent of any config."""
    return [
        _software(facts),
        _packages(facts),
        _torch(facts),
        _gpus(facts),
        _cores(facts),
        _kernel_choice(facts),
        _memory(facts.memory),
        _shared_memory(facts),
        _open_files(facts.limits),
        _locked_memory(facts),
        _disk(facts.disk),
        _direct_io(facts.disk),
        _extras(facts),
    ]


def report(findings: Sequence[Finding], console: Console, next_step: str) -> int:
    """Print the findings as a table of at most 100 columns; returns 1 if something failed."""
    table = Table(box=None, pad_edge=False, show_header=False, width=min(100, console.width))
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    for finding in findings:
        lines = Text(finding.found)
        if finding.advice:
            lines.append(f"\n-> {finding.advice}")
        mark = Text(finding.status, style=_COLOURS[finding.status])
        table.add_row(mark, finding.name, lines)
    console.print(table)
    count = Counter(finding.status for finding in findings)
    failed, warned = count[Status.FAIL], count[Status.WARN]
    verdict = "mend what failed first, then" if failed else "ready:"
    told = f"\n{failed} failed, {warned} warned; {verdict} {next_step}"
    console.print(told, markup=False, soft_wrap=True)  # a command that was broken cannot be pasted
    return 1 if failed else 0


def _software(facts: Facts) -> Finding:
    python = ".".join(map(str, facts.python))
    found = f"everstep {facts.everstep}, Python {python}, {facts.system}"
    if facts.system != "Linux":
        advice = "everstep runs on Linux only: use a Linux machine or container"
        return Finding("software", Status.FAIL, found, advice)
    if facts.python < (3, 11, 0):
        return Finding("software", Status.FAIL, found, "install Python 3.11 or later")
    return Finding("software", Status.OK, found)


def _packages(facts: Facts) -> Finding:
    missing = [name for name in REQUIRED if facts.packages[name] is None]
    found = ", ".join(f"{name} {facts.packages[name] or 'missing'}" for name in REQUIRED)
    if missing:
        return Finding("packages", Status.FAIL, found, f"pip install {' '.join(missing)}")
    return Finding("packages", Status.OK, found)


def _torch(facts: Facts) -> Finding:
    found = f"{facts.torch or 'none'}, built for {facts.torch_build or 'the CPU only'}"
    try:
        check_version(facts.torch)
    except TorchVersionError as error:
        return Finding("torch", Status.FAIL, found if facts.torch else "not installed", str(error))
    if facts.gpus and facts.torch_build is None:
        advice = "this build cannot use the GPUs: install torch for CUDA (pytorch.org/get-started)"
        return Finding("torch", Status.WARN, found, advice)
    return Finding("torch", Status.OK, found)


def _gpus(facts: Facts) -> Finding:
    if not facts.gpus:
        found = "none: training runs on the CPU"
        if facts.torch_build is None:
            return Finding("GPUs", Status.OK, found)
        advice = (
            f"torch is built for {facts.torch_build}: check the driver with nvidia-smi, or ignore"
        )
        return Finding("GPUs", Status.WARN, found, advice)
    first = facts.gpus[0]
    memory = f", {size_words(first.memory_bytes)} each" if first.memory_bytes else ""
    driver = f", driver {first.driver}" if first.driver else ""
    found = f"{len(facts.gpus)} x {first.name}{memory}{driver}"
    if facts.visible_gpus < len(facts.gpus):
        advice = (
            f"only {facts.visible_gpus} of them can be used here: see CUDA_VISIBLE_DEVICES, and "
            "the devices that the container was given"
        )
        return Finding("GPUs", Status.WARN, found, advice)
    return Finding("GPUs", Status.OK, found)


def _cores(facts: Facts) -> Finding:
    cpu = facts.cpu
    flags = " ".join(flag for flag in _MATTERING_FLAGS if flag in cpu.flags) or "none that matter"
    found = f"{cpu.cores} usable, {cpu.name}; {flags}"
    if cpu.quota is not None and cpu.quota < cpu.cores:
        advice = f"the control group grants {cpu.quota:g} cores: set parallel.threads to match"
        return Finding("cores", Status.WARN, found, advice)
    return Finding("cores", Status.OK, found)


def _kernel_choice(facts: Facts) -> Finding:
    if facts.kernels is None:
        advice = "install everstep (make setup, or pip install .): it compiles them"
        return Finding("native kernels", Status.FAIL, "everstep._native is not there", advice)
    found = ", ".join(f"{name}: {choice}" for name, choice in facts.kernels.items())
    if facts.kernels.get("crc32c") == "portable":
        advice = "checksums will be slow: unset EVERSTEP_PORTABLE_KERNELS, if it is set"
        return Finding("native kernels", Status.WARN, found, advice)
    return Finding("native kernels", Status.OK, found)


def _memory(memory: machine.Memory) -> Finding:
    limit = f", control group allows {size_words(memory.limit_bytes)}" if memory.limit_bytes else ""
    available, total = size_words(memory.available_bytes), size_words(memory.total_bytes)
    found = f"{available} of {total} available{limit}"
    if min(memory.available_bytes, memory.limit_bytes or memory.available_bytes) < 4 * GIB:
        advice = "ranks may get killed for lack of memory: end other programs, or start fewer ranks"
        return Finding("memory", Status.WARN, found, advice)
    return Finding("memory", Status.OK, found)


def _shared_memory(facts: Facts) -> Finding:
    size, free = facts.memory.shm_bytes, facts.memory.shm_free_bytes
    if size is None or free is None:
        advice = "mount a tmpfs there: NCCL's ranks on one host exchange data through it"
        return Finding("/dev/shm", Status.WARN if facts.gpus else Status.OK, "none", advice)
    found = f"{size_words(free)} of {size_words(size)} free"
    if len(facts.gpus) > 1 and free < GIB:
        advice = "too small for NCCL: start the container with --ipc=host or --shm-size=8g"
        return Finding("/dev/shm", Status.WARN, found, advice)
    return Finding("/dev/shm", Status.OK, found)


def _open_files(limits: machine.Limits) -> Finding:
    soft, hard = limits.open_files
    found = f"{_limit(soft)}, can be raised to {_limit(hard)}" if soft != hard else _limit(soft)
    if soft != machine.UNLIMITED and soft < 1024:
        advice = "each rank opens sockets and files: ulimit -n 65536"
        return Finding("open files", Status.WARN, found, advice)
    return Finding("open files", Status.OK, found)


def _locked_memory(facts: Facts) -> Finding:
    soft, _ = facts.limits.locked_bytes
    found = "unlimited" if soft == machine.UNLIMITED else size_words(soft)
    if facts.infiniband and facts.gpus and soft != machine.UNLIMITED:
        advice = (
            "RDMA registers memory: ulimit -l unlimited, or --ulimit memlock=-1 for a container"
        )
        return Finding("locked memory", Status.WARN, found, advice)
    return Finding("locked memory", Status.OK, found)


def _disk(disk: machine.Disk) -> Finding:
    found = f"{disk.path}: {disk.kind}, {size_words(disk.free_bytes)} free"
    if disk.writable is not None:
        advice = f"no file can be written ({disk.writable}): choose another place with --run-dir"
        return Finding("run directory", Status.FAIL, found, advice)
    if disk.kind in _VOLATILE:
        advice = f"this is {_VOLATILE[disk.kind]}, and goes away with it: --run-dir on a real disk"
        return Finding("run directory", Status.WARN, found, advice)
    if disk.free_bytes < GIB:
        advice = "too little for checkpoints of any but tiny models: --run-dir on a larger disk"
        return Finding("run directory", Status.WARN, found, advice)
    return Finding("run directory", Status.OK, found)


def _direct_io(disk: machine.Disk) -> Finding:
    if disk.direct_io is None:
        return Finding("O_DIRECT", Status.OK, "works: checkpoints are written past the page cache")
    advice = "saving works but costs more CPU time and page cache; a local ext4 or xfs has it"
    return Finding("O_DIRECT", Status.WARN, f"not here: {disk.direct_io}", advice)


def _extras(facts: Facts) -> Finding:
    versions = {extra: facts.packages[package] for extra, package in EXTRAS.items()}
    have = [
        f"[{extra}] {EXTRAS[extra]} {version}" for extra, version in versions.items() if version
    ]
    missing = ",".join(extra for extra, version in versions.items() if version is None)
    advice = f"for more: pip install 'everstep[{missing}]'" if missing else ""
    return Finding("extras", Status.OK, ", ".join(have) or "none installed", advice)


def _limit(value: int) -> str:
    return "unlimited" if value == machine.UNLIMITED else str(value)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _kernels() -> Mapping[str, str] | None:
    try:
        native = import_module("everstep._native")
    except ImportError:
        return None
    chosen: Mapping[str, str] = native.kernels()
    return chosen
