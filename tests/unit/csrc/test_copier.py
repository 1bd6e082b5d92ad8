"""The background copier against its reference, and its conduct among threads and processes."""

import contextlib
import gc
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from everstep.checkpoint import copier_reference, kernels
from everstep.checkpoint.copier import Copier, CopyPlan
from tests.support.boxes import StridedBox, random_bytes
from tests.support.copy_sources import MIB, Sources, dense_sources, random_sources

NOTHING_COPIED_S = 0.05


@pytest.mark.parametrize("seed", range(1, 9))
def test_the_reference_copies_what_the_gather_copies(seed: int) -> None:
    sources = random_sources(seed, fragments=6, items=300, block_bytes=1 + 97 * seed)
    data, crcs = sources.empty_target()
    with copier_reference.Copier() as pool:
        plan = sources.plan(copier_reference)
        job = pool.start(plan, sources.addresses, data, crcs)
        assert plan.n_blocks == sources.plan().n_blocks
        if seed % 2:
            job.help()
        assert job.wait(60)
        assert job.copied_bytes == sources.data_bytes
    expected_data, expected_crcs = sources.expected()
    np.testing.assert_array_equal(data, expected_data)
    np.testing.assert_array_equal(crcs, expected_crcs)


def test_the_reference_copies_nothing_once_cancelled() -> None:
    sources = dense_sources(1)
    data, crcs = sources.empty_target()
    with copier_reference.Copier() as pool:
        job = pool.start(sources.plan(copier_reference), sources.addresses, data, crcs)
    assert not job.wait(1)
    with pytest.raises(RuntimeError, match="was cancelled"):
        job.help()
    assert (data == 0xA5).all()


