"""Checkpoints of arrays that are cut as a test says, written without torch and without ranks."""

from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.layout import Box, Fragment, TensorSpec
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.manifest import Part
from everstep.checkpoint.pack import StridedBytes, dense_strides, plan_pack, write_pack
from everstep.checkpoint.step_reader import StepReader

Array = npt.NDArray[Any]
SAFETENSORS_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "complex64": "C64", "int64": "I64",
    "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32",
    "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


def cut(shape: Sequence[int], bounds: Sequence[Sequence[int]]) -> list[Box]:
    """The boxes between inner boundaries per dim; of an empty tensor its own box."""
    if not all(shape):
        return [Box((0,) * len(shape), tuple(shape))]
    edges = [[0, *inner, n] for inner, n in zip(bounds, shape, strict=True)]
    spans = product(*(list(pairwise(e)) for e in edges))
    return [Box(tuple(a for a, _ in s), tuple(b - a for a, b in s)) for s in spans]


def save_arrays(
    directory: CheckpointDirectory,
    step_id: StepId,
    arrays: Mapping[str, Array],
    *,
    world_size: int = 1,
    bounds: Mapping[str, Sequence[Sequence[int]]] | None = None,
    boxes: Mapping[str, Sequence[Box]] | None = None,
    flat: Mapping[str, Sequence[int]] | None = None,
    dtypes: Mapping[str, str] | None = None,
    objects: Mapping[str, Any] | None = None,
    mesh: Mapping[str, int] | None = None,
    attempt: str = "0123abcd",
    producer: Mapping[str, str] | None = None,
) -> None:
    """Commit a checkpoint; its fragments go round the ranks.

    Args:
        directory: where.
        step_id: as which step; its generation has to be there.
        arrays: the tensors, by logical name.
        world_size: number of packs.
        bounds: inner boundaries per dim of the tensors that are cut.
        boxes: those of the tensors that are cut in another way.
        flat: inner boundaries of the tensors that are cut as if they were flat.
        dtypes: of arrays that hold the bits of a type that numpy lacks.
        objects: JSON-able state.
        mesh: default: one axis over all ranks.
        attempt: part of the packs' names.
        producer: versions; default: of a test.
    """
    held: list[dict[Fragment, Array]] = [{} for _ in range(world_size)]
    turn = 0
    for name, array in sorted(arrays.items()):
        dtype = (dtypes or {}).get(name) or SAFETENSORS_NAMES[array.dtype.name]
        spec = TensorSpec(name, dtype, array.shape)
        inner = (bounds or {}).get(name) or [()] * array.ndim
        is_flat = name in (flat or {})
        if flat and is_flat:
            array, inner = array.reshape(-1), [flat[name]]
        for box in (boxes or {}).get(name) or cut(array.shape, inner):
            index = tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))
            fragment = Fragment(spec, box, is_flat)
            held[turn % world_size][fragment] = np.ascontiguousarray(array[index])
            turn += 1
    path = directory.begin_step(step_id)
    for rank, fragments in enumerate(held):

        def source(fragment: Fragment, of: Mapping[Fragment, Array] = fragments) -> StridedBytes:
            data = of[fragment]
            strides = dense_strides(fragment.box.shape, fragment.spec.item_bytes)
            return StridedBytes(data.reshape(-1).view(np.uint8), 0, strides)

        plan = plan_pack(rank, fragments)
        record = write_pack(path / f"rank-{rank:05d}-{attempt}.safetensors", plan, source)
        context = {
            "mesh": dict(mesh or {"rank": world_size}),
            "producer": dict(producer or {"everstep": "test"}),
            "objects": dict(objects or {}),
        }
        directory.put_part(
            Part(
                generation=step_id.generation,
                step=step_id.step,
                rank=rank,
                world_size=world_size,
                pack=record,
                fragments=plan.fragments,
                context=context if rank == 0 else {},
            )
        )
    directory.commit(step_id, world_size)


def saved_reader(root: Path, arrays: Mapping[str, Array], **options: Any) -> StepReader:
    """A reader of a new checkpoint of arrays: step 1 of generation 1."""
    directory = CheckpointDirectory(root)
    generation = directory.create_generation(None, {"rank": options.get("world_size", 1)})
    step_id = StepId(generation.number, 1)
    save_arrays(directory, step_id, arrays, **options)
    return StepReader(directory.step_path(step_id), directory.manifest(step_id))
