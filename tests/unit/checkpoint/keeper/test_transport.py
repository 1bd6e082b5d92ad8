"""Slots are read over TCP by those with the token; strangers get nothing, mishaps are noticed."""

import contextlib
import pickle
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from everstep.checkpoint.errors import KeeperError
from everstep.checkpoint.keeper.access import NONCE_BYTES, PROOF_BYTES, admit, enter, new_token
from everstep.checkpoint.keeper.data_wire import (
    BLOCK_BYTES,
    DATA,
    LIST,
    READ,
    REFUSED,
    REQUEST_BYTES,
    Link,
    Request,
    WireError,
    decode_request,
    encode_request,
    send_frame,
)
from everstep.checkpoint.keeper.remote_slots import RemoteSlots, SlotGoneError
from everstep.checkpoint.keeper.transport import DataPlane, Limits, address_of
from everstep.checkpoint.kernels import crc32c
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.snapshots.slot_format import PAGE_BYTES
from tests.support.memory_slots import FakeSlots, seal_and_part, sealed_slots
from tests.support.tcp_proxy import TcpProxy
from tests.support.written_steps import Cut, random_bits

TOKEN = new_token()
STEP = StepId(1, 5)
HANDSHAKE_BYTES = NONCE_BYTES + PROOF_BYTES
FRAME_HEAD_BYTES = 12


@pytest.fixture(scope="module")
def sealed() -> list[np.ndarray]:
    """Slots of two ranks, of 2 MiB and some."""
    cuts = {"t": Cut("I16", random_bits((1000, 2200), "I16"), ([500], []))}
    return sealed_slots(cuts, step=STEP.step)


@pytest.fixture
def slots(sealed: list[np.ndarray]) -> FakeSlots:
    return FakeSlots({(rank, STEP): slot.copy() for rank, slot in enumerate(sealed)})


def _plane(slots: FakeSlots, **limits: Any) -> DataPlane:
    return DataPlane(
        slots.read, TOKEN, sealed_slots=slots.sealed, limits=replace(Limits(), **limits)
    )


@pytest.fixture
def plane(slots: FakeSlots) -> Iterator[DataPlane]:
    with _plane(slots) as made:
        yield made
    assert slots.pinned == 0


def _read(remote: RemoteSlots, offset: int = 0, n_bytes: int = 4096, rank: int = 0) -> np.ndarray:
    found = np.empty(n_bytes, np.uint8)
    remote.read_into(rank, STEP, offset, found)
    return found


def _connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)), 5)
    connection.settimeout(5)
    return connection


def _all_from(connection: socket.socket) -> bytes:
    data = b""
    try:
        while more := connection.recv(2**16):
            data += more
    except ConnectionResetError:
        pass
    return data


def _soon(duration_s: float = 5.0) -> float:
    return time.monotonic() + duration_s


def _eventually(condition: Callable[[], bool]) -> bool:
    deadline_s = _soon()
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.005)
    return condition()


# What works


@pytest.mark.parametrize(
    ("offset", "n_bytes"),
    [(0, 0), (0, 1), (4095, 2), (7, BLOCK_BYTES), (1, BLOCK_BYTES + 1), (0, 2 * 2**20 + 1)],
)
def test_any_range_of_a_slot_is_read(
    plane: DataPlane, slots: FakeSlots, offset: int, n_bytes: int
) -> None:
    with RemoteSlots(plane.address, TOKEN) as remote:
        for rank in (0, 1):
            found = _read(remote, offset, n_bytes, rank)
            np.testing.assert_array_equal(found, slots.slots[rank, STEP][offset:][:n_bytes])


def test_threads_share_a_reader(plane: DataPlane, slots: FakeSlots) -> None:
    with RemoteSlots(plane.address, TOKEN) as remote, ThreadPoolExecutor(6) as pool:
        found = pool.map(lambda at: _read(remote, at * 4096, 4096), range(200))
        for at, data in enumerate(found):
            np.testing.assert_array_equal(data, slots.slots[0, STEP][at * 4096 :][:4096])


