"""What ``everstep ckpt verify`` and ``diff`` found: the same facts as JSON and as tables."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from everstep.checkpoint.compare import Comparison, ObjectDifference, TensorComparison
from everstep.checkpoint.digest import StateDigest
from everstep.checkpoint.manifest import Manifest
from everstep.checkpoint.verify import Damage
from everstep.ckpt_text import names_words, print_table, say, shape_words, short
from everstep.words import plural, size_words

if TYPE_CHECKING:
    from rich.console import Console


def verification_json(
    path: str, manifest: Manifest, damages: Sequence[Damage], digest: StateDigest | None
) -> dict[str, Any]:
    """What verifying a checkpoint has shown."""
    return {
        "path": path,
        "whole": not damages,
        "size_bytes": manifest.size_bytes,
        "damages": [
            {"file": d.file, "block": d.block, "problem": d.problem, "tensors": list(d.tensors)}
            for d in damages
        ],
        "digest": None
        if digest is None
        else {
            "state": digest.state,
            "rng": digest.rng,
            "objects": digest.objects,
            "tensors": dict(digest.tensors),
        },
    }


def print_verification(console: "Console", found: Mapping[str, Any]) -> None:
    """What ``verification_json`` gave, for people."""
    if found["whole"]:
        say(console, f"{found['path']}: whole, {size_words(found['size_bytes'])} read")
    else:
        say(console, f"{found['path']} is damaged in {plural(len(found['damages']), 'place')}")
        rows = [
            (
                d["file"],
                "all" if d["block"] is None else str(d["block"]),
                d["problem"],
                names_words(d["tensors"]),
            )
            for d in found["damages"]
        ]
        print_table(console, ("file", "block", "problem", "tensors"), rows, right=(1,))
    if found["digest"]:
        for kind in ("state", "rng", "objects"):
            say(console, f"  {kind:8} {found['digest'][kind]}")


def comparison_json(first: str, second: str, found: Comparison) -> dict[str, Any]:
    """What is different between two checkpoints; tensors that are equal are only counted."""
    return {
        "first": first,
        "second": second,
        "equal": found.equal,
        "compared": len(found.tensors),
        "only_first": list(found.only_first),
        "only_second": list(found.only_second),
        "tensors": [_difference_json(t) for t in found.tensors if not t.equal],
        "objects": [_object_json(o) for o in found.objects],
    }


def print_comparison(
    console: "Console", found: Mapping[str, Any], *, left_out: int, objects: bool
) -> None:
    """What ``comparison_json`` gave, for people.

    Args:
        console: where.
        found: the facts.
        left_out: tensors that belong to a mesh, and were not compared because the meshes differ.
        objects: whether objects were compared.
    """
    for side in ("first", "second"):
        for name in found[f"only_{side}"]:
            say(console, f"only in {found[side]}: {name}")
    rows = []
    for t in found["tensors"]:
        a, b = (f"{s['dtype']} {shape_words(s['shape'])}" for s in (t["first"], t["second"]))
        items = math.prod(t["first"]["shape"])
        rows.append(
            (
                t["name"],
                a if a == b else f"{a} / {b}",
                "-" if t["differing"] is None else f"{t['differing']:,} of {items:,}",
                _number(t["max_difference"]),
                str(t["nans"] or "-"),
            )
        )
    if rows:
        headers = ("tensor", "type", "different", "max difference", "NaN")
        print_table(console, headers, rows, right=(2, 3, 4))
    for o in found["objects"]:
        a, b = (
            short(json.dumps(o[side])) if side in o else "absent" for side in ("first", "second")
        )
        say(console, f"object {o['path']}: {a} / {b}")
    if left_out:
        say(console, "random generators are not compared: the meshes differ")
    lonely = len(found["only_first"]) + len(found["only_second"])
    differ = len(found["tensors"])
    if found["equal"]:
        rest = ", and all objects" if objects else ""
        say(console, f"equal: {plural(found['compared'], 'tensor')}{rest}")
    else:
        say(
            console,
            f"different: {differ} of {plural(found['compared'], 'tensor')}, {lonely} on one side "
            f"only, {plural(len(found['objects']), 'object value')}",
        )


def _difference_json(found: TensorComparison) -> dict[str, Any]:
    difference = found.differences
    return {
        "name": found.first.name,
        "first": {"dtype": found.first.dtype, "shape": list(found.first.shape)},
        "second": {"dtype": found.second.dtype, "shape": list(found.second.shape)},
        "differing": difference.elements if difference else None,
        "nans": difference.nans if difference else None,
        "max_difference": _finite(difference.largest) if difference else None,
    }


def _object_json(found: ObjectDifference) -> dict[str, Any]:
    """A side that lacks the value has no member."""
    sides = {"first": found.first, "second": found.second}
    values = {side: json.loads(text) for side, text in sides.items() if text is not None}
    return {"path": found.path, **values}


def _finite(value: float | int) -> float | int | str:
    return value if math.isfinite(value) else str(value)  # JSON has no infinity


def _number(value: float | int | str | None) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
