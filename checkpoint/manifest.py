"""What a checkpoint consists of: parts (one per writer) and the manifest made of them (pure).

The manifest is a deterministic function of the parts: whoever sees all parts can publish it. Its
presence in the step's directory is the commit.
"""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
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
from everstep.checkpoint.pack import BLOCK_BYTES, PackIndex, PackRecord
from everstep.checkpoint.records import decode_record, encode_record

MANIFEST_VERSION = 1
PART_VERSION = 1
MAX_CELLS = 2**24
MAX_EXTENT = 2**60
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
    """From rank 0 only, else empty: 'mesh', 'producer' and 'objects' (JSON-able state)."""


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
        LayoutError: the fragments do not cover each tensor exactly once.
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
        tensors[spec.name] = StoredTensor(
            spec, grid, tuple(cells[spec][box] for box in grid.cells())
        )
    context = ordered[0].context
    return Manifest(
        generation=ordered[0].generation,
        step=ordered[0].step,
        mesh=context["mesh"],
        producer=context["producer"],
        objects=context["objects"],
        packs=tuple(p.pack for p in ordered),
        tensors=tensors,
    )


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
            "fragments": [
                [f.spec.name, f.spec.dtype, f.spec.shape, f.box.offset, f.box.shape]
                for f in part.fragments
            ],
            "context": dict(part.context),
        },
    )


def decode_part(data: bytes, path: Path | str) -> Part:
    """Inverse of ``encode_part``; raises ManifestError and its kinds."""
    m = decode_record(data, "everstep_part", PART_VERSION, path)
    try:
        return Part(
            generation=_natural(m["generation"]),
            step=_natural(m["step"]),
            rank=_natural(m["rank"]),
            world_size=_natural(m["world_size"]),
            pack=_decode_pack(m["pack"]),
            fragments=tuple(
                Fragment(
                    TensorSpec(_text(name), _dtype(dtype), _extents(shape)),
                    Box(_extents(offset), _extents(box_shape)),
                )
                for name, dtype, shape, offset, box_shape in m["fragments"]
            ),
            context=_mapping(m["context"]),
        )
    except (KeyError, TypeError, ValueError) as e:
        raise ManifestError(path, f"its content is not a part: {e}") from None


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
            tensors={
                name: _decode_tensor(name, t, len(packs))
                for name, t in _mapping(m["tensors"]).items()
            },
        )
    except (KeyError, TypeError, ValueError) as e:
        raise ManifestError(path, f"its content is not a manifest: {e}") from None
    _check_sizes(manifest, path)
    return manifest


def _decode_tensor(name: str, t: Any, n_packs: int) -> StoredTensor:
    spec = TensorSpec(_text(name), _dtype(t["dtype"]), _extents(t["shape"]))
    grid = Grid(decode_bounds(t["grid"], spec.shape))
    if grid.n_cells > MAX_CELLS:
        raise ValueError(f"tensor {name!r} has {grid.n_cells} cells")
    return StoredTensor(spec, grid, tuple(decode_runs(t["packs"], grid.n_cells, n_packs)))


def _check_sizes(manifest: Manifest, path: Path | str) -> None:
    """Every pack is exactly as large as the fragments that it is said to hold."""
    for record, index in zip(manifest.packs, manifest.pack_indexes, strict=True):
        held = sum(f.size_bytes for f in index.fragments)
        blocks = -(-held // BLOCK_BYTES)
        if held != record.data_bytes or record.size_bytes != record.data_start + held + 4 * blocks:
            raise CoverageError(
                path, f"the tensors give pack {record.file} {held} bytes, not {record.data_bytes}"
            )


def _decode_pack(p: Any, kind: str | None = None) -> PackRecord:
    if kind is not None and p["kind"] != kind:
        raise ValueError(f"pack kind {p['kind']!r} is not known to this version")
    values = {f.name: p[f.name] for f in fields(PackRecord)}
    if not _FILE_NAME.fullmatch(_text(values["file"])):
        raise ValueError(f"file name {values['file']!r}")
    for name in values.keys() - {"file"}:
        _natural(values[name])
    return PackRecord(**values)


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < MAX_EXTENT:
        raise ValueError(f"{value!r} is not a natural number")
    return value


def _extents(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > 32:
        raise ValueError(f"{value!r} is not a shape")
    return tuple(map(_natural, value))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")
    return value


def _dtype(value: Any) -> str:
    if value not in ITEM_BYTES:
        raise ValueError(f"dtype {value!r} is not one of {', '.join(ITEM_BYTES)}")
    return str(value)


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{json.dumps(value)[:40]} is not a mapping")
    return value