@pytest.mark.parametrize("kind", ["whole", "rows", "short rows", "items", "expanded", "reversed"])
def test_large_fragments_of_every_kind_over_many_blocks(kind: str) -> None:
    rng = np.random.default_rng(1)
    strides, shape, item_bytes = {
        "whole": ((4,), (5 * MIB // 4,), 4),
        "rows": ((6004, 4), (800, 1500), 4),
        "short rows": ((112, 4), (50_000, 25), 4),
        "items": ((6,), (5 * MIB // 2,), 2),
        "expanded": ((0, 4), (5, MIB // 4), 4),
        "reversed": ((-16, 2), (5 * MIB // 16, 8), 2),
    }[kind]
    offset = 16 * shape[0] - 16 if kind == "reversed" else 0
    large = StridedBox(random_bytes(rng, 16 * MIB), offset, strides, shape, item_bytes)
    small = [StridedBox(random_bytes(rng, 1000), 0, (3,), (333,), 3) for _ in range(3)]
    sources = Sources([small[0], large, small[1], large, small[2]])
    data, crcs = sources.empty_target()
    with Copier(2) as pool:
        pool.start(sources.plan(), sources.addresses, data, crcs).help()
    expected_data, expected_crcs = sources.expected()
    np.testing.assert_array_equal(data, expected_data)
    np.testing.assert_array_equal(crcs, expected_crcs)


def test_many_threads_and_helpers_at_once() -> None:
    sources = random_sources(5, fragments=40, items=40_000, block_bytes=4096)
    plan = sources.plan()
    expected_data, expected_crcs = sources.expected()
    with Copier(4, nice=19) as pool:
        for _ in range(5):
            data, crcs = sources.empty_target()
            job = pool.start(plan, sources.addresses, data, crcs)
            helpers = [threading.Thread(target=job.help) for _ in range(3)]
            for helper in helpers:
                helper.start()
            job.help()
            np.testing.assert_array_equal(data, expected_data)
            np.testing.assert_array_equal(crcs, expected_crcs)
            for helper in helpers:
                helper.join()
            stats = job.stats()
            assert stats.help_bytes + stats.background_bytes == sources.data_bytes
            assert stats.help_s > 0
            assert stats.elapsed_s == job.stats().elapsed_s


def test_jobs_of_one_copier_follow_each_other() -> None:
    sources = dense_sources(4)
    plan, targets = sources.plan(), [sources.empty_target() for _ in range(4)]
    with Copier(2) as pool:
        jobs = [pool.start(plan, sources.addresses, *target) for target in targets]
        for job, (data, crcs) in zip(jobs, targets, strict=True):
            assert job.wait(60)
            np.testing.assert_array_equal(data, sources.expected()[0])
            np.testing.assert_array_equal(crcs, sources.expected()[1])


def test_after_done_no_source_is_read() -> None:
    sources = dense_sources(8)
    with Copier(2, nice=19) as pool:
        plan = sources.plan()
        for _ in range(10):
            data, crcs = sources.empty_target()
            expected = sources.boxes[0].buffer.copy()
            pool.start(plan, sources.addresses, data, crcs).help()
            sources.boxes[0].buffer[:] += 1
            np.testing.assert_array_equal(data, expected)
            np.testing.assert_array_equal(crcs, kernels.crc32c_blocks(expected, MIB))


def test_a_paused_job_is_left_to_who_helps() -> None:
    sources = dense_sources(3)
    data, crcs = sources.empty_target()
    with Copier() as pool:
        job = pool.start(sources.plan(), sources.addresses, data, crcs, bytes_per_s=0)
        assert not job.wait(NOTHING_COPIED_S)
        assert not job.done
        assert job.copied_bytes == 0
        assert (data == 0xA5).all()
        assert job.help() > 0
        assert job.done
        stats = job.stats()
    assert (stats.background_bytes, stats.help_bytes) == (0, 3 * MIB)
    assert stats.elapsed_s > NOTHING_COPIED_S
    np.testing.assert_array_equal(data, sources.expected()[0])


def test_a_paused_job_goes_on_when_its_rate_says_so() -> None:
    sources = dense_sources(3)
    data, crcs = sources.empty_target()
    with Copier(2) as pool:
        job = pool.start(sources.plan(), sources.addresses, data, crcs, bytes_per_s=0)
        job.set_rate(1e9)
        job.set_rate(None)
        assert job.wait(60)
        stats = job.stats()
    assert (stats.background_bytes, stats.help_bytes) == (3 * MIB, 0)
    assert stats.background_cpu_s > 0
    np.testing.assert_array_equal(crcs, sources.expected()[1])


def test_a_rate_slows_the_background_down() -> None:
    sources = dense_sources(12)
    data, crcs = sources.empty_target()
    with Copier(2) as pool:
        begin = time.monotonic()
        job = pool.start(sources.plan(), sources.addresses, data, crcs, bytes_per_s=40 * MIB)
        assert job.wait(60)
        # A bucket holds one block beside the one in hand: 10 of 12 blocks have to wait.
        assert time.monotonic() - begin >= 10 / 40 * 0.99
    np.testing.assert_array_equal(data, sources.expected()[0])


def test_a_cancelled_job_touches_nothing_more() -> None:
    sources = dense_sources(6)
    data, crcs = sources.empty_target()
    with Copier(2) as pool:
        job = pool.start(sources.plan(), sources.addresses, data, crcs, bytes_per_s=1)
        while job.copied_bytes == 0:
            time.sleep(0.001)
        job.cancel()
        copied = job.copied_bytes
        assert copied == MIB
        assert not job.done
        data[:] = 0xA5
        with pytest.raises(RuntimeError, match="was cancelled"):
            job.help()
        assert not job.wait(60)  # at once
        job.set_rate(None)
        job.cancel()
        assert (job.copied_bytes, job.done) == (copied, False)
        assert (data == 0xA5).all()
        # The next job does not mind.
        again = pool.start(sources.plan(), sources.addresses, data, crcs)
        assert again.wait(60)
        again.cancel()
        assert again.done
        assert again.help() < 1


def test_cancelling_wakes_who_waits() -> None:
    sources = dense_sources(2)
    data, crcs = sources.empty_target()
    with Copier() as pool:
        job = pool.start(sources.plan(), sources.addresses, data, crcs, bytes_per_s=0)
        answers: list[bool] = []
        waiter = threading.Thread(target=lambda: answers.append(job.wait(60)))
        waiter.start()
        job.cancel()
        waiter.join(30)
    assert answers == [False]


def test_a_dropped_job_is_cancelled_and_lets_go_of_its_target() -> None:
    sources = dense_sources(4)
    data, crcs = sources.empty_target()
    references = sys.getrefcount(data)
    with Copier() as pool:
        job = pool.start(sources.plan(), sources.addresses, data, crcs, bytes_per_s=1)
        assert sys.getrefcount(data) > references
        del job
        gc.collect()
        assert sys.getrefcount(data) == references
        data[:] = 0xA5
        time.sleep(NOTHING_COPIED_S)
        assert (data == 0xA5).all()


def test_a_job_keeps_its_copier() -> None:
    sources = dense_sources(4)
    data, crcs = sources.empty_target()
    job = Copier().start(sources.plan(), sources.addresses, data, crcs, bytes_per_s=200 * MIB)
    gc.collect()
    assert job.wait(60)


def test_closing_cancels_and_ends_the_threads() -> None:
    sources = dense_sources(4)
    plan, data, crcs = sources.plan(), *sources.empty_target()
    pool = Copier(3)
    pool.close()
    with pytest.raises(RuntimeError, match="the copier is closed"):
        pool.start(plan, sources.addresses, data, crcs)
    before = copier_threads()
    pool = Copier(3)
    assert len(copier_threads()) <= len(before)
    jobs = [
        pool.start(plan, sources.addresses, *sources.empty_target(), bytes_per_s=0)
        for _ in range(2)
    ]
    pool.close()
    pool.close()
    deadline_s = time.monotonic() + 30
    while set(copier_threads()) - set(before):  # a thread that has ended is listed a moment longer
        assert time.monotonic() < deadline_s
    assert [job.done for job in jobs] == [False, False]
    with pytest.raises(RuntimeError, match="was cancelled"):
        jobs[1].help()


def copier_threads() -> dict[int, int]:
    """How nice the threads of copiers in this process are, by their number."""
    found = {}
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/self/task/{thread}/comm").read_text() == "everstep-copy\n":
                found[int(thread)] = os.getpriority(os.PRIO_PROCESS, int(thread))
    return found


def test_only_the_threads_of_the_copier_are_nice() -> None:
    sources = dense_sources(1)
    data, crcs = sources.empty_target()
    mine, others = os.getpriority(os.PRIO_PROCESS, 0), copier_threads()
    with Copier(nice=19) as pool:
        job = pool.start(sources.plan(), sources.addresses, data, crcs)
        assert job.wait(60)
        assert [nice for thread, nice in copier_threads().items() if thread not in others] == [19]
    assert os.getpriority(os.PRIO_PROCESS, 0) == mine


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"starts": [0]}, "there are 1 starts, 2 shapes, 2 strides and 2 item sizes"),
        ({"item_bytes": [4, 4, 4]}, "2 strides and 3 item sizes"),
        ({"starts": [0, 23]}, "fragment 1 starts at byte 23 of the data; expected 24"),
        ({"starts": [1, 24]}, "fragment 0 starts at byte 1 of the data; expected 0"),
        ({"shapes": [(2, 3), (-1,)]}, "fragment 1: the shape holds -1"),
        ({"strides_bytes": [(12, 4), (4, 4)]}, "fragment 1: the source has 2 strides for 1 dim"),
        ({"item_bytes": [4, 0]}, "fragment 1: item_bytes is 0"),
        ({"strides_bytes": [(1 << 62, 1 << 62), (4,)]}, "fragment 0: the box reaches more than"),
        ({"shapes": [(2, 3), (1 << 62,)]}, "fragment 1: the box has more than 2.63 bytes"),
        ({"data_bytes": 43}, "fragment 1 of 20 bytes at byte 24 does not fit into data of 43"),
        ({"data_bytes": 45}, "the fragments have 44 bytes, but data_bytes is 45"),
        ({"data_bytes": -1}, "data_bytes is -1"),
        ({"block_bytes": 0}, "block_bytes is 0"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "starts": [0, 24],
        "shapes": [(2, 3), (5,)],
        "strides_bytes": [(12, 4), (4,)],
        "item_bytes": [4, 4],
        "data_bytes": 44,
        "block_bytes": 16,
    }
    assert CopyPlan(**arguments).n_blocks == 3
    with pytest.raises(ValueError, match=message):
        CopyPlan(**(arguments | changes))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: a | {"addresses": a["addresses"][:1]}, ValueError, "1 addresses for 2 fragm"),
        (lambda a: a | {"addresses": a["addresses"] * 0}, ValueError, "fragment 0 cannot be at"),
        (lambda a: a | {"addresses": ~np.zeros(2, np.uint64)}, ValueError, "fragment 0 cannot be"),
        (lambda a: a | {"dst": a["dst"][1:]}, ValueError, "dst has 63 bytes; expected 64"),
        (lambda a: a | {"crcs": a["crcs"][1:]}, ValueError, "4 blocks, but there is room for 3"),
        (lambda a: a | {"bytes_per_s": -1.0}, ValueError, "bytes_per_s is -1"),
        (lambda a: a | {"bytes_per_s": float("nan")}, ValueError, "bytes_per_s is "),
        (lambda a: a | {"bytes_per_s": float("inf")}, ValueError, "bytes_per_s is inf"),
        (lambda a: a | {"addresses": a["addresses"].astype(np.int64)}, TypeError, None),
        (lambda a: a | {"crcs": a["crcs"].astype(np.uint64)}, TypeError, None),
        (lambda a: a | {"dst": np.zeros(128, np.uint8)[::2]}, TypeError, None),
        (lambda a: a | {"dst": np.frombuffer(bytes(64), np.uint8)}, TypeError, None),
    ],
)
def test_arguments_that_do_not_fit_the_plan_are_refused(
    change: Callable[[dict[str, Any]], dict[str, Any]],
    error: type[Exception],
    message: str | None,
) -> None:
    sources = Sources([StridedBox(np.zeros(32, np.uint8), 0, (1,), (32,), 1)] * 2, block_bytes=16)
    data, crcs = sources.empty_target()
    arguments = {"addresses": sources.addresses, "dst": data, "crcs": crcs}
    with Copier() as pool:
        with pytest.raises(error, match=message):
            pool.start(sources.plan(), **change(arguments))
        assert (data == 0xA5).all()
        assert pool.start(sources.plan(), **arguments).wait(60)


def test_copying_over_a_source_is_refused() -> None:
    memory = np.zeros(100, np.uint8)
    sources = Sources([StridedBox(memory, 49, (-1,), (50,), 1)])
    crcs = np.zeros(1, np.uint32)
    with Copier() as pool:
        with pytest.raises(ValueError, match="fragment 0 and dst overlap in memory"):
            pool.start(sources.plan(), sources.addresses, memory[49:99], crcs)
        job = pool.start(sources.plan(), sources.addresses, memory[50:], crcs)
        assert job.wait(60)


@pytest.mark.parametrize("wrong", [{"threads": 0}, {"nice": -1}, {"nice": 20}])
def test_pools_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is {next(iter(wrong.values()))};"):
        Copier(**wrong)


def test_waits_and_rates_out_of_range_are_refused() -> None:
    sources = dense_sources(1)
    with Copier() as pool:
        job = pool.start(sources.plan(), sources.addresses, *sources.empty_target(), bytes_per_s=0)
        with pytest.raises(ValueError, match="timeout_s is -1"):
            job.wait(-1)
        with pytest.raises(ValueError, match="bytes_per_s is -2"):
            job.set_rate(-2)


def in_child(held: list[Any], arguments: Sequence[Any], told: Any) -> None:
    heard = []
    calls: list[Callable[[], object]] = [
        lambda: held[1].help(),
        lambda: held[1].wait(60),
        lambda: held[1].cancel(),
        lambda: held[1].set_rate(None),
        lambda: held[0].start(*arguments),
    ]
    for call in calls:
        try:
            call()
        except RuntimeError as error:
            heard.append("which was forked: make another copier there" in str(error))
    held[0].close()
    with Copier() as own:
        own.start(*arguments).help()
    held.clear()  # destroys both, here
    gc.collect()
    told.send(heard)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_is_told_that_the_threads_are_not_there() -> None:
    sources = dense_sources(3)
    plan, data, crcs = sources.plan(), *sources.empty_target()
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    held: list[Any] = [Copier(2)]
    held.append(held[0].start(plan, sources.addresses, data, crcs, bytes_per_s=MIB))
    child = fork.Process(
        target=in_child, args=(held, (plan, sources.addresses, *sources.empty_target()), there)
    )
    child.start()
    assert here.poll(60)
    assert here.recv() == [True] * 5
    child.join(60)
    assert child.exitcode == 0
    held[1].help()
    np.testing.assert_array_equal(data, sources.expected()[0])
    held[0].close()
