"""The TensorStore view: an OCDBT index whose leaves point into the packs (pure).

``ts.open("file:///runs/a/checkpoints/step-…/|ocdbt:model.embed_tokens.weight/|zarr3:")`` opens a
tensor; docs/views.md says more. Keys are those of a Zarr hierarchy: ``NAME/zarr.json`` is stored
in the index, ``NAME/c/0/1`` is a range of a pack.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from itertools import product, takewhile

import numpy as np

from everstep.checkpoint.layout import Integers
from everstep.checkpoint.manifest import Manifest
from everstep.checkpoint.views.ocdbt_format import (
    MOST_INLINE_BYTES,
    Keys,
    NodeReference,
    Values,
    common_prefix_bytes,
    encode_interior,
    encode_leaf,
    encode_manifest,
)
from everstep.checkpoint.views.zarr_metadata import TENSORSTORE_TYPES, encode_metadata
from everstep.checkpoint.views.zarr_nodes import ArrayNode, GroupNode, root_node, zarr_nodes

INDEX_FILE = "index.ocdbt"
MANIFEST_FILE = "manifest.ocdbt"
NODE_ENTRIES = 4096
"""Most entries of a node of the tree; a reader fetches whole nodes."""


def ocdbt_files(manifest: Manifest, node_entries: int = NODE_ENTRIES) -> Mapping[str, bytes]:
    """The files of the view, by name, for the directory of the step.

    Args:
        manifest: the checkpoint; the same one gives the same bytes.
        node_entries: most entries of a node of the tree, at least 2.
    """
    return OcdbtView(manifest, node_entries).files(manifest.step, manifest.generation)


class OcdbtView:
    """The view of all steps whose tensors lie in files of the same names at the same places.

    Args:
        manifest: of one of them.
        node_entries: most entries of a node of the tree, at least 2.
    """

    def __init__(self, manifest: Manifest, node_entries: int = NODE_ENTRIES) -> None:
        self._index = _Index([p.file.encode() for p in manifest.packs], node_entries)
        nodes = zarr_nodes(manifest, TENSORSTORE_TYPES)
        for node in takewhile(lambda node: node.path, nodes):
            self._index.add(node)
        self._behind_root = list(nodes)

    def files(self, step: int, generation: int) -> Mapping[str, bytes]:
        """The files of the view of a step; see ``ocdbt_files``."""
        index = self._index.copy()
        for node in (root_node(step, generation), *self._behind_root):
            index.add(node)
        root, height = index.finish()
        data = b"".join(index.pieces)
        name = INDEX_FILE.encode()
        return {INDEX_FILE: data, MANIFEST_FILE: encode_manifest(root, height, name, data)}


@dataclass(frozen=True)
class _Run:
    """Neighbouring entries of a leaf: chunks of one array, or one value that is in the index."""

    keys: tuple[bytes, bytes]
    """The first and the last."""
    shared_bytes: int
    """That each key but the first has in common with the one before it, at least."""
    suffix_lengths: Integers
    """Of the keys without what they share."""
    suffixes: bytes
    lengths: Integers
    """Of the values."""
    files: Integers
    """One for each value, none where it is inline."""
    offsets: Integers
    inline: bytes = b""


class _Index:
    """The index file as it grows: nodes from left to right, then those above them."""

    def __init__(self, packs: Sequence[bytes], node_entries: int) -> None:
        self.pieces: list[bytes] = []
        self._size_bytes = 0
        self._names = [*packs, INDEX_FILE.encode()]
        self._node_entries = node_entries
        self._leaves: list[NodeReference] = []
        self._runs: list[_Run] = []
        self._waiting = 0

    def copy(self) -> "_Index":
        """One that grows on its own."""
        other = copy(self)
        other.pieces, other._leaves, other._runs = [*self.pieces], [*self._leaves], [*self._runs]
        return other

    def add(self, node: ArrayNode | GroupNode) -> None:
        """The next node of the view."""
        path = f"{node.path}/".encode() if node.path else b""
        if isinstance(node, ArrayNode) and len(node.offsets):
            self._add_chunks(path + b"c/" if node.counts else path, node)
        self._add_value(path + b"zarr.json", encode_metadata(node.metadata))

    def _add_chunks(self, prefix: bytes, node: ArrayNode) -> None:
        """The chunks of an array; ``prefix`` begins their keys."""
        ends = _chunk_names(node.counts)
        files, offsets = node.packs[ends.order], node.offsets[ends.order]
        begin, count = 0, len(offsets)
        while begin < count:
            stop = min(count, begin + self._node_entries - self._waiting)
            span = slice(begin, stop)
            self._append(
                _Run(
                    keys=(prefix + ends.name(begin), prefix + ends.name(stop - 1)),
                    shared_bytes=len(prefix),
                    suffix_lengths=ends.lengths[span],
                    suffixes=ends.text[ends.starts[begin] : ends.starts[stop]],
                    lengths=np.full(stop - begin, node.chunk_bytes),
                    files=files[span],
                    offsets=offsets[span],
                )
            )
            begin = stop

    def _add_value(self, key: bytes, value: bytes) -> None:
        """A value that is to be in the index itself: in the leaf, or beside it if it is long."""
        nothing = np.zeros(0, np.int64)
        file, offset, inline = nothing, nothing, value
        if len(value) > MOST_INLINE_BYTES:
            file, offset = np.array([len(self._names) - 1]), np.array([self._put(value)])
            inline = b""
        lengths = np.array([len(value)])
        self._append(_Run((key, key), 0, np.array([len(key)]), key, lengths, file, offset, inline))

    def finish(self) -> tuple[NodeReference, int]:
        """Write what is waiting and the nodes above; the topmost node and its height."""
        self._flush()
        level, height = self._leaves, 0
        while len(level) > 1:
            height += 1
            groups = (
                level[i : i + self._node_entries] for i in range(0, len(level), self._node_entries)
            )
            level = [self._interior(height, children) for children in groups]
        return level[0], height

    def _append(self, run: _Run) -> None:
        self._runs.append(run)
        self._waiting += len(run.lengths)
        if self._waiting == self._node_entries:
            self._flush()

    def _put(self, data: bytes) -> int:
        self.pieces.append(data)
        self._size_bytes += len(data)
        return self._size_bytes - len(data)

    def _flush(self) -> None:
        if not self._runs:
            return
        runs = self._runs
        files = np.concatenate([run.files for run in runs])
        used, numbers = np.unique(files, return_inverse=True)
        lengths = np.concatenate([run.lengths for run in runs])
        inline = np.repeat([not len(r.files) for r in runs], [len(r.lengths) for r in runs])
        values = Values(
            lengths,
            inline,
            numbers,
            np.concatenate([run.offsets for run in runs]),
            b"".join(run.inline for run in runs),
        )
        node = encode_leaf([self._names[i] for i in used], _keys(runs), values)
        self._leaves.append(
            NodeReference(
                first_key=runs[0].keys[0],
                offset=self._put(node),
                length=len(node),
                n_keys=len(lengths),
                tree_bytes=len(node),
                indirect_bytes=int(lengths[~inline].sum()),
            )
        )
        self._runs, self._waiting = [], 0

    def _interior(self, height: int, children: Sequence[NodeReference]) -> NodeReference:
        node = encode_interior(height, children, INDEX_FILE.encode())
        return NodeReference(
            first_key=children[0].first_key,
            offset=self._put(node),
            length=len(node),
            n_keys=sum(c.n_keys for c in children),
            tree_bytes=len(node) + sum(c.tree_bytes for c in children),
            indirect_bytes=sum(c.indirect_bytes for c in children),
        )


def _keys(runs: Sequence[_Run]) -> Keys:
    """The columns of the keys of a leaf."""
    shared, lengths, suffixes = [], [], []
    previous = b""
    for run in runs:
        first = run.keys[0]
        common = common_prefix_bytes(previous, first)
        shared.append(np.full(len(run.lengths), run.shared_bytes))
        shared[-1][0] = common
        lengths.append(run.suffix_lengths.copy())
        lengths[-1][0] = len(first) - common
        suffixes += [first[common:], run.suffixes[run.suffix_lengths[0] :]]
        previous = run.keys[1]
    return Keys(np.concatenate(shared)[1:], np.concatenate(lengths), b"".join(suffixes))


@dataclass(frozen=True)
class _ChunkNames:
    """The ends of the keys of an array's chunks, ascending."""

    order: Integers
    """For each of them the number of its chunk in C order."""
    lengths: Integers
    starts: Integers
    """Where each begins in ``text``, and where the last one ends."""
    text: bytes

    def name(self, at: int) -> bytes:
        """One of them."""
        return self.text[self.starts[at] : self.starts[at + 1]]


@lru_cache(maxsize=64)
def _chunk_names(counts: tuple[int, ...]) -> _ChunkNames:
    """``0/0``, ``0/1``, ``0/10``, ``0/2``, …; the only chunk of a tensor without dims is ``c``."""
    texts = ["/".join(index) or "c" for index in product(*(map(str, range(n)) for n in counts))]
    order = sorted(range(len(texts)), key=texts.__getitem__)
    lengths = np.array([len(texts[number]) for number in order])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return _ChunkNames(
        np.array(order), lengths, starts, "".join(map(texts.__getitem__, order)).encode()
    )
