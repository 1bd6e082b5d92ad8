"""How fast the native copies and checksums are, beside NumPy, memcpy and zlib.

    python benchmarks/copy_kernels.py [--mib 256] [--rounds 15] [--json OUT]

Every case runs once per round, in turn, so that all see the same load of the machine. Figures are
CPU time of the process: medians over the rounds, and the ratio to memcpy of the same bytes in the
same round with its quartiles (below 1: faster than memcpy). Each set of implementations runs in a
process of its own, because the choice is made at import.
"""

import argparse
import ctypes
import json
import os
import platform
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from everstep.checkpoint import kernels

MIB = 1 << 20
CELL_BYTES = 512 << 10
"""About what a rank holds of a tensor: less than a cache, of a state that is much more."""
IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    "chosen": {},
    "without AVX-512": {"EVERSTEP_AVX512_KERNELS": "0"},
    "portable": {"EVERSTEP_PORTABLE_KERNELS": "1"},
}
Case = Callable[[], object]


def dense_cases(src: np.ndarray, dst: np.ndarray, crcs: np.ndarray) -> dict[str, Case]:
    """All of src to all of dst, contiguous; the first case is the limit."""
    size = src.size
    shape, strides = (size // 4,), (4,)
    move = ctypes.CDLL(None).memmove
    move.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

    def gather(threads: int) -> None:
        crcs.fill(0)
        kernels.gather_box_crc(
            dst, 0, src, 0, strides, shape, 4, 0, size, 0, MIB, crcs, threads=threads
        )

    def two_passes() -> None:
        move(dst.ctypes.data, src.ctypes.data, size)
        kernels.crc32c_blocks(dst, MIB, out=crcs)

    def two_passes_back() -> None:
        kernels.crc32c_blocks(src, MIB, out=crcs)
        copy(1)

    def scatter() -> None:
        crcs.fill(0)
        kernels.scatter_box_crc(dst, 0, strides, src, 0, strides, shape, 4, 0, size, 0, MIB, crcs)

    def scatter_cells() -> None:
        crcs.fill(0)
        for begin in range(0, size, CELL_BYTES):
            kernels.scatter_box_crc(
                dst, begin, strides, src, begin, strides, (CELL_BYTES // 4,), 4,
                begin, begin + CELL_BYTES, begin, MIB, crcs,
            )  # fmt: skip

    def copy(threads: int) -> None:
        kernels.copy_box(dst, 0, strides, src, 0, strides, shape, 4, threads=threads)

    return {
        "memcpy": lambda: move(dst.ctypes.data, src.ctypes.data, size),
        "NumPy copy": lambda: np.copyto(dst, src),
        "zlib.crc32, no copy": lambda: zlib.crc32(src),
        "crc32c_blocks, no copy": lambda: kernels.crc32c_blocks(src, MIB, out=crcs),
        "copy_box": lambda: copy(1),
        "copy_box, 2 threads": lambda: copy(2),
        "memcpy, then crc32c_blocks": two_passes,
        "gather_box_crc": lambda: gather(1),
        "gather_box_crc, 2 threads": lambda: gather(2),
        "crc32c_blocks, then copy_box": two_passes_back,
        "scatter_box_crc": scatter,
        "scatter_box_crc, cells of 512 KiB": scatter_cells,
    }


def row_cases(
    src: np.ndarray, dst: np.ndarray, crcs: np.ndarray, row_bytes: int
) -> dict[str, Case]:
    """Every second row of src, as many bytes as half of src, to contiguous memory."""
    rows = src.size // (2 * row_bytes)
    half = rows * row_bytes
    src_rows = src[: 2 * half].reshape(rows, 2, row_bytes)[:, 0]
    dst_rows = dst[:half].reshape(rows, row_bytes)
    shape, src_strides, dst_strides = (rows, row_bytes // 4), (2 * row_bytes, 4), (row_bytes, 4)

    def gather() -> None:
        crcs.fill(0)
        kernels.gather_box_crc(dst, 0, src, 0, src_strides, shape, 4, 0, half, 0, MIB, crcs)

    def scatter() -> None:
        crcs.fill(0)
        kernels.scatter_box_crc(
            dst, 0, dst_strides, src, 0, src_strides, shape, 4, 0, 2 * half, 0, MIB, crcs
        )

    return {
        "memcpy": lambda: np.copyto(dst[:half], src[:half]),
        "NumPy copy": lambda: np.copyto(dst_rows, src_rows),
        "copy_box": lambda: kernels.copy_box(dst, 0, dst_strides, src, 0, src_strides, shape, 4),
        "gather_box_crc": gather,
        "scatter_box_crc, twice the bytes checksummed": scatter,
    }


def quartiles(values: list[float]) -> list[float]:
    return [round(float(q), 4) for q in np.percentile(values, (25, 50, 75))]


def measure(cases: dict[str, Case], size_bytes: int, rounds: int) -> dict[str, dict[str, object]]:
    """Runs the cases in turn; the first one is what the others are compared with."""
    cpu_s: dict[str, list[float]] = {name: [] for name in cases}
    wall_s: dict[str, list[float]] = {name: [] for name in cases}
    for round_index in range(rounds + 1):
        for name, case in cases.items():
            wall, cpu = time.perf_counter(), time.process_time()
            case()
            if round_index > 0:  # the first round touches the memory
                cpu_s[name].append(time.process_time() - cpu)
                wall_s[name].append(time.perf_counter() - wall)
    limit = next(iter(cases))
    return {
        name: {
            "gb_per_cpu_s": round(size_bytes / float(np.median(cpu_s[name])) / 1e9, 2),
            "gb_per_wall_s": round(size_bytes / float(np.median(wall_s[name])) / 1e9, 2),
            "cpu_ratio_to_memcpy_quartiles": quartiles(
                [ours / base for ours, base in zip(cpu_s[name], cpu_s[limit], strict=True)]
            ),
        }
        for name in cases
    }


def measure_all(mib: int, rounds: int) -> dict[str, object]:
    """All groups of cases with the implementations that this process chose."""
    size = mib * MIB
    src = np.random.default_rng(0).integers(0, 1 << 63, size // 8, dtype=np.int64).view(np.uint8)
    dst = np.ones(size + 64, np.uint8)
    dst = dst[-dst.ctypes.data % 64 :][:size]  # as torch aligns its tensors
    crcs = np.zeros(mib, np.uint32)
    groups = {"contiguous": measure(dense_cases(src, dst, crcs), size, rounds)}
    for row_bytes in (1024, 4096, 16384, 65536):
        cases = row_cases(src, dst, crcs, row_bytes)
        groups[f"every second row of {row_bytes} bytes"] = measure(cases, size // 2, rounds)
    return {"implementations": kernels.implementations(), "groups": groups}


def processor_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def caches() -> dict[str, str]:
    """Size of each data cache of the first processor, by level, as the kernel writes it."""
    found = {}
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (cache / "type").read_text().strip() != "Instruction":
            level = (cache / "level").read_text().strip()
            found[f"L{level}"] = (cache / "size").read_text().strip()
    return found


def environment() -> dict[str, object]:
    return {
        "processor": processor_name(),
        "processors": os.cpu_count(),
        "caches": caches(),
        "load_average_before": [round(load, 2) for load in os.getloadavg()],
        "kernel": platform.release(),
        "libc": "-".join(platform.libc_ver()),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "zlib": zlib.ZLIB_RUNTIME_VERSION,
        "date": time.strftime("%Y-%m-%d"),
    }


def print_table(name: str, result: dict[str, object]) -> None:
    print(f"\n{name}: {result['implementations']}")
    groups = result["groups"]
    assert isinstance(groups, dict)
    for group, cases in groups.items():
        print(f"  {group}")
        for case, row in cases.items():
            low, middle, high = row["cpu_ratio_to_memcpy_quartiles"]
            print(
                f"    {case:44} {row['gb_per_cpu_s']:6.2f} GB per CPU second"
                f" {row['gb_per_wall_s']:6.2f} GB/s"
                f"   {middle:5.2f} x memcpy [{low:.2f}, {high:.2f}]"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mib", type=int, default=256, help="size of each of two buffers")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure_all(options.mib, options.rounds)))
        return
    report: dict[str, object] = {
        "benchmark": "copy_kernels",
        "buffer_mib": options.mib,
        "rounds": options.rounds,
        "environment": environment(),
    }
    results: dict[str, object] = {}
    sizes = ("--mib", str(options.mib), "--rounds", str(options.rounds))
    for name, switches in IMPLEMENTATIONS.items():
        done = subprocess.run(
            [sys.executable, __file__, "--child", *sizes],
            env=os.environ | switches,
            stdout=subprocess.PIPE,
            check=True,
        )
        results[name] = json.loads(done.stdout)
        print_table(name, results[name])  # type: ignore[arg-type]
    report["results"] = results
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
