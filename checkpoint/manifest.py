"""What a checkpoint consists of: parts (one per writer) and the manifest made of them (pure).

The manifest is a deterministic function of the parts: whoever sees all parts can publish it. Its
presence in the step's directory is the commit.
"""

import re
import reprlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from everstep.checkpoint.errors import CoverageError, LayoutError, ManifestError
from everstep.checkpoint.grid_codec import (
    decode_bounds,
    decode_runs,
    encode_bounds,
    encode_runs,
)
from everstep.checkpoint.layout import ITEM_BYTES, Box, Fragment, Grid, TensorSpec, grid_of
from everstep.checkpoint.optimizer_parts import merge_values
from everstep.checkpoint.pack import BLOCK_BYTES, DATA_ALIGN_BYTES, PackIndex, PackRecord
from everstep.checkpoint.records import decode_record, encode_record

MANIFEST_VERSION = 1
PART_VERSION = 1
MAX_CELLS = 2**22
"""Of all tensors of a manifest together; a tensor has at most as many as there are packs."""
MAX_NATURAL = 2**60
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


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


@dataclass(frozen=True)
class StoredTensor:
    """A logical tensor and, for each cell of its grid in C order, the pack that holds it."""

    spec: TensorSpec
    grid: Grid
    packs: tuple[int, ...]


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
    lineage: Mapping[str, int | None] = field(default_factory=dict)
    """'parent' and 'fork_step' of its generation, whose record can be made again from them; empty
    where it was not told."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all packs."""
        return sum(p.size_bytes for p in self.packs)

    @cached_property
    def pack_indexes(self) -> tuple[PackIndex, ...]:
        """Where fragments lie, for each pack."""
        held: list[list[Fragment]] = [[] for _ in self.packs]
        for tensor in self.tensors.values():
            for pack, cell in zip(tensor.packs, tensor.grid.cells(), strict=True):
                held[pack].append(Fragment(tensor.spec, cell))
        return tuple(PackIndex(tuple(f)) for f in held)


def build_manifest(parts: Sequence[Part]) -> Manifest:
    """Combine the parts of all writers.

    Raises:
        LayoutError: the fragments do not cover each tensor exactly once, or ranks disagree.
        ValueError: a part is missing, or parts belong to different steps.
    """
    ordered = sorted(parts, key=lambda p: p.rank)
    if not ordered or [p.rank for p in ordered] != list(range(ordered[0].world_size)):
        raise ValueError(f"parts of ranks {[p.rank for p in ordered]} do not make a whole step")
    if len({(p.generation, p.step, p.world_size) for p in ordered}) != 1:
        raise ValueError("parts belong to different steps")
    cells: dict[TensorSpec, dict[Box, int]] = defaultdict(dict)
    for index, part in enumerate(ordered):
        for fragment in part.fragments:
            if cells[fragment.spec].setdefault(fragment.box, index) != index:
                raise LayoutError(f"two ranks wrote {fragment.key!r}")
    tensors = {}
    for spec in sorted(cells):
        if spec.name in tensors:
            raise LayoutError(f"ranks disagree about the shape or dtype of {spec.name!r}")
        grid = grid_of(spec, cells[spec])
        packs = tuple(cells[spec][box] for box in grid.cells())
        tensors[spec.name] = StoredTensor(spec, grid, packs)
    if sum(t.grid.n_cells for t in tensors.values()) > MAX_CELLS:
        raise LayoutError(f"the state is cut into more than {MAX_CELLS} fragments")
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
        tensors=tensors,
        lineage=_lineage(context.get("lineage", {})),
    )


def fragments_to_json(fragments: Iterable[Fragment]) -> list[Any]:
    """For each fragment [name, dtype, global shape, offset, shape]."""
    return [[f.spec.name, f.spec.dtype, f.spec.shape, f.box.offset, f.box.shape] for f in fragments]


def fragments_from_json(rows: Any) -> tuple[Fragment, ...]:
    """Inverse of ``fragments_to_json``; raises TypeError or ValueError."""
    found = []
    for name, dtype, shape, offset, box_shape in rows:
        spec = TensorSpec(_text(name), _dtype(dtype), _extents(shape))
        box = Box(_extents(offset), _extents(box_shape))
        if not len(spec.shape) == len(box.offset) == len(box.shape):
            raise ValueError(f"a box of {name!r} has other dims than the tensor")
        if any(o + n > e for o, n, e in zip(box.offset, box.shape, spec.shape, strict=True)):
            raise ValueError(f"a box of {name!r} leaves the tensor")
        found.append(Fragment(spec, box))
    return tuple(found)


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
            "pack": asdict(part.pack),
            "fragments": fragments_to_json(part.fragments),
            "context": dict(part.context),
        },
    )