def test_all_that_is_sealed_is_told(plane: DataPlane, slots: FakeSlots) -> None:
    with RemoteSlots(plane.address, TOKEN) as remote:
        assert remote.holdings() == [seal_and_part(slot) for slot in slots.slots.values()]
        slots.slots.clear()
        assert remote.holdings() == []


@pytest.mark.parametrize("damage", ["unsealed", "part", "another step", "gone"])
def test_a_slot_that_is_not_whole_is_not_told(
    plane: DataPlane, slots: FakeSlots, damage: str
) -> None:
    slot = slots.slots[0, STEP]
    if damage == "unsealed":
        slot[:PAGE_BYTES] = 0
    elif damage == "part":
        slot[PAGE_BYTES + 3] ^= 1
    elif damage == "another step":
        slots.slots[0, StepId(1, 6)] = slots.slots.pop((0, STEP))
    else:
        listed = slots.sealed()
        slots.sealed = lambda: listed  # type: ignore[method-assign]
        with _plane(slots) as late, RemoteSlots(late.address, TOKEN) as remote:
            del slots.slots[0, STEP]
            assert [seal.rank for seal, _ in remote.holdings()] == [1]
        return
    with RemoteSlots(plane.address, TOKEN) as remote:
        assert [seal.rank for seal, _ in remote.holdings()] == [1]


def test_what_is_not_there_is_refused_and_the_connection_lives_on(plane: DataPlane) -> None:
    with RemoteSlots(plane.address, TOKEN) as remote:
        for rank, step_id in ((2, STEP), (0, StepId(1, 4)), (0, StepId(2, 5))):
            with pytest.raises(SlotGoneError, match=f"rank {rank} has no sealed slot"):
                remote.read_into(rank, step_id, 0, np.empty(10, np.uint8))
        with pytest.raises(KeeperError, match=r"the slot has \d+ bytes, not 9223372036854775817"):
            remote.read_into(0, STEP, 2**63, np.empty(9, np.uint8))
        assert len(_read(remote)) == 4096


def test_a_keeper_that_was_started_again_is_found_again(slots: FakeSlots) -> None:
    with _plane(slots) as first:
        remote = RemoteSlots(first.address, TOKEN)
        expected = _read(remote)
    with pytest.raises(KeeperError, match="no keeper can be reached"):
        _read(remote)
    with DataPlane(
        slots.read, TOKEN, sealed_slots=slots.sealed, port=int(first.address.rpartition(":")[2])
    ):
        np.testing.assert_array_equal(_read(remote), expected)
        remote.close()
        np.testing.assert_array_equal(_read(remote), expected)
        remote.close()


# Where it listens


def test_it_listens_on_loopback_or_on_one_interface(slots: FakeSlots) -> None:
    names = {name for _, name in socket.if_nameindex()}
    for interface in (None, "lo"):
        with DataPlane(slots.read, TOKEN, sealed_slots=slots.sealed, interface=interface) as plane:
            assert plane.address.startswith("127.0.0.1:")
    with pytest.raises(KeeperError, match=r"'nope0' has no IPv4 address.*lo \(127\.0\.0\.1\)"):
        DataPlane(slots.read, TOKEN, sealed_slots=slots.sealed, interface="nope0")
    for odd in ("", "0.0.0.0", "127.0.0.1", "x" * 40, "l\0o"):
        assert odd not in names
        with pytest.raises(KeeperError, match="has no IPv4 address"):
            address_of(odd)


def test_a_port_that_is_taken_is_named(plane: DataPlane, slots: FakeSlots) -> None:
    port = int(plane.address.rpartition(":")[2])
    with pytest.raises(KeeperError, match=f"cannot listen on 127.0.0.1:{port}"):
        DataPlane(slots.read, TOKEN, sealed_slots=slots.sealed, port=port)


@pytest.mark.parametrize("address", ["", "host", ":80", "host:", "host:x", "host:0", "host:65536"])
def test_an_address_is_a_host_and_a_port(address: str) -> None:
    with pytest.raises(ValueError, match="expected 'host:port'"):
        RemoteSlots(address, TOKEN)


# Strangers


