"""Any source as a committed step of a new checkpoint directory, a pack at a time (no torch)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.convert.atomic import (
    DEFAULT_BUDGET_BYTES,
    ByteCount,
    OnBytes,
    block_bytes,
    new_target,
)
from everstep.checkpoint.convert.source import Source, read_box
from everstep.checkpoint.layout import Box, Fragment, TensorSpec
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.manifest import Part
from everstep.checkpoint.pack import (
    StridedBytes,
    dense_strides,
    plan_pack,
    write_pack,
)
from everstep.checkpoint.producer import producer

_SHARE = 4
"""A fragment may take one part of the budget in so many."""


def write_step(
    source: Source,
    target: Path,
    *,
    objects: Mapping[str, Any],
    step: int = 0,
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
    on_bytes: OnBytes | None = None,
) -> Path:
    """Write all tensors of a source as one step; returns its path.

    Fragments are held in memory one at a time: where the largest tensor exceeds the budget's share,
    all are cut by rows over as many packs as it takes, as that many ranks would have done.

    Args:
        source: what to write.
        target: the new directory of checkpoints; it appears whole, or not at all.
        objects: JSON-able state of the manifest.
        step: number of the step.
        budget_bytes: memory to use, beside the staging buffer of the pack.
        on_bytes: progress.

    Raises:
        TargetExistsError: the target is taken.
    """
    block_bytes(budget_bytes)  # refuses one that is too small
    layouts = cut_rows(source.tensors, budget_bytes // _SHARE)
    written = ByteCount(on_bytes)
    with new_target(target) as folder:
        directory = CheckpointDirectory(folder)
        folder.mkdir()
        generation = directory.create_generation(None, {"rank": len(layouts)})
        step_id = StepId(generation.number, step)
        for rank, fragments in enumerate(layouts):
            context: dict[str, Any] = {}
            if rank == 0:
                context = {"mesh": {"rank": len(layouts)}, "producer": producer()}
                context["objects"] = dict(objects)
            plan = plan_pack(rank, fragments)
            path = directory.begin_step(step_id) / f"rank-{rank:05d}-import.safetensors"
            before = written.total

            def count(done: int, before: int = before) -> None:
                written.reach(before + done)

            record = write_pack(path, plan, _reads(source), on_bytes=count)
            directory.put_part(
                Part(
                    generation=step_id.generation,
                    step=step,
                    rank=rank,
                    world_size=len(layouts),
                    pack=record,
                    fragments=plan.fragments,
                    context=context,
                )
            )
        directory.commit(step_id, len(layouts))
        name = directory.step_path(step_id).name
    return target / name


def cut_rows(tensors: Mapping[str, TensorSpec], most_bytes: int) -> list[list[Fragment]]:
    """Fragments per pack, none larger than ``most_bytes`` unless one row is (pure).

    Tensors that fit are whole, on the pack that has least so far.
    """
    packs = 1
    for tensor in tensors.values():
        if tensor.shape and tensor.shape[0]:
            rows = max(1, most_bytes * tensor.shape[0] // max(1, tensor.size_bytes))
            packs = max(packs, -(-tensor.shape[0] // rows))
    layouts: list[list[Fragment]] = [[] for _ in range(packs)]
    held_bytes = [0] * packs
    for tensor in sorted(tensors.values(), key=lambda t: (-t.size_bytes, t.name)):
        if tensor.size_bytes <= most_bytes or not tensor.shape:
            boxes = {held_bytes.index(min(held_bytes)): tensor.whole}
        else:
            n = tensor.shape[0]
            width = -(-n // packs)
            zeros = (0,) * (len(tensor.shape) - 1)
            boxes = {
                pack: Box((begin, *zeros), (min(width, n - begin), *tensor.shape[1:]))
                for pack, begin in enumerate(range(0, n, width))
            }
        for pack, box in boxes.items():
            layouts[pack].append(Fragment(tensor, box))
            held_bytes[pack] += box.size * tensor.item_bytes
    return layouts


def _reads(source: Source) -> Any:
    def read(fragment: Fragment) -> StridedBytes:
        data = read_box(source, fragment.spec.name, fragment.box)
        return StridedBytes(data, 0, dense_strides(fragment.box.shape, fragment.spec.item_bytes))

    return read
