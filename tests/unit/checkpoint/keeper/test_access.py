"""Only who knows the token gets in, and it learns that the other side knows it, too."""

import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from everstep.checkpoint.keeper.access import (
    KEEPER,
    NONCE_BYTES,
    PROOF_BYTES,
    READER,
    TOKEN_BYTES,
    admit,
    checked_token,
    enter,
    new_token,
    proof,
)
from everstep.checkpoint.keeper.data_wire import Link

TOKEN = bytes(range(TOKEN_BYTES))
Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """The keeper's end and the other one."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(5)
        yield ours, theirs


def _soon(duration_s: float = 5.0) -> float:
    return time.monotonic() + duration_s


def _beside(run: Callable[[], Any]) -> Callable[[], Any]:
    """Run something in a thread; what it returns or raises, when it is asked for."""
    found: list[Any] = []

    def call() -> None:
        try:
            found.append(run())
        except OSError as error:
            found.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()

    def result() -> Any:
        thread.join(10)
        return found[0]

    return result


def _keeper(ours: socket.socket, duration_s: float = 5.0) -> Callable[[], Any]:
    def run() -> bool:
        try:
            return admit(Link(ours), TOKEN, _soon(duration_s))
        finally:
            ours.close()

    return _beside(run)


def _all_from(theirs: socket.socket) -> bytes:
    """Everything that arrives until the end of the connection."""
    data = b""
    try:
        while more := theirs.recv(2**16):
            data += more
    except ConnectionResetError:
        pass
    return data


def _recorded(sent: list[bytes]) -> bytes:
    """An honest handshake; what the reader sent, and then the keeper's proof, go to a list."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(5)
        keeper = _beside(lambda: admit(Link(ours), TOKEN, _soon()))
        nonce = theirs.recv(NONCE_BYTES)
        answer = bytes(NONCE_BYTES) + proof(TOKEN, READER, nonce, bytes(NONCE_BYTES))
        theirs.sendall(answer)
        shown = theirs.recv(PROOF_BYTES)
        assert keeper() is True
    sent += [answer, shown]
    return nonce


def test_a_proof_is_hmac_as_in_rfc_2104() -> None:
    nonces = bytes(range(32)), bytes(range(32, 64))
    key = TOKEN.ljust(64, b"\0")
    inner = hashlib.sha256(bytes(k ^ 0x36 for k in key) + READER + b"".join(nonces)).digest()
    expected = hashlib.sha256(bytes(k ^ 0x5C for k in key) + inner).digest()
    assert proof(TOKEN, READER, *nonces) == expected
    assert proof(TOKEN, KEEPER, *nonces) != expected
    assert proof(TOKEN, READER, *reversed(nonces)) != expected


def test_both_sides_get_in_with_the_same_token(pair: Pair) -> None:
    ours, theirs = pair
    keeper = _beside(lambda: admit(Link(ours), TOKEN, _soon()))
    assert enter(Link(theirs), TOKEN, _soon()) is True
    assert keeper() is True


def test_a_reader_with_another_token_gets_a_nonce_and_nothing_else(pair: Pair) -> None:
    ours, theirs = pair
    keeper = _keeper(ours)
    with pytest.raises(ConnectionError):
        enter(Link(theirs), new_token(), _soon())
    assert keeper() is False


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(10_000), b"\xff" * 64])
def test_a_stranger_gets_a_nonce_and_nothing_else(pair: Pair, sent: bytes) -> None:
    ours, theirs = pair
    keeper = _keeper(ours)
    theirs.sendall(sent)
    theirs.shutdown(socket.SHUT_WR)
    assert len(_all_from(theirs)) == NONCE_BYTES
    assert keeper() is not True


def test_every_connection_has_a_nonce_of_its_own() -> None:
    nonces = {_recorded([]) for _ in range(20)}
    assert len(nonces) == 20


def test_what_an_honest_reader_has_sent_does_not_get_in_again(pair: Pair) -> None:
    ours, theirs = pair
    sent: list[bytes] = []
    _recorded(sent)
    keeper = _keeper(ours)
    theirs.sendall(sent[0])
    assert len(_all_from(theirs)) == NONCE_BYTES
    assert keeper() is False


def test_a_proof_of_the_keeper_is_none_of_a_reader(pair: Pair) -> None:
    ours, theirs = pair
    keeper = _keeper(ours)
    nonce = theirs.recv(NONCE_BYTES)
    theirs.sendall(nonce + proof(TOKEN, KEEPER, nonce, nonce))
    assert _all_from(theirs) == b""
    assert keeper() is False


def test_a_keeper_that_sends_the_readers_proof_back_is_none(pair: Pair) -> None:
    ours, theirs = pair
    reader = _beside(lambda: enter(Link(ours), TOKEN, _soon()))
    theirs.sendall(bytes(NONCE_BYTES))
    answer = theirs.recv(NONCE_BYTES + PROOF_BYTES, socket.MSG_WAITALL)
    theirs.sendall(answer[NONCE_BYTES:])
    assert reader() is False


def test_a_keeper_with_another_token_is_none(pair: Pair) -> None:
    ours, theirs = pair
    reader = _beside(lambda: enter(Link(ours), TOKEN, _soon()))
    theirs.sendall(bytes(NONCE_BYTES))
    answer = theirs.recv(NONCE_BYTES + PROOF_BYTES, socket.MSG_WAITALL)
    theirs.sendall(proof(new_token(), KEEPER, bytes(NONCE_BYTES), answer[:NONCE_BYTES]))
    assert reader() is False


def test_a_peer_that_sends_a_byte_now_and_then_gains_no_time(pair: Pair) -> None:
    ours, theirs = pair
    begun_s = time.monotonic()
    keeper = _keeper(ours, 0.3)
    for _ in range(200):
        try:
            theirs.sendall(b"x")
        except OSError:
            break
        time.sleep(0.02)
    assert isinstance(keeper(), TimeoutError)
    assert time.monotonic() - begun_s < 3


def test_a_token_has_32_bytes_and_is_not_shown() -> None:
    assert len(new_token()) == TOKEN_BYTES
    assert new_token() != new_token()
    with pytest.raises(ValueError, match="6 bytes: expected 32") as raised:
        checked_token(b"secret")
    assert "secret" not in str(raised.value)
