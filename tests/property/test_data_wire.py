"""Whatever arrives from a network is what was sent, a refusal, or an error; never anything else."""

import socket
import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from everstep.checkpoint.keeper.data_wire import (
    DATA,
    GONE,
    REFUSED,
    REQUEST_BYTES,
    Link,
    RefusedError,
    Request,
    WireError,
    decode_request,
    encode_request,
    encode_slots,
    receive_data,
    receive_slots,
    send_frame,
)
from everstep.checkpoint.lineage import StepId

KINDS = st.sampled_from([DATA, REFUSED, GONE, 0, 7])
U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)


def _sent(kind: int, payload: bytes) -> bytes:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send_frame(Link(ours), kind, memoryview(payload), time.monotonic() + 5)
        ours.close()
        return b"".join(iter(lambda: theirs.recv(2**16), b""))


def _received(stream: bytes, n_bytes: int) -> bytes | None:
    """What a reader gets that expects so many bytes; None where it gets an error."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(stream)
        theirs.close()
        target = np.zeros(n_bytes, np.uint8)
        try:
            receive_data(Link(ours), target.data, time.monotonic() + 5)
        except (WireError, RefusedError, ConnectionError):
            return None
        return target.tobytes()


@given(kind=KINDS, payload=st.binary(max_size=1200), n_bytes=st.integers(0, 1200))
def test_only_a_whole_frame_of_the_right_size_is_data(
    kind: int, payload: bytes, n_bytes: int
) -> None:
    expected = payload if kind == DATA and len(payload) == n_bytes else None
    assert _received(_sent(kind, payload), n_bytes) == expected


@given(payload=st.binary(min_size=1, max_size=300), data=st.data())
def test_no_changed_frame_is_data(payload: bytes, data: st.DataObject) -> None:
    stream = bytearray(_sent(DATA, payload))
    at = data.draw(st.integers(0, len(stream) - 1))
    stream[at] ^= data.draw(st.integers(1, 255))
    assert _received(bytes(stream), len(payload)) is None
    assert _received(bytes(stream[:at]), len(payload)) is None


@given(stream=st.binary(max_size=200))
def test_noise_is_an_error(stream: bytes) -> None:
    assert _received(stream, 100) is None
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(stream)
        theirs.close()
        try:
            found = receive_slots(Link(ours), time.monotonic() + 5)
        except (WireError, RefusedError, ConnectionError):
            return
        assert stream == _sent(DATA, encode_slots(found))


@given(
    kind=U32, rank=U32, generation=U64, step=U64, offset=U64, n_bytes=U64, ms=st.integers(1, 10**6)
)
def test_a_request_comes_back_or_is_refused(
    kind: int, rank: int, generation: int, step: int, offset: int, n_bytes: int, ms: int
) -> None:
    request = Request(
        kind=kind % 4,
        timeout_s=ms / 1000,
        rank=rank,
        step_id=StepId(generation, step),
        offset=offset,
        n_bytes=n_bytes,
    )
    try:
        found = decode_request(encode_request(request))
    except WireError:
        assert request.kind not in (1, 2)
        return
    assert abs(found.timeout_s - request.timeout_s) <= 0.001
    assert found == Request(**{**vars(request), "timeout_s": found.timeout_s})


@given(data=st.binary(min_size=REQUEST_BYTES - 1, max_size=REQUEST_BYTES + 1))
def test_noise_is_no_request(data: bytes) -> None:
    try:
        found = decode_request(data)
    except WireError:
        return
    assert encode_request(found) == data
