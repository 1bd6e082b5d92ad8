"""What a checkpoint consists of: parts (one per writer) and the manifest made of them (pure).

The manifest is a deterministic function of the parts: whoever sees all parts can publish it. Its
presence in the step's directory is the commit.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from everstep.checkpoint.collector import collector_paused
from everstep.checkpoint.coverage import holdings
from everstep.checkpoint.errors import CoverageError, LayoutError, ManifestError
from everstep.checkpoint.fragment_codec import fragments_from_json, fragments_to_json
from everstep.checkpoint.grid_codec import encode_runs
from everstep.checkpoint.json_checks import dtype, mapping, natural, text
from everstep.checkpoint.layout import (
    ITEM_BYTES,
    Fragment,
    Grid,
    Integers,
    Layout,
    TensorSpec,
)
from everstep.checkpoint.layout_codec import (
    MAX_CELLS,
    LayoutDecoder,
    encode_layout,
    max_cells,
)
from everstep.checkpoint.optimizer_parts import merge_values
from everstep.checkpoint.pack import BLOCK_BYTES, PackRecord, pack_order
from everstep.checkpoint.pack_codec import decode_pack, encode_pack
from everstep.checkpoint.pack_index import PackIndex
from everstep.checkpoint.places import Places, place
from everstep.checkpoint.records import decode_record, encode_record

MANIFEST_VERSION = 1
PART_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one writer made durable."""

    generation: int
    step: int
    rank: int
    world_size: int
    pack: PackRecord
    fragments: tuple[Fragment, ...]
    context: Mapping[str, Any]
    """From rank 0: 'mesh', 'producer', 'lineage' and 'objects' (JSON-able state); from it and every
    other rank that is the first to hold its parameters: 'optimizer', the part of it that it has."""


class Lineage(NamedTuple):
    """What the generation of a checkpoint inherits: see ``lineage.Generation``."""

    parent: int | None
    """Number of an earlier generation; None for a new beginning."""
    fork_step: int | None
    """The last step of it that counts."""


@dataclass(frozen=True)
class StoredTensor:
    """A logical tensor and, for each cell of its layout, the pack that holds it."""

    spec: TensorSpec
    layout: Layout
    packs: tuple[int, ...]

    @property
    def grid(self) -> Grid:
        """Its layout, for those who can use a grid only.

        Raises:
            LayoutError: it is another one.
        """
        if not isinstance(self.layout, Grid):
            raise LayoutError(
                f"tensor {self.spec.name!r} is stored as {type(self.layout).__name__}, which only "
                "everstep reads: load it and save it again on a mesh"
            )
        return self.layout


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One committed checkpoint."""

    generation: int
    step: int
    mesh: Mapping[str, int]
    """Size of each mesh axis when it was saved."""
    producer: Mapping[str, str]
    """Versions of what wrote it."""
    objects: Mapping[str, Any]
    """JSON-able state: optimizer groups, scheduler, data position, ..."""
    packs: tuple[PackRecord, ...]
    tensors: Mapping[str, StoredTensor]
    lineage: Lineage | None = None
    """What its generation inherits; None where that is known from the generation's record only."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all packs."""
        return sum(p.size_bytes for p in self.packs)

    def starts(self, name: str) -> list[int]:
        """For each cell of a tensor the address of its first byte in its pack (see ``extents``).

        Where cells follow each other it is the byte offset in the data. Raises KeyError.
        """
        return self.places.starts(name)

    def file_offsets(self, name: str) -> Integers:
        """For each cell of a tensor, its byte offset in the file of its pack (or KeyError)."""
        data_starts = np.array([p.data_start for p in self.packs], np.int64)
        packs = np.array(self.tensors[name].packs, np.int64)
        return data_starts[packs] + np.array(self._in_files.starts(name), np.int64)

    @cached_property
    def places(self) -> Places:
        """Where every cell lies, by addresses."""
        return self._dense.moved(
            {n: p.blocks.starts for n, p in enumerate(self.packs) if p.extents is not None}
        )

    @cached_property
    def _in_files(self) -> Places:
        """Where every cell lies behind the beginning of the data of its file."""
        return self._dense.moved(
            {
                n: [offset for offset, _ in p.extents]
                for n, p in enumerate(self.packs)
                if p.extents is not None
            }
        )

    @cached_property
    def _dense(self) -> Places:
        """Where every cell would lie if cells followed each other in all packs."""
        return _places(self.tensors, len(self.packs))

    @cached_property
    def pack_indexes(self) -> tuple[PackIndex, ...]:
        """The fragments of each pack."""
        held: list[list[Fragment]] = [[] for _ in self.packs]
        for tensor in self.tensors.values():
            for pack, cell in zip(tensor.packs, tensor.layout.cells(), strict=True):
                held[pack].append(Fragment(tensor.spec, cell, tensor.layout.flat))
        return tuple(
            PackIndex(tuple(f), record) for f, record in zip(held, self.packs, strict=True)
        )


