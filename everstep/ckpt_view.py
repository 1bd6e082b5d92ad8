"""What ``everstep ckpt ls`` and ``inspect`` show: the same facts as JSON and as tables."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from everstep.checkpoint.layout import Box, TensorSpec
from everstep.checkpoint.manifest import Manifest
from everstep.checkpoint.open_place import Place
from everstep.ckpt_survey import StepFacts, Survey
from everstep.ckpt_text import (
    age_words,
    matching,
    print_table,
    ranges_words,
    say,
    shape_words,
    short,
    time_words,
)
from everstep.words import plural, size_words

if TYPE_CHECKING:
    from rich.console import Console


def steps_json(place: Place, found: Survey, *, everything: bool) -> dict[str, Any]:
    """The steps of a place."""
    return {
        "place": place.name,
        "problem": found.problem,
        "steps": [_step_json(facts) for facts in _listed(found, everything)],
    }


def print_steps(
    console: "Console", place: Place, found: Survey, *, everything: bool, now_s: float
) -> None:
    """A table of the steps of a place."""
    listed = _listed(found, everything)
    rows = [
        (
            str(facts.step_id.step),
            str(facts.step_id.generation),
            size_words(facts.size_bytes),
            str(len(facts.manifest.packs)) if facts.manifest else "-",
            time_words(facts.saved_s),
            "-" if facts.saved_s is None else age_words(now_s - facts.saved_s),
            state_of(facts) + (f": {facts.problem}" if facts.problem else ""),
        )
        for facts in listed
    ]
    if rows:
        headers = ("step", "generation", "size", "ranks", "saved", "age", "state")
        print_table(console, headers, rows, right=(0, 1, 2, 3, 5))
    else:
        say(console, f"{place.name}: no checkpoint yet")
    hidden = len(found.steps) - len(listed)
    if hidden:
        say(console, f"and {hidden} outside the lineage or half-written: --all")


def state_of(facts: StepFacts) -> str:
    """'whole', 'damaged', 'half-written' or 'outside the lineage'."""
    if not facts.committed:
        return "half-written"
    if facts.problem:
        return "damaged"
    return "outside the lineage" if facts.in_lineage is False else "whole"


def _listed(found: Survey, everything: bool) -> list[StepFacts]:
    return [f for f in found.steps if everything or (f.committed and f.in_lineage is not False)]


def _step_json(facts: StepFacts) -> dict[str, Any]:
    return {
        "step": facts.step_id.step,
        "generation": facts.step_id.generation,
        "path": facts.path,
        "state": state_of(facts),
        "whole": facts.committed and facts.problem is None,
        "in_lineage": facts.in_lineage,
        "problem": facts.problem,
        "size_bytes": facts.size_bytes,
        "ranks": len(facts.manifest.packs) if facts.manifest else None,
        "mesh": dict(facts.manifest.mesh) if facts.manifest else None,
        "saved_s": facts.saved_s,
    }


def manifest_json(path: str, manifest: Manifest, only: Sequence[str]) -> dict[str, Any]:
    """What a checkpoint consists of; of the tensors those that match a pattern of ``only``."""
    boxes = boxes_of(manifest)
    chosen = matching(manifest.tensors, only)
    return {
        "path": path,
        "step": manifest.step,
        "generation": manifest.generation,
        "mesh": dict(manifest.mesh),
        "producer": dict(manifest.producer),
        "size_bytes": manifest.size_bytes,
        "objects": dict(manifest.objects),
        "packs": [
            {
                "kind": p.kind,
                "file": p.file,
                "rank": p.rank,
                "size_bytes": p.size_bytes,
                "data_bytes": p.data_bytes,
            }
            for p in manifest.packs
        ],
        "tensors": [
            {
                **_spec_json(manifest.tensors[name].spec),
                "layout": layout_words(manifest.tensors[name].spec.shape, boxes[name]),
                "packs": sorted({pack for _, pack in boxes[name]}),
            }
            for name in chosen
        ],
        "totals": {
            "tensors": len(chosen),
            "items": sum(manifest.tensors[n].spec.whole.size for n in chosen),
            "bytes": sum(manifest.tensors[n].spec.size_bytes for n in chosen),
        },
    }


def tensor_json(manifest: Manifest, name: str) -> dict[str, Any]:
    """One tensor and all its boxes."""
    boxes, spec = boxes_of(manifest)[name], manifest.tensors[name].spec
    return {
        **_spec_json(spec),
        "layout": layout_words(spec.shape, boxes),
        "boxes": [
            {
                "offset": list(box.offset),
                "shape": list(box.shape),
                "flat": _is_flat(spec.shape, box),
                "pack": pack,
                "file": manifest.packs[pack].file,
            }
            for box, pack in boxes
        ],
    }


def print_manifest(console: "Console", found: Mapping[str, Any]) -> None:
    """What ``manifest_json`` gave, for people."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    versions = ", ".join(f"{name} {version}" for name, version in found["producer"].items())
    totals = found["totals"]
    packs = plural(len(found["packs"]), "pack")
    say(console, f"{found['path']}: {size_words(found['size_bytes'])} in {packs}")
    say(console, f"  step       {found['step']}, generation {found['generation']}")
    say(console, f"  mesh       {mesh}")
    say(console, f"  written by {versions}")
    for name, value in found["objects"].items():
        say(console, f"  object     {name}: {short(json.dumps(value))}")
    say(console, "")
    print_table(
        console,
        ("pack", "rank", "size", "kind", "file"),
        [
            (str(number), str(p["rank"]), size_words(p["size_bytes"]), p["kind"], p["file"])
            for number, p in enumerate(found["packs"])
        ],
        right=(0, 1, 2),
    )
    say(console, "")
    print_table(
        console,
        ("tensor", "dtype", "shape", "size", "layout", "packs"),
        [
            (
                t["name"],
                t["dtype"],
                shape_words(t["shape"]),
                size_words(t["size_bytes"]),
                t["layout"],
                ranges_words(t["packs"]),
            )
            for t in found["tensors"]
        ],
        right=(3,),
    )
    say(
        console,
        f"{plural(totals['tensors'], 'tensor')}, {totals['items']:,} items, "
        f"{size_words(totals['bytes'])}",
    )


