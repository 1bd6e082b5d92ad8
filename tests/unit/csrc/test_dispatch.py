"""Which implementation is chosen, and the other ones put through the same tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from everstep.checkpoint import kernels

SWITCHES = ("EVERSTEP_PORTABLE_KERNELS", "EVERSTEP_AVX512_KERNELS")


def run_python(arguments: list[str], switch: str, value: str) -> str:
    environment = {name: v for name, v in os.environ.items() if name not in SWITCHES}
    environment[switch] = value
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


PRINT_NAMES = """
from everstep.checkpoint import kernels
print(sorted(set(kernels.implementations().values())))
"""


def test_every_kernel_names_its_implementation() -> None:
    names = kernels.implementations()
    assert set(names) == {"crc32c", "streaming_copy", "streaming_copy_crc32c"}
    assert set(names.values()) <= {"portable", "sse2", "sse4.2", "avx512", "armv8-crc"}


def test_portable_kernels_can_be_forced() -> None:
    names = run_python(["-c", PRINT_NAMES], "EVERSTEP_PORTABLE_KERNELS", "1")
    assert names.strip() == "['portable']"


def test_zero_does_not_force_portable_kernels() -> None:
    unforced = run_python(["-c", PRINT_NAMES], "EVERSTEP_PORTABLE_KERNELS", "0")
    assert unforced == run_python(["-c", PRINT_NAMES], "EVERSTEP_AVX512_KERNELS", "1")


def test_avx512_can_be_left_unused() -> None:
    names = run_python(["-c", PRINT_NAMES], "EVERSTEP_AVX512_KERNELS", "0")
    assert "avx512" not in names


@pytest.mark.parametrize(
    ("switch", "value"),
    [
        ("EVERSTEP_PORTABLE_KERNELS", "1"),
        pytest.param("EVERSTEP_AVX512_KERNELS", "0", marks=pytest.mark.slow),
    ],
)
def test_other_implementations_pass_the_same_tests(switch: str, value: str) -> None:
    here = Path(__file__)
    files = [str(file) for file in sorted(here.parent.glob("test_*.py")) if file != here]
    assert files
    run_python(["-m", "pytest", "-q", "-p", "no:cacheprovider", *files], switch, value)