Written = Sequence[tuple[Fragment, ...]]
"""What each rank has written."""


def stored_tensors(written: Written) -> dict[str, StoredTensor]:
    """All tensors, by name, of what ranks have written.

    Raises:
        LayoutError: the fragments do not cover each tensor exactly once, or ranks disagree.
    """
    tensors, n_cells = {}, 0
    for spec, _, (layout, shares) in holdings(written, once=True):
        packs = tuple(share.ranks[0] for share in shares if share.n_items)
        tensors[spec.name] = StoredTensor(spec, layout, packs)
        n_cells += layout.n_cells
        if layout.n_cells > max_cells(len(written)) or n_cells > MAX_CELLS:
            raise LayoutError(
                f"tensor {spec.name!r} is cut into {layout.n_cells} fragments, which makes "
                f"{n_cells} so far: a checkpoint of {len(written)} ranks has at most "
                f"{max_cells(len(written))} of a tensor, and {MAX_CELLS} in all"
            )
    return tensors


def build_manifest(
    parts: Sequence[Part],
    lineage: Lineage | None = None,
    stored: Callable[[Written], Mapping[str, StoredTensor]] = stored_tensors,
) -> Manifest:
    """Combine the parts of all writers.

    Args:
        parts: of all ranks, in any order.
        lineage: what their generation inherits.
        stored: ``stored_tensors``, or what gives the same faster.

    Raises:
        LayoutError: the fragments do not cover each tensor exactly once, or ranks disagree.
        ValueError: a part is missing, or parts belong to different steps.
    """
    ordered = sorted(parts, key=lambda p: p.rank)
    if not ordered or [p.rank for p in ordered] != list(range(ordered[0].world_size)):
        raise ValueError(f"parts of ranks {[p.rank for p in ordered]} do not make a whole step")
    if len({(p.generation, p.step, p.world_size) for p in ordered}) != 1:
        raise ValueError("parts belong to different steps")
    context = ordered[0].context
    optimizers = [p.context["optimizer"] for p in ordered if "optimizer" in p.context]
    optimizer = {"optimizer": merge_values(optimizers)} if optimizers else {}
    return Manifest(
        generation=ordered[0].generation,
        step=ordered[0].step,
        mesh=context["mesh"],
        producer=context["producer"],
        objects={**optimizer, **context["objects"]},
        packs=tuple(p.pack for p in ordered),
        tensors=stored([p.fragments for p in ordered]),
        lineage=lineage,
    )


def lineage_of(part: Part, path: Path | str) -> Lineage | None:
    """What the part of rank 0 says of the lineage; raises ManifestError."""
    told = part.context.get("lineage")
    try:
        return Lineage(told["parent"], told["fork_step"]) if told else None
    except (KeyError, TypeError) as e:
        raise ManifestError(path, f"its lineage is none: {e!r}") from None


def _places(tensors: Mapping[str, StoredTensor], n_packs: int) -> Places:
    return place(((t.spec, t.layout, t.packs) for t in tensors.values()), n_packs)


def encode_part(part: Part) -> bytes:
    """The bytes of a part file."""
    return encode_record(
        "everstep_part",
        PART_VERSION,
        {
            "generation": part.generation,
            "step": part.step,
            "rank": part.rank,
            "world_size": part.world_size,
            "pack": encode_pack(part.pack),
            "fragments": fragments_to_json(part.fragments),
            "context": dict(part.context),
        },
    )


