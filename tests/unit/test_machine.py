"""Reading the machine: parsers on text from other machines, probes on this one."""

import errno
import os
from pathlib import Path

import pytest

from everstep import machine
from everstep.machine import Gpu
from everstep.words import count_words, plural, size_words

X86 = (
    "processor\t: 0\nmodel name\t: Some CPU @ 2.8GHz\nflags\t\t: fpu avx2 gfni\n\nprocessor\t: 1\n"
)
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd crc32 sve\n"
MOUNTS = """\
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
25 24 0:23 / /dev/shm rw,relatime shared:4 - tmpfs tmpfs rw
60 27 0:50 / /data\\040sets rw,relatime - nfs4 server:/x rw
61 27 0:51 / /data rw,relatime - xfs /dev/vdb rw
62 27 0:52 / /data rw,relatime - overlay overlay rw
broken line
"""


def test_cpuinfo() -> None:
    assert machine.parse_cpu_name(X86) == "Some CPU @ 2.8GHz"
    assert machine.parse_cpu_flags(X86) == {"fpu", "avx2", "gfni"}
    assert machine.parse_cpu_name(ARM) is None
    assert machine.parse_cpu_flags(ARM) == {"fp", "asimd", "crc32", "sve"}
    assert machine.parse_cpu_flags("") == frozenset()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/me", "ext4"),
        ("/", "ext4"),
        ("/dev/shm", "tmpfs"),
        ("/dev/shmoo", "ext4"),
        ("/data sets/a", "nfs4"),
        ("/data/x", "overlay"),
    ],
)
def test_mountinfo(path: str, kind: str) -> None:
    assert machine.parse_mountinfo(MOUNTS, path) == kind


def test_no_mountinfo() -> None:
    assert machine.parse_mountinfo("", "/x") == "unknown"


def test_nvidia_smi() -> None:
    csv = "NVIDIA H100, 80GB, 81559, 570.1\nTesla, [N/A], 535.2\n\nNo devices were found\n"
    assert machine.parse_nvidia_smi(csv) == (
        Gpu("NVIDIA H100, 80GB", 81559 * 2**20, "570.1"),
        Gpu("Tesla", None, "535.2"),
    )


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        (None, 3),
        ("", 0),
        ("0,2", 2),
        ("-1", 0),
        ("1,-1,2", 1),
        ("GPU-abc, MIG-def", 2),
        ("NoDevFiles", 0),
        ("0,1,2,3,4", 3),
    ],
)
def test_gpus_that_can_be_used(tmp_path: Path, visible: str | None, count: int) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia12", "nvidiactl", "nvidia-uvm", "nvidia0x"):
        (tmp_path / name).touch()
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert machine.count_gpus(environment, tmp_path) == count


@pytest.mark.parametrize(
    ("text", "build"),
    [
        ("cuda: Optional[str] = None\nhip: Optional[str] = None", None),
        ("cuda: Optional[str] = '12.8'\nhip: Optional[str] = None", "CUDA 12.8"),
        ("cuda = None\nhip = '6.3'", "ROCm 6.3"),
        ("", None),
    ],
)
def test_torch_builds(text: str, build: str | None) -> None:
    assert machine.parse_torch_build(text) == build


def test_this_machine() -> None:
    cpu, memory, limits = machine.read_cpu(), machine.read_memory(), machine.read_limits()
    assert 1 <= cpu.cores <= (os.cpu_count() or 1)
    assert cpu.flags
    assert 0 < memory.available_bytes <= memory.total_bytes
    assert memory.limit_bytes is None or memory.limit_bytes < memory.total_bytes
    assert limits.open_files[0] > 0
    assert len(machine.read_gpus()) >= machine.count_gpus()


def test_disk_is_probed_where_the_run_directory_will_be(tmp_path: Path) -> None:
    disk = machine.read_disk(tmp_path / "runs" / "later")
    assert disk.path == str(tmp_path)
    assert disk.writable is None
    assert disk.free_bytes > 0
    assert disk.kind != "unknown"
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_direct_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_open = os.open

    def refusing_open(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return whole_open(path, flags, *rest)

    monkeypatch.setattr(os, "open", refusing_open)
    disk = machine.read_disk(tmp_path)
    assert disk.direct_io == "the file system refuses it"
    assert disk.writable is None
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> tuple[int, str]:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(machine.tempfile, "mkstemp", refuse)
    assert machine.read_disk(tmp_path).writable == "Permission denied"


def test_words() -> None:
    assert size_words(8 * 2**20) == "8 MiB"
    assert size_words(25276502016) == "23.54 GiB"
    assert size_words(12) == "12 bytes"
    assert [count_words(n) for n in (999, 139_584, 3_377_408, 8_030_261_248)] == [
        "999",
        "140k",
        "3.38M",
        "8.03B",
    ]
    assert [plural(n, "rank") for n in (0, 1, 2)] == ["0 ranks", "1 rank", "2 ranks"]
