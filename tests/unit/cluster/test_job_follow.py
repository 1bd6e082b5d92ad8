"""Following a job: nothing is lost or shown twice, and a connection that breaks is made again."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from everstep.cluster.job_errors import ConnectionLostError, UnknownJobError
from everstep.cluster.job_follow import RECONNECT_S, WAITING_AFTER_S, Follower
from everstep.cluster.job_record import JobRecord
from tests.support.fake_jobs import FakeJobServer

LOG = "one\ntwo\nthree\neverstep job ended with exit code 75\n"


class Clock:
    """Time passes only by sleeping."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        await asyncio.sleep(0)


class Followed:
    """A follower and what it said."""

    def __init__(self, server: FakeJobServer, seen_chars: int = 0, idle_s: float = 60.0) -> None:
        self.shown: list[str] = []
        self.notices: list[str] = []
        clock = Clock()
        self.follower = Follower(
            server,
            "a",
            show=self.shown.append,
            notice=self.notices.append,
            seen_chars=seen_chars,
            clock=clock,
            sleep=clock.sleep,
            idle_s=idle_s,
        )


def server_with(status: str, after: int, then: str) -> FakeJobServer:
    """Job 'a' is in ``status`` for the first ``after`` questions, and in ``then`` from then on."""
    server = FakeJobServer(JobRecord(id="a", status=status))
    asked = 0

    def on_get() -> None:
        nonlocal asked
        asked += 1
        if asked > after:
            server.change("a", then)

    server.on_get = on_get
    server.outputs["a"] = LOG
    return server


def test_output_comes_and_the_end_is_told() -> None:
    followed = Followed(server_with("RUNNING", 1, "STOPPED"))
    record = followed.follower.follow()
    assert record is not None
    assert record.status == "STOPPED"
    assert followed.shown == ["one", "two", "three"]
    assert followed.follower.told_exit_code == 75
    assert followed.notices == []


def test_only_what_is_new() -> None:
    followed = Followed(server_with("RUNNING", 1, "STOPPED"), seen_chars=len("one\n"))
    followed.follower.follow()
    assert followed.shown == ["two", "three"]


def test_a_broken_stream_is_read_again() -> None:
    server = server_with("RUNNING", 3, "STOPPED")
    server.outputs["a"] = "one\ntwo\n"
    server.tails = [["one\ntw"], ["one\n"], [LOG]]
    followed = Followed(server)
    followed.follower.follow()
    assert followed.shown == ["one", "two", "three"]
    assert followed.notices == []


def test_a_cluster_that_is_away_for_a_moment() -> None:
    server = server_with("RUNNING", 3, "STOPPED")
    followed = Followed(server)
    answer = server.on_get

    def get_again() -> None:
        if followed.notices:
            answer()
        else:
            server.connection_errors = 9

    server.on_get = get_again
    followed.follower.follow()
    assert followed.shown == ["one", "two", "three"]
    assert ["connection lost" in x for x in followed.notices] == [True, False]
    assert followed.notices[1] == "connected again"


def test_a_job_that_waits_is_said_to_wait() -> None:
    followed = Followed(server_with("PENDING", int(WAITING_AFTER_S) + 4, "STOPPED"))
    followed.follower.follow()
    assert len(followed.notices) == 1
    assert "waiting for the cluster to start the job" in followed.notices[0]


def test_gives_up_in_time_when_the_cluster_is_gone() -> None:
    server = server_with("RUNNING", 0, "RUNNING")
    followed = Followed(server)
    server.on_get = lambda: setattr(server, "connection_errors", 10**6)
    with pytest.raises(ConnectionLostError):
        followed.follower.follow()
    assert followed.notices == [
        f"connection lost (connection refused); trying again for {RECONNECT_S:g} s"
    ]


def test_a_stream_that_brings_nothing_is_made_again() -> None:
    server = server_with("RUNNING", 1, "STOPPED")

    async def dead(job_id: str) -> AsyncIterator[str]:
        yield "one\n"
        await asyncio.sleep(60)

    server.tail = dead  # type: ignore[method-assign]
    followed = Followed(server, idle_s=0.05)
    followed.follower.follow()
    assert followed.shown == ["one", "two", "three"]


def test_deadline() -> None:
    server = server_with("RUNNING", 10**6, "STOPPED")

    async def dead(job_id: str) -> AsyncIterator[str]:
        await asyncio.sleep(60)
        yield ""

    server.tail = dead  # type: ignore[method-assign]
    assert Followed(server).follower.follow(deadline_s=0.05) is None


def test_unknown_job() -> None:
    server = server_with("RUNNING", 1, "STOPPED")
    server.records = {"ab": server.records["a"]}
    server.on_get = lambda: None
    with pytest.raises(UnknownJobError, match="no job 'a'; did you mean ab"):
        Followed(server).follower.follow()
