"""The bytes of OCDBT, TensorStore's key-value database: manifest and B+tree nodes (pure).

google.github.io/tensorstore/kvstore/ocdbt describes the format. What makes it a view: a leaf may
point to any range of any file below the database's directory, not only to files of its own.
Columns are encoded with NumPy, since an index has millions of entries.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from everstep.checkpoint.kernels import crc32c

MOST_INLINE_BYTES = 4096
_MANIFEST_MAGIC, _NODE_MAGIC = 0x0CDB3A2A, 0x0CDB20DE
_MOST_NODE_BYTES = 8 * 2**20
_VERSION_TREE_ARITY_LOG2 = 4


@dataclass(frozen=True, kw_only=True)
class NodeReference:
    """Where a node of the tree lies in the index file, and what is below it."""

    first_key: bytes
    offset: int
    length: int
    n_keys: int
    tree_bytes: int
    """Of this node and all nodes below it."""
    indirect_bytes: int
    """Of the values that are ranges of files."""


@dataclass(frozen=True)
class Keys:
    """Ascending keys as the format has them: each shares a prefix with the one before it."""

    prefix_lengths: npt.NDArray[np.int64]
    """For each key but the first the number of bytes shared with the previous one."""
    suffix_lengths: npt.NDArray[np.int64]
    suffixes: bytes


@dataclass(frozen=True)
class Values:
    """The values of the keys of a leaf."""

    lengths: npt.NDArray[np.int64]
    inline: npt.NDArray[np.bool_]
    files: npt.NDArray[np.int64]
    """For each value that is not inline its file, by number in the node's table of files."""
    offsets: npt.NDArray[np.int64]
    """For each value that is not inline."""
    inline_bytes: bytes


def varints(values: npt.ArrayLike) -> bytes:
    """Natural numbers below 2**63 in base 128, low digits first, each byte but the last + 128."""
    numbers = np.asarray(values, np.int64).reshape(-1)
    lengths = np.ones_like(numbers)
    for bits in range(7, 63, 7):
        lengths += numbers >= 1 << bits
    ends = np.cumsum(lengths)
    out = np.empty(int(ends[-1]) if len(ends) else 0, np.uint8)
    for digit in range(int(lengths.max(initial=0))):
        chosen = lengths > digit
        more = np.where(lengths[chosen] > digit + 1, 128, 0)
        at = (ends - lengths)[chosen] + digit
        out[at] = numbers[chosen] >> 7 * digit & 127 | more
    return out.tobytes()


def common_prefix_bytes(a: bytes, b: bytes) -> int:
    """How many bytes two keys share at their beginning."""
    shared = min(len(a), len(b))
    if a[:shared] == b[:shared]:
        return shared
    return next(i for i in range(shared) if a[i] != b[i])


def keys_of(keys: Sequence[bytes]) -> Keys:
    """The columns of ascending keys."""
    shared = [0] + [common_prefix_bytes(a, b) for a, b in pairwise(keys)]
    suffixes = [key[n:] for key, n in zip(keys, shared, strict=True)]
    return Keys(np.array(shared[1:], np.int64), np.array([*map(len, suffixes)]), b"".join(suffixes))


def encode_leaf(file_names: Sequence[bytes], keys: Keys, values: Values) -> bytes:
    """A node of height 0: keys, and values or where they are."""
    body = b"".join(
        (
            b"\0",
            _file_table(file_names),
            varints([len(keys.suffix_lengths)]),
            varints(keys.prefix_lengths),
            varints(keys.suffix_lengths),
            keys.suffixes,
            varints(values.lengths),
            varints(~values.inline),
            varints(values.files),
            varints(values.offsets),
            values.inline_bytes,
        )
    )
    return _frame(_NODE_MAGIC, body)


def encode_interior(height: int, children: Sequence[NodeReference], index_name: bytes) -> bytes:
    """A node above others, all of which lie in the index file."""
    keys = keys_of([c.first_key for c in children])
    zeros = bytes(len(children))
    body = b"".join(
        (
            bytes([height]),
            _file_table([index_name]),
            varints([len(children)]),
            varints(keys.prefix_lengths),
            varints(keys.suffix_lengths),
            zeros,  # no part of a key is left out of the nodes below
            keys.suffixes,
            zeros,  # the only file of the table
            varints([c.offset for c in children]),
            varints([c.length for c in children]),
            varints([c.n_keys for c in children]),
            varints([c.tree_bytes for c in children]),
            varints([c.indirect_bytes for c in children]),
        )
    )
    return _frame(_NODE_MAGIC, body)


def encode_manifest(root: NodeReference, height: int, index_name: bytes, index: bytes) -> bytes:
    """The file that a reader begins with; the same index gives the same bytes.

    Args:
        root: the topmost node.
        height: its height.
        index_name: the file with all nodes.
        index: its bytes, of which the identity of the database is made.
    """
    body = b"".join(
        (
            hashlib.blake2b(index, digest_size=16).digest(),
            varints([0]),  # the manifest is this one file
            varints([MOST_INLINE_BYTES]),
            varints([_MOST_NODE_BYTES]),
            bytes([_VERSION_TREE_ARITY_LOG2]),
            varints([0]),  # no compression
            _file_table([index_name]),
            varints([1, 1]),  # one version, number 1
            bytes([height]),
            varints([0, root.offset, root.length]),
            varints([root.n_keys, root.tree_bytes, root.indirect_bytes]),
            struct.pack("<Q", 0),  # when, in ns since 1970: unknown, so that bytes are reproducible
            varints([0]),  # no older versions
        )
    )
    return _frame(_MANIFEST_MAGIC, body)


def _file_table(names: Sequence[bytes]) -> bytes:
    """Paths relative to the database; none has a base path."""
    if not names:
        return varints([0])
    keys = keys_of(names)
    return b"".join(
        (
            varints([len(names)]),
            varints(keys.prefix_lengths),
            varints(keys.suffix_lengths),
            bytes(len(names)),
            keys.suffixes,
        )
    )


def _frame(magic: int, body: bytes) -> bytes:
    """Magic number, length of everything, version 0, compression 0, body, CRC-32C."""
    head = struct.pack(">I", magic) + struct.pack("<Q", 12 + 2 + len(body) + 4) + b"\0\0"
    return b"".join((head, body, struct.pack("<I", crc32c(body, crc32c(head)))))
