import os
import subprocess
import sys

import pytest

from everstep.cluster import host


@pytest.mark.parametrize(
    ("cpu_max", "cores", "left"),
    [
        ("max 100000", 8, 8),
        ("250000 100000", 8, 2),
        ("50000 100000", 8, 1),
        ("1600000 100000\n", 8, 8),
        ("nonsense", 8, 8),
    ],
)
def test_a_container_quota_limits_the_cores(cpu_max: str, cores: int, left: int) -> None:
    assert host.quota_cores(cpu_max, cores) == left


def test_cores_are_at_least_one_and_at_most_all() -> None:
    assert 1 <= host.available_cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("threads", "cores", "ranks", "each"), [("auto", 16, 4, 4), ("auto", 2, 4, 1), (3, 2, 4, 3)]
)
def test_threads_are_shared_among_ranks(
    threads: int | str, cores: int, ranks: int, each: int
) -> None:
    assert host.threads_per_rank(threads, cores, ranks) == each


def test_children_are_found() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert child.pid in host.children_of(os.getpid())
    finally:
        child.communicate(b"\n", timeout=20)
    assert child.pid not in host.children_of(os.getpid())


def test_a_process_whose_parent_is_gone_already_ends() -> None:
    program = "from everstep.cluster import host; host.die_with_parent(1); print('alive')"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {program}"],
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == b""


def test_an_interface_is_found_by_its_address() -> None:
    assert host.interface_of("127.0.0.1") == host.loopback_interface()
    assert host.interface_of("192.0.2.254") is None
