"""The digest of a state: the same for the same values, however they are cut, placed and ordered.

Per tensor it is the sum, modulo 2^128, of one 64-bit hash per element::

    h(i, b) = mix(mix(i + G) ^ b)      i  index of the element in the flattened tensor
                                       b  its bits as an unsigned number
                                       G  0x9E3779B97F4A7C15

where ``mix`` is the finalizer of SplitMix64 (Steele, Lea and Flood 2014, with the constants of
Stafford's variant 13). An element of 16 bytes is hashed in two steps: the low word gives ``h``, the
high one ``mix(h ^ high)``. Sums commute, so that boxes can be digested in any order, by anyone.

It tells states apart that differ by accident; it does not resist somebody who forges one.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.layout import RNG_PREFIX, Box, TensorSpec
from everstep.checkpoint.numbers import words
from everstep.checkpoint.pieces import PIECE_BYTES, linear_indices, pieces
from everstep.checkpoint.step_reader import StepReader

_CHUNK_ITEMS = 2**15  # some arrays of 256 KiB at a time stay in the second-level cache
_MODULUS = 2**128
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_LOW = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True, kw_only=True)
class StateDigest:
    """The digests of one checkpoint, as hex."""

    state: str
    """Of all tensors but the generators' states: names, dtypes, shapes, values."""
    rng: str
    """Of the generators' states: to be compared on the same mesh only."""
    objects: str
    """Of the JSON-able state."""
    tensors: Mapping[str, str]
    """Of the values of each tensor, by name."""


def digest_step(
    reader: StepReader, *, on_bytes: Callable[[int], None] | None = None
) -> StateDigest:
    """Read all tensors of a checkpoint, piece by piece, and digest them.

    Args:
        reader: of the checkpoint.
        on_bytes: called with the number of bytes digested so far.

    Raises:
        DamagedError: a pack is not what the manifest says.
        OSError: as the file system reports it.
    """
    sums: dict[TensorSpec, int] = {}
    done_bytes = 0
    for stored in reader.manifest.tensors.values():
        spec = stored.spec
        sums[spec] = 0
        for piece in pieces(spec.whole, PIECE_BYTES // spec.item_bytes):
            data = reader.read(spec.name, piece)
            sums[spec] += box_digest(spec, piece, data)
            done_bytes += len(data)
            if on_bytes is not None:
                on_bytes(done_bytes)
    return combine(sums, reader.manifest.objects)


def combine(sums: Mapping[TensorSpec, int], objects: Mapping[str, Any]) -> StateDigest:
    """The digests of a state, from the sum over the boxes of each tensor (``box_digest``)."""
    ordered = sorted((spec, f"{total % _MODULUS:032x}") for spec, total in sums.items())
    rng = [row for row in ordered if row[0].name.startswith(RNG_PREFIX)]
    state = [row for row in ordered if not row[0].name.startswith(RNG_PREFIX)]
    return StateDigest(
        state=_hash([[s.name, s.dtype, s.shape, digest] for s, digest in state]),
        rng=_hash([[s.name, s.dtype, s.shape, digest] for s, digest in rng]),
        objects=_hash(objects),
        tensors={spec.name: digest for spec, digest in ordered},
    )


def box_digest(spec: TensorSpec, box: Box, data: ByteArray) -> int:
    """The sum of the hashes of all elements of a box, modulo 2^128.

    Args:
        spec: the tensor.
        box: the box.
        data: its bytes, dense, in C order.
    """
    total, done = 0, 0
    for piece in pieces(box, _CHUNK_ITEMS):
        end = done + piece.size * spec.item_bytes
        hashes = _hashes(linear_indices(spec.shape, piece), data[done:end], spec.item_bytes)
        total += int((hashes & _LOW).sum()) + (int((hashes >> np.uint64(32)).sum()) << 32)
        done = end
    return total % _MODULUS


def box_digest_reference(spec: TensorSpec, box: Box, data: ByteArray) -> int:
    """What ``box_digest`` computes, one element at a time."""
    total = 0
    for number, index in enumerate(linear_indices(spec.shape, box).tolist()):
        begin = number * spec.item_bytes
        bits = int.from_bytes(data[begin : begin + spec.item_bytes].tobytes(), "little")
        value = _mix_reference(index + int(_GOLDEN))
        for shift in range(0, 8 * spec.item_bytes, 64):
            value = _mix_reference(value ^ (bits >> shift) % 2**64)
        total += value
    return total % _MODULUS


def _hashes(
    indices: npt.NDArray[np.uint64], data: ByteArray, item_bytes: int
) -> npt.NDArray[np.uint64]:
    """The hash of each element; ``indices`` is overwritten."""
    indices += _GOLDEN
    _mix(indices)
    for column in words(data, item_bytes).T:
        indices ^= column
        _mix(indices)
    return indices


def _mix(z: npt.NDArray[np.uint64]) -> None:
    """The finalizer, in place; products are modulo 2^64."""
    z ^= z >> np.uint64(30)
    z *= _FIRST
    z ^= z >> np.uint64(27)
    z *= _SECOND
    z ^= z >> np.uint64(31)


def _mix_reference(z: int) -> int:
    z %= 2**64
    z = (z ^ z >> 30) * int(_FIRST) % 2**64
    z = (z ^ z >> 27) * int(_SECOND) % 2**64
    return z ^ z >> 31


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
