"""Who may read from a keeper over the network: whoever knows the job's token.

Both sides prove that they know it, and neither sends it. The reader proves it first, so that a
stranger who connects gets 32 random bytes, whatever he sends, and then the end of the connection::

    keeper -> reader   nonce of the keeper, 32 bytes
    reader -> keeper   nonce of the reader, 32 bytes | proof of the reader, 32 bytes
    keeper -> reader   proof of the keeper, 32 bytes

A proof is HMAC-SHA256 (RFC 2104, FIPS 180-4) under the token over a label of the side, which also
names the version, and both nonces. The labels make a proof that is sent back to its author
worthless, the nonces one that was overheard. Nothing is encrypted: whoever can read or change the
packets of others on the network, can read and change what they carry.
"""

import hashlib
import hmac
import secrets

from everstep.checkpoint.keeper.data_wire import Link

TOKEN_BYTES = 32
NONCE_BYTES = 32
PROOF_BYTES = 32
KEEPER = b"everstep data plane 1, keeper:"
READER = b"everstep data plane 1, reader:"


def new_token() -> bytes:
    """A token for a job."""
    return secrets.token_bytes(TOKEN_BYTES)


def checked_token(token: bytes) -> bytes:
    """The token itself; raises ValueError where it has another size, and does not show it."""
    if len(token) != TOKEN_BYTES:
        raise ValueError(
            f"a token of {len(token)} bytes: expected {TOKEN_BYTES} random ones, as new_token() "
            "gives them"
        )
    return token


def proof(token: bytes, side: bytes, keeper_nonce: bytes, reader_nonce: bytes) -> bytes:
    """What only those can compute who know the token.

    Args:
        token: of the job.
        side: who proves it, ``KEEPER`` or ``READER``.
        keeper_nonce: 32 random bytes that the keeper chose for this connection.
        reader_nonce: those of the reader.
    """
    return hmac.digest(token, side + keeper_nonce + reader_nonce, hashlib.sha256)


def admit(link: Link, token: bytes, deadline_s: float) -> bool:
    """The keeper's side: whether the peer knows the token; only then it learns that we do.

    Raises:
        OSError: it did not finish by the deadline, or went away.
    """
    nonce = secrets.token_bytes(NONCE_BYTES)
    link.send(nonce, deadline_s=deadline_s)
    answer = link.receive(NONCE_BYTES + PROOF_BYTES, deadline_s)
    theirs, shown = answer[:NONCE_BYTES], answer[NONCE_BYTES:]
    if not hmac.compare_digest(shown, proof(token, READER, nonce, theirs)):
        return False
    link.send(proof(token, KEEPER, nonce, theirs), deadline_s=deadline_s)
    return True


def enter(link: Link, token: bytes, deadline_s: float) -> bool:
    """The reader's side: whether the peer knows the token; raises as ``admit``.

    A keeper that does not accept our proof closes the connection: a ConnectionError.
    """
    theirs = link.receive(NONCE_BYTES, deadline_s)
    nonce = secrets.token_bytes(NONCE_BYTES)
    link.send(nonce + proof(token, READER, theirs, nonce), deadline_s=deadline_s)
    shown = link.receive(PROOF_BYTES, deadline_s)
    return hmac.compare_digest(shown, proof(token, KEEPER, theirs, nonce))