def _garbage() -> list[bytes]:
    read = encode_request(Request(kind=READ, timeout_s=5, step_id=STEP, n_bytes=4096))
    rng = np.random.default_rng(0)
    return [
        b"",
        b"\0",
        read,
        read * 100,
        bytes(HANDSHAKE_BYTES) + read,
        b"GET / HTTP/1.1\r\nHost: keeper\r\n\r\n",
        b'{"cmd": "list"}\n' * 5000,
        b"\xff" * 2**20,
        rng.integers(0, 256, 4096, np.uint8).tobytes(),
        b"\x80\x04cposix\nsystem\n",
    ]


@pytest.mark.parametrize("sent", _garbage(), ids=lambda sent: f"{len(sent)} bytes")
def test_a_stranger_gets_no_byte_of_a_slot(plane: DataPlane, slots: FakeSlots, sent: bytes) -> None:
    with _connect(plane.address) as connection:
        with contextlib.suppress(OSError):  # it may have been closed already
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
        received = _all_from(connection)
    assert len(received) <= NONCE_BYTES
    assert not _shares_bytes(received, slots)
    assert not slots.asked


def test_a_wrong_token_gets_no_byte_of_a_slot(plane: DataPlane, slots: FakeSlots) -> None:
    with TcpProxy(plane.address) as proxy, RemoteSlots(proxy.address, new_token()) as remote:
        with pytest.raises(KeeperError, match="did not let this process in"):
            _read(remote)
        with pytest.raises(KeeperError, match="did not let this process in"):
            remote.holdings()
    assert len(proxy.seen) == 2 * NONCE_BYTES
    assert not _shares_bytes(bytes(proxy.seen), slots)


def test_what_was_overheard_is_worth_nothing(plane: DataPlane, slots: FakeSlots) -> None:
    with TcpProxy(plane.address) as proxy, RemoteSlots(proxy.address, TOKEN) as remote:
        _read(remote)
    assert len(proxy.asked) == HANDSHAKE_BYTES + REQUEST_BYTES
    with _connect(plane.address) as connection:
        connection.sendall(proxy.asked)
        received = _all_from(connection)
    assert len(received) <= NONCE_BYTES
    assert not _shares_bytes(received, slots)


def _shares_bytes(received: bytes, slots: FakeSlots) -> bool:
    """Whether eight bytes in a row, not all zeros, are also near the beginning of a slot."""
    held = b"".join(slot[: 2**16].tobytes() for slot in slots.slots.values())
    eights = {received[at : at + 8] for at in range(len(received) - 7)}
    return any(any(eight) and eight in held for eight in eights)


def test_strangers_do_not_keep_others_out(slots: FakeSlots) -> None:
    with _plane(slots, strangers=4) as plane, RemoteSlots(plane.address, TOKEN) as remote:
        idle = [_connect(plane.address) for _ in range(12)]
        assert len(_read(remote)) == 4096
        for connection in idle[:8]:  # a newer one has taken the place of each
            assert len(_all_from(connection)) <= NONCE_BYTES
        for connection in idle:
            connection.close()


def test_a_stranger_has_seconds_in_all(slots: FakeSlots) -> None:
    with _plane(slots, handshake_s=0.2) as plane, _connect(plane.address) as connection:
        begun_s = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - begun_s < 4:
                connection.sendall(b"x")
                time.sleep(0.02)
        assert time.monotonic() - begun_s < 4
        assert len(_all_from(connection)) <= NONCE_BYTES


# Readers that misbehave


def _reader(plane: DataPlane) -> tuple[socket.socket, Link]:
    connection = _connect(plane.address)
    link = Link(connection)
    assert enter(link, TOKEN, _soon())
    return connection, link


@pytest.mark.parametrize(
    "request_bytes",
    [
        bytes(REQUEST_BYTES),
        encode_request(Request(kind=9, timeout_s=1)),
        encode_request(Request(kind=READ, timeout_s=1, step_id=STEP, n_bytes=9))[:-1] + b"\0",
    ],
)
def test_a_damaged_request_ends_the_connection(plane: DataPlane, request_bytes: bytes) -> None:
    connection, link = _reader(plane)
    with connection:
        link.send(request_bytes, deadline_s=_soon())
        assert _all_from(connection) == b""
    with pytest.raises(WireError):
        decode_request(request_bytes)