def decode_part(
    data: bytes,
    path: Path | str,
    decode_fragments: Callable[[Any], tuple[Fragment, ...]] = fragments_from_json,
) -> Part:
    """Inverse of ``encode_part``; raises ManifestError and its kinds.

    Args:
        data: the bytes of a part file.
        path: its path, for errors.
        decode_fragments: ``fragments_from_json``, or what gives the same faster.
    """
    m = decode_record(data, "everstep_part", PART_VERSION, path)
    try:
        fragments = decode_fragments(m["fragments"])
        pack = mapping(m["pack"])
        part = Part(
            generation=natural(m["generation"]),
            step=natural(m["step"]),
            rank=natural(m["rank"]),
            world_size=natural(m["world_size"]),
            pack=decode_pack(pack, pack.get("kind", "safetensors"), lambda: _sizes_of(fragments)),
            fragments=fragments,
            context=mapping(m["context"]),
        )
        _check_part(part)
    except (KeyError, TypeError, ValueError, RecursionError) as e:
        raise ManifestError(path, f"its content is not a part: {e}") from None
    return part


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of a manifest file."""
    return encode_record(
        "everstep_manifest",
        MANIFEST_VERSION,
        {
            "generation": manifest.generation,
            "step": manifest.step,
            "mesh": dict(manifest.mesh),
            "producer": dict(manifest.producer),
            "objects": dict(manifest.objects),
            **({} if manifest.lineage is None else {"lineage": manifest.lineage._asdict()}),
            "block_bytes": BLOCK_BYTES,
            "packs": [{"kind": p.kind, **encode_pack(p)} for p in manifest.packs],
            "tensors": {
                name: {
                    "dtype": t.spec.dtype,
                    "shape": t.spec.shape,
                    **encode_layout(t.layout),
                    "packs": encode_runs(t.packs),
                }
                for name, t in manifest.tensors.items()
            },
        },
    )


@collector_paused()
def decode_manifest(data: bytes, path: Path | str) -> Manifest:
    """Inverse of ``encode_manifest``: a whole valid object, or ManifestError and its kinds."""
    m = decode_record(data, "everstep_manifest", MANIFEST_VERSION, path)
    try:
        if m["block_bytes"] != BLOCK_BYTES:
            raise ValueError(f"block_bytes is {m['block_bytes']!r}, expected {BLOCK_BYTES}")
        tensors = _decode_tensors(mapping(m["tensors"]), len(m["packs"]))
        packs = _decode_packs(m["packs"], tensors)
        manifest = Manifest(
            generation=natural(m["generation"]),
            step=natural(m["step"]),
            mesh={text(k): natural(v) for k, v in mapping(m["mesh"]).items()},
            producer={text(k): text(v) for k, v in mapping(m["producer"]).items()},
            objects=mapping(m["objects"]),
            packs=packs,
            tensors=tensors,
            lineage=_decode_lineage(m["lineage"], m["generation"]) if "lineage" in m else None,
        )
    except (KeyError, TypeError, ValueError, RecursionError) as e:
        raise ManifestError(path, f"its content is not a manifest: {e}") from None
    _check_sizes(manifest, path)
    return manifest


def _check_part(part: Part) -> None:
    if part.rank >= part.world_size:
        raise ValueError(f"rank {part.rank} of {part.world_size}")
    held = sum(f.size_bytes for f in part.fragments)
    if held != part.pack.data_bytes:
        raise ValueError(f"its fragments have {held} bytes, its pack {part.pack.data_bytes}")


def _decode_tensors(coded: Mapping[str, Any], n_packs: int) -> dict[str, StoredTensor]:
    decoder, tensors = LayoutDecoder(n_packs), {}
    for name, t in coded.items():
        dtype_name = dtype(t["dtype"])
        shape, layout, packs = decoder.decode(t, ITEM_BYTES[dtype_name])
        tensors[name] = StoredTensor(TensorSpec(text(name), dtype_name, shape), layout, packs)
    return tensors


def _decode_lineage(coded: Any, generation: int) -> Lineage:
    parent, fork_step = mapping(coded)["parent"], coded["fork_step"]
    if (parent is None) != (fork_step is None):
        raise ValueError("its lineage has a parent or a fork, not both")
    if parent is None:
        return Lineage(None, None)
    if not 1 <= natural(parent) < generation:
        raise ValueError(f"its lineage has parent {parent} of generation {generation}")
    return Lineage(parent, natural(fork_step))


def _check_sizes(manifest: Manifest, path: Path | str) -> None:
    """Every pack is exactly as large as the fragments that it is said to hold."""
    for record, held in zip(manifest.packs, manifest.places.held_bytes, strict=True):
        is_whole = record.extents is not None or (
            record.size_bytes == record.table_start + 4 * record.blocks.n_blocks
        )
        if held != record.data_bytes or not is_whole:
            raise CoverageError(
                path, f"the tensors give pack {record.file} {held} bytes, not {record.data_bytes}"
            )


def _sizes_of(fragments: Iterable[Fragment]) -> Integers:
    """Bytes and bytes per item of all that are not empty, in the order of a pack."""
    sizes = [(f.size_bytes, f.spec.item_bytes) for f in pack_order(fragments) if f.size_bytes]
    return np.array(sizes, np.int64).reshape(-1, 2)


def _decode_packs(
    coded: Sequence[Any], tensors: Mapping[str, StoredTensor]
) -> tuple[PackRecord, ...]:
    placed = cache(lambda: _places(tensors, len(coded)))

    def sizes(pack: int) -> Integers:
        return placed().sizes(pack)

    packs = tuple(
        decode_pack(p, p["kind"], partial(sizes, number)) for number, p in enumerate(coded)
    )
    files = [file for p in packs for file in {p.file, p.table_file}]
    if len(set(files)) != len(files):
        raise ValueError("two packs have the same file name")
    return packs
