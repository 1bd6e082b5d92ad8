"""The thread that assembles batches ahead: its errors, its end, forks, and how far it goes."""

import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from everstep.trainer.data import MicroBatch, TrainStream
from everstep.trainer.data.prefetch import PrefetchedStream, prefetched
from everstep.trainer.errors import DataError
from tests.support.corpora import counting_corpus, data_config


def stream() -> TrainStream:
    return TrainStream(counting_corpus(2000), data_config(micro_batch=2), 5, 0, 1)


def samples(batches: list[MicroBatch]) -> list[int]:
    return [int(sample) for batch in batches for sample in batch.sample_B]


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "everstep-prefetch"]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


class Broken:
    """A stream whose reading fails at some of its calls."""

    samples_per_epoch = 100

    def __init__(self, *failing_calls: int) -> None:
        self.failing_calls = failing_calls
        self.calls = 0
        self.position = 0

    def next_step(self) -> list[MicroBatch]:
        self.calls += 1
        if self.calls in self.failing_calls:
            raise DataError(f"call {self.calls}")
        self.position += 1
        return []

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["position"] < 0:
            raise DataError("negative")
        self.position = state["position"]


def test_it_works_ahead_by_so_many_steps_and_no_more() -> None:
    inner = Broken()
    with prefetched(inner, 3) as ahead:
        assert inner.calls == 0  # nothing before the first batch is asked for
        ahead.next_step()
        wait_for(lambda: inner.calls == 4)
        time.sleep(0.02)
        assert (inner.calls, ahead.position) == (4, 1)
    assert not threads()
    assert inner.position == 1


def test_without_steps_it_is_the_stream_itself() -> None:
    inner = stream()
    with prefetched(inner, 0) as ahead:
        assert ahead is inner
    with pytest.raises(ValueError, match="steps=0"):
        PrefetchedStream(inner, 0)


def test_an_error_comes_at_the_step_that_would_have_met_it() -> None:
    inner = Broken(3)
    with prefetched(inner, 2) as ahead:
        ahead.next_step()
        wait_for(lambda: inner.calls == 3)
        ahead.next_step()
        with pytest.raises(DataError, match="call 3"):
            ahead.next_step()
        assert (ahead.position, ahead.state_dict()) == (2, {"position": 2})
        ahead.next_step()  # tried again, as without a thread
        assert ahead.position == 3


def test_an_error_that_nobody_meets_is_none() -> None:
    inner = Broken(2)
    with prefetched(inner, 1) as ahead:
        ahead.next_step()
        wait_for(lambda: inner.calls == 2)
    assert not threads()
    assert inner.position == 1


def test_a_state_that_is_refused_changes_nothing() -> None:
    with prefetched(Broken(), 2) as ahead:
        for _ in range(3):
            ahead.next_step()
        with pytest.raises(DataError, match="negative"):
            ahead.load_state_dict({"position": -1})
        assert ahead.position == 3
        ahead.next_step()
        assert ahead.position == 4


def test_an_exception_in_the_run_ends_the_thread() -> None:
    def interrupted() -> None:
        with prefetched(stream(), 2) as ahead:
            ahead.next_step()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not threads()


def test_a_read_that_hangs_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("everstep.trainer.data.prefetch.JOIN_S", 0.01)
    release = threading.Event()
    inner = Broken()
    read = inner.next_step

    def hang() -> list[MicroBatch]:
        batches = read()
        if inner.calls > 1:
            release.wait(20)
        return batches

    inner.next_step = hang  # type: ignore[method-assign]
    with prefetched(inner, 1) as ahead:
        ahead.next_step()
        wait_for(lambda: inner.calls == 2)
    assert len(threads()) == 1
    release.set()
    wait_for(lambda: not threads())


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_goes_on_by_itself() -> None:
    with prefetched(stream(), 2) as ahead:
        reference = [samples(ahead.next_step()) for _ in range(2)]
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                found = samples(ahead.next_step())
                ahead.close()
                os.write(write_end, repr(found).encode())
                code = 0
            finally:
                os._exit(code)
        os.close(write_end)
        assert os.waitpid(pid, 0)[1] == 0
        with os.fdopen(read_end) as answer:
            assert answer.read() == repr(samples(ahead.next_step()))
        assert reference == [[0, 1, 2, 3], [4, 5, 6, 7]]