def test_a_request_for_too_much_is_refused(plane: DataPlane) -> None:
    connection, link = _reader(plane)
    with connection:
        for offset, n_bytes in ((0, 2**64 - 1), (2**64 - 1, 2**64 - 1), (2**64 - 1, 1)):
            request = Request(kind=READ, timeout_s=5, step_id=STEP, offset=offset, n_bytes=n_bytes)
            link.send(encode_request(request), deadline_s=_soon())
            kind, length, _ = struct.unpack("<III", link.receive(FRAME_HEAD_BYTES, _soon()))
            assert kind == REFUSED
            assert str(offset + n_bytes) in link.receive(length, _soon()).decode()


def test_a_reader_that_takes_nothing_lets_go_of_the_slot(slots: FakeSlots) -> None:
    slots.slots[0, STEP] = np.zeros(256 * 2**20, np.uint8)
    with _plane(slots, block_s=0.3) as plane:
        connection, link = _reader(plane)
        with connection:
            request = Request(kind=READ, timeout_s=60, step_id=STEP, n_bytes=256 * 2**20)
            link.send(encode_request(request), deadline_s=_soon())
            assert _eventually(lambda: slots.pinned == 1)
            assert _eventually(lambda: slots.pinned == 0)


def test_a_reader_that_is_silent_is_let_go(slots: FakeSlots) -> None:
    with _plane(slots, idle_s=0.1) as plane, RemoteSlots(plane.address, TOKEN) as remote:
        connection, _ = _reader(plane)
        with connection:
            assert _all_from(connection) == b""
        _read(remote)
        time.sleep(0.3)
        _read(remote)  # on a new connection


def test_there_is_a_largest_number_of_readers(slots: FakeSlots) -> None:
    with _plane(slots, readers=1) as plane, RemoteSlots(plane.address, TOKEN) as second:
        with RemoteSlots(plane.address, TOKEN) as first:
            _read(first)
            for _ in range(2):
                with pytest.raises(KeeperError, match="serves 1 connections already; try again"):
                    _read(second)
            _read(first)

        def let_in() -> bool:
            try:
                return len(_read(second)) > 0
            except KeeperError:
                return False

        assert _eventually(let_in)


def test_closing_ends_what_is_under_way(slots: FakeSlots) -> None:
    slots.slots[0, STEP] = np.zeros(256 * 2**20, np.uint8)
    plane = _plane(slots)
    connection, link = _reader(plane)
    with connection, _connect(plane.address) as stranger:
        request = Request(kind=READ, timeout_s=60, step_id=STEP, n_bytes=256 * 2**20)
        link.send(encode_request(request), deadline_s=_soon())
        assert _eventually(lambda: slots.pinned == 1)
        plane.close()
        plane.close()
        assert slots.pinned == 0
        assert len(_all_from(stranger)) <= NONCE_BYTES
    names = {thread.name for thread in threading.enumerate()}
    assert not names & {"everstep-data-plane", "everstep-reader"}


# Keepers and networks that misbehave


@pytest.mark.parametrize("at", [0, 3, 4, 7, 8, 11, 12, 13, 2000, 12 + 4095])
@pytest.mark.parametrize("bit", [0, 7])
def test_a_bit_that_flips_on_the_way_is_noticed(plane: DataPlane, at: int, bit: int) -> None:
    def flip(seen: int, data: bytes) -> bytes:
        where = HANDSHAKE_BYTES + at - seen
        if not 0 <= where < len(data):
            return data
        return data[:where] + bytes([data[where] ^ 1 << bit]) + data[where + 1 :]

    with (
        TcpProxy(plane.address, flip) as proxy,
        RemoteSlots(proxy.address, TOKEN, timeout_s=1) as remote,
        pytest.raises(KeeperError, match=rf"at {proxy.address}.*arrived") as raised,
    ):
        _read(remote)
    assert str(raised.value).count("\n") == 0


def test_a_bit_that_flips_in_the_handshake_lets_nobody_in(plane: DataPlane) -> None:
    def flip(seen: int, data: bytes) -> bytes:
        return data[:5] + bytes([data[5] ^ 4]) + data[6:] if seen == NONCE_BYTES else data

    with (
        TcpProxy(plane.address, flip) as proxy,
        RemoteSlots(proxy.address, TOKEN) as remote,
        pytest.raises(KeeperError, match="does not know the job's token"),
    ):
        _read(remote)