def decode_part(data: bytes, path: Path | str) -> Part:
    """Inverse of ``encode_part``; raises ManifestError and its kinds."""
    m = decode_record(data, "everstep_part", PART_VERSION, path)
    try:
        part = Part(
            generation=_natural(m["generation"]),
            step=_natural(m["step"]),
            rank=_natural(m["rank"]),
            world_size=_natural(m["world_size"]),
            pack=_decode_pack(m["pack"]),
            fragments=fragments_from_json(m["fragments"]),
            context=_mapping(m["context"]),
        )
        _check_part(part)
    except (KeyError, TypeError, ValueError) as e:
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
            **({"lineage": dict(manifest.lineage)} if manifest.lineage else {}),
            "objects": dict(manifest.objects),
            "block_bytes": BLOCK_BYTES,
            "packs": [{"kind": "safetensors", **asdict(p)} for p in manifest.packs],
            "tensors": {
                name: {
                    "dtype": t.spec.dtype,
                    "shape": t.spec.shape,
                    "grid": encode_bounds(t.grid.bounds),
                    "packs": encode_runs(t.packs),
                }
                for name, t in manifest.tensors.items()
            },
        },
    )


def decode_manifest(data: bytes, path: Path | str) -> Manifest:
    """Inverse of ``encode_manifest``: a whole valid object, or ManifestError and its kinds."""
    m = decode_record(data, "everstep_manifest", MANIFEST_VERSION, path)
    try:
        if m["block_bytes"] != BLOCK_BYTES:
            raise ValueError(f"block_bytes is {m['block_bytes']!r}, expected {BLOCK_BYTES}")
        packs = tuple(_decode_pack(p, kind="safetensors") for p in m["packs"])
        if len({p.file for p in packs}) != len(packs):
            raise ValueError("two packs have the same file name")
        manifest = Manifest(
            generation=_natural(m["generation"]),
            step=_natural(m["step"]),
            mesh={_text(k): _natural(v) for k, v in _mapping(m["mesh"]).items()},
            producer={_text(k): _text(v) for k, v in _mapping(m["producer"]).items()},
            objects=_mapping(m["objects"]),
            packs=packs,
            tensors=_decode_tensors(_mapping(m["tensors"]), len(packs)),
            lineage=_lineage(m.get("lineage", {})),
        )
    except (KeyError, TypeError, ValueError) as e:
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
    tensors, n_cells = {}, 0
    for name, t in coded.items():
        tensors[name] = _decode_tensor(name, t, n_packs)
        n_cells += tensors[name].grid.n_cells
        if n_cells > MAX_CELLS:
            raise ValueError(f"its tensors have more than {MAX_CELLS} cells")
    return tensors


def _decode_tensor(name: str, t: Any, n_packs: int) -> StoredTensor:
    spec = TensorSpec(_text(name), _dtype(t["dtype"]), _extents(t["shape"]))
    grid = Grid(decode_bounds(t["grid"], spec.shape, n_packs))
    return StoredTensor(spec, grid, tuple(decode_runs(t["packs"], grid.n_cells, n_packs)))


def _check_sizes(manifest: Manifest, path: Path | str) -> None:
    """Every pack is exactly as large as the fragments that it is said to hold."""
    held_bytes = [0] * len(manifest.packs)
    for tensor in manifest.tensors.values():
        for pack, size in zip(tensor.packs, tensor.grid.cell_sizes(), strict=True):
            held_bytes[pack] += size * tensor.spec.item_bytes
    for record, held in zip(manifest.packs, held_bytes, strict=True):
        blocks = -(-held // BLOCK_BYTES)
        if held != record.data_bytes or record.size_bytes != record.data_start + held + 4 * blocks:
            raise CoverageError(
                path, f"the tensors give pack {record.file} {held} bytes, not {record.data_bytes}"
            )


def _decode_pack(p: Any, kind: str | None = None) -> PackRecord:
    if kind is not None and p["kind"] != kind:
        raise ValueError(f"pack kind {reprlib.repr(p['kind'])} is not known to this version")
    values = {f.name: p[f.name] for f in fields(PackRecord)}
    if not _FILE_NAME.fullmatch(_text(values["file"])):
        raise ValueError(f"file name {reprlib.repr(values['file'])}")
    for name in values.keys() - {"file"}:
        _natural(values[name])
    if values["data_start"] < 1 or values["data_start"] % DATA_ALIGN_BYTES:
        raise ValueError(f"its data starts at {values['data_start']}")
    return PackRecord(**values)


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < MAX_NATURAL:
        raise ValueError(f"{reprlib.repr(value)} is not a natural number")
    return value


def _extents(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > 32:
        raise ValueError(f"{reprlib.repr(value)} is not a shape")
    return tuple(map(_natural, value))


def _lineage(value: Any) -> dict[str, int | None]:
    members = _mapping(value)
    if members and members.keys() != {"parent", "fork_step"}:
        raise ValueError(f"lineage {reprlib.repr(value)}")
    return {k: None if v is None else _natural(v) for k, v in members.items()}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{reprlib.repr(value)} is not text")
    value.encode()  # a lone surrogate is no text either
    return value


def _dtype(value: Any) -> str:
    if value not in ITEM_BYTES:
        raise ValueError(f"dtype {reprlib.repr(value)} is not one of {', '.join(ITEM_BYTES)}")
    return str(value)


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{reprlib.repr(value)} is not a mapping")
    return value