def print_tensor(console: "Console", found: Mapping[str, Any]) -> None:
    """What ``tensor_json`` gave, for people."""
    say(
        console,
        f"{found['name']}: {found['dtype']} {shape_words(found['shape'])}, "
        f"{size_words(found['size_bytes'])}, {found['layout']}",
    )
    rows = [
        (
            ", ".join(f"{o}:{o + n}" for o, n in zip(box["offset"], box["shape"], strict=True)),
            str(box["pack"]),
            box["file"],
        )
        for box in found["boxes"]
    ]
    print_table(console, ("box", "pack", "file"), rows, right=(1,))


def boxes_of(manifest: Manifest) -> dict[str, list[tuple[Box, int]]]:
    """For each tensor its boxes and the numbers of their packs, in order of the boxes."""
    found: dict[str, list[tuple[Box, int]]] = {name: [] for name in manifest.tensors}
    for number, index in enumerate(manifest.pack_indexes):
        for fragment in index.fragments:
            found[fragment.spec.name].append((fragment.box, number))
    return {name: sorted(boxes) for name, boxes in found.items()}


def layout_words(shape: Sequence[int], boxes: Sequence[tuple[Box, int]]) -> str:
    """'whole', 'grid 2x4', '3 boxes', '4 flat ranges', 'empty'."""
    if not math.prod(shape):
        return "empty"
    if len(boxes) == 1:
        return "whole"
    if _is_flat(shape, boxes[0][0]):
        return f"{len(boxes)} flat ranges"
    counts = [len(set(offsets)) for offsets in zip(*(b.offset for b, _ in boxes), strict=True)]
    if math.prod(counts) == len(boxes):
        return f"grid {'x'.join(map(str, counts))}"
    return f"{len(boxes)} boxes"


def _is_flat(shape: Sequence[int], box: Box) -> bool:
    """Whether the box is a range of the flattened tensor, whose dims are others."""
    return len(box.shape) != len(shape)


def _spec_json(spec: TensorSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "dtype": spec.dtype,
        "shape": list(spec.shape),
        "size_bytes": spec.size_bytes,
    }