@pytest.mark.parametrize("cut", [0, 10, NONCE_BYTES, HANDSHAKE_BYTES, HANDSHAKE_BYTES + 6, 1000])
def test_a_keeper_that_falls_silent_is_late(plane: DataPlane, cut: int) -> None:
    def drop(seen: int, data: bytes) -> bytes | None:
        return data[: cut - seen] or None if seen < cut else None

    with (
        TcpProxy(plane.address, drop) as proxy,
        RemoteSlots(proxy.address, TOKEN, timeout_s=0.2) as remote,
        pytest.raises(KeeperError, match=r"is late|does not answer in time") as raised,
    ):
        _read(remote)
    assert proxy.address in str(raised.value)


def _frame(kind: int, payload: bytes, n_bytes: int | None = None) -> bytes:
    head = struct.pack("<II", kind, len(payload) if n_bytes is None else n_bytes)
    return head + struct.pack("<I", crc32c(payload, crc32c(head))) + payload


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"", "is gone"),
        (_frame(DATA, bytes(4096))[:-1], "is gone"),
        (_frame(DATA, b"")[:5], "is gone"),
        (_frame(DATA, bytes(4095)), "a frame of 4095 bytes arrived, expected 4096"),
        (_frame(DATA, b"", 2**32 - 1), "a frame of 4294967295 bytes arrived"),
        (_frame(77, bytes(4096)), "a frame of kind 77 with 4096 bytes arrived"),
        (_frame(REFUSED, b"x", 2**31), "a frame of kind 2 with 2147483648 bytes"),
        (_frame(REFUSED, b"no such luck"), "refuses .*: no such luck"),
        (_frame(REFUSED, b"\xff\xfe"), "refuses"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "arrived, expected data"),
    ],
)
def test_a_keeper_that_answers_nonsense_is_an_error(answer: bytes, expected: str) -> None:
    with (
        _Impostor(answer) as address,
        RemoteSlots(address, TOKEN, timeout_s=5) as remote,
        pytest.raises(KeeperError, match=expected) as raised,
    ):
        _read(remote)
    assert address in str(raised.value)
    again = pickle.loads(pickle.dumps(raised.value))
    assert type(again) is type(raised.value)
    assert str(again) == str(raised.value)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (_frame(DATA, bytes(19)), "a list of 19 bytes arrived"),
        (_frame(DATA, b"", 20 * 10**8), "a list of 2000000000 bytes arrived"),
        (_frame(DATA, bytes(20))[:-1] + b"\1", "bytes arrived with checksum"),
    ],
)
def test_a_list_that_is_none_is_an_error(answer: bytes, expected: str) -> None:
    with (
        _Impostor(answer) as address,
        RemoteSlots(address, TOKEN) as remote,
        pytest.raises(KeeperError, match=expected),
    ):
        remote.holdings()


class _Impostor:
    """A keeper that knows the token, takes one request, sends some bytes, and hangs up."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> str:
        self._thread.start()
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self._thread.join(5)
        self._listener.close()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            link = Link(connection)
            assert admit(link, TOKEN, _soon())
            request = decode_request(link.receive(REQUEST_BYTES, _soon()))
            assert request.kind in (LIST, READ)
            with contextlib.suppress(OSError):  # the reader may hang up at the first wrong byte
                connection.sendall(self._answer)
                connection.shutdown(socket.SHUT_WR)
                connection.recv(1)


def test_a_frame_is_what_the_format_says() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send_frame(Link(ours), DATA, memoryview(b"123456789"), _soon())
        assert theirs.recv(100) == _frame(DATA, b"123456789")
    request = Request(
        kind=READ, timeout_s=1.5, rank=3, step_id=StepId(2, 70), offset=2**40, n_bytes=8
    )
    coded = encode_request(request)
    assert coded[:44] == struct.pack("<IIIQQQQ", 2, 3, 1500, 2, 70, 2**40, 8)
    assert decode_request(coded) == request
