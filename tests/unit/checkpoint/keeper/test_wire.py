"""Frames over a Unix socket."""

import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.checkpoint.keeper.wire import (
    MAX_BODY_BYTES,
    MAX_DESCRIPTORS,
    Channel,
    Frame,
    WireError,
)

Pair = tuple[Channel, Channel, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two ends, and the socket of the first."""
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    first, second = Channel(a), Channel(b)
    yield first, second, a
    first.close()
    second.close()


def test_frames_arrive_with_their_descriptors(pair: Pair) -> None:
    first, second, _ = pair
    read, write = os.pipe()
    first.send({"n": 1})
    first.send({"n": 2}, [write])
    first.send({"n": 3}, [read, write])
    os.close(read)
    os.close(write)
    frames: list[Frame] = []
    while len(frames) < 3:
        frames += second.receive()
    assert [(f.body["n"], len(f.fds)) for f in frames] == [(1, 0), (2, 1), (3, 2)]
    os.write(frames[1].fds[0], b"x")
    assert os.read(frames[2].fds[0], 1) == b"x"
    assert not os.get_inheritable(frames[1].fds[0])
    for frame in frames:
        frame.close()


def test_what_does_not_fit_waits(pair: Pair) -> None:
    first, second, ours = pair
    ours.setblocking(False)
    body = {"text": "x" * (MAX_BODY_BYTES - 100)}
    first.send(body)
    first.send({"n": 2})
    assert first.unsent
    frames: list[Frame] = []
    while len(frames) < 2:
        frames += second.receive()
        first.flush()
    assert not first.unsent
    assert [f.body for f in frames] == [body, {"n": 2}]
    for _ in range(9):
        first.send(body)
    with pytest.raises(WireError, match="does not read"):
        first.send(body)


def test_frames_are_bounded(pair: Pair) -> None:
    first, second, ours = pair
    with pytest.raises(WireError, match="too large"):
        first.send({"text": "x" * MAX_BODY_BYTES})
    with pytest.raises(WireError, match="too large"):
        first.send({}, [0] * (MAX_DESCRIPTORS + 1))
    ours.sendall(b"evk1\xff\xff\xff\xff\x00")
    with pytest.raises(WireError, match="no frame"):
        second.receive()


@pytest.mark.parametrize(
    ("head", "body", "why"),
    [
        (b"evk1\x02\x00\x00\x00\x01", b"{}", "without its descriptors"),
        (b"evk1\x02\x00\x00\x00\x00", b"[]", "no JSON object"),
        (b"evk1\x02\x00\x00\x00\x00", b"{x", "not JSON"),
        (b"evk2\x02\x00\x00\x00\x00", b"{}", "no frame"),
        (b"evk1\x00\x80\x00\x00\x00", b"[" * 0x8000, "not JSON"),
    ],
)
def test_what_is_no_frame_is_refused(pair: Pair, head: bytes, body: bytes, why: str) -> None:
    _, second, ours = pair
    ours.sendall(head + body)
    with pytest.raises(WireError, match=why):
        _receive_for_ever(second)


def _receive_for_ever(channel: Channel) -> None:
    while True:
        channel.receive()


def test_the_end(pair: Pair) -> None:
    first, second, _ = pair
    first.close()
    with pytest.raises(EOFError):
        second.receive()
    with pytest.raises(OSError):
        second.send({})


@given(st.binary(min_size=1, max_size=64), st.booleans())
def test_whatever_comes_is_a_frame_or_an_error(data: bytes, begins_well: bool) -> None:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    channel = Channel(b)
    with a:
        a.sendall((b"evk1" if begins_well else b"") + data)
        try:
            for frame in channel.receive():
                assert isinstance(frame.body, dict)
        except WireError:
            pass
    channel.close()
