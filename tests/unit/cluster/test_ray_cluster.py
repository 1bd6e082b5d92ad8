"""Calls to a cluster that may not answer; joining a real one is tested in tests/ray."""

import socket
import threading
import time

import pytest

from everstep.cluster import ray_cluster
from everstep.cluster.driver import PlacingAbandoned
from everstep.cluster.ray_cluster import answers, within


def test_a_call_is_waited_for_until_its_time_is_up() -> None:
    def fail() -> None:
        raise RuntimeError("the head is gone")

    began_s = time.monotonic()
    assert within(60.0, lambda: "done")
    assert within(60.0, fail)
    assert time.monotonic() - began_s < 30
    released = threading.Event()
    assert not within(0.05, lambda: released.wait(60))
    released.set()


def test_what_a_call_raised_is_told_and_the_waiting_can_be_given_up() -> None:
    error = ValueError("no")

    def fail() -> None:
        raise error

    assert ray_cluster._outcome(60.0, fail) == [error]
    assert ray_cluster._outcome(60.0, lambda: "answer") == [None]
    released = threading.Event()

    def give_up() -> None:
        raise PlacingAbandoned

    with pytest.raises(PlacingAbandoned):
        ray_cluster._outcome(60.0, lambda: released.wait(60), give_up)
    released.set()


def test_who_listens_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert answers(f"127.0.0.1:{port}")
    assert not answers(f"127.0.0.1:{port}")
