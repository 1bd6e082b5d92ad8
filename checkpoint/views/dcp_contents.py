"""What a checkpoint holds in the terms of torch DCP: tensors, objects, and where they nest (pure).

DCP knows a state as a flat mapping from names to tensors and to bytes; for each name it keeps the
path in the nested state that the user gave. The tensors of a checkpoint are what they are; the rest
is the manifest's object ``dcp``::

    {"paths": {name: path}, "plain": {name: value}, "bytes": [name, ...]}

``plain`` are objects that are JSON-able exactly, in the form of ``plain_json``; no pickle is kept
of them. What is not, DCP pickles: ``bytes`` names the U8 tensors that hold what it made. Nothing
here unpickles these.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everstep.checkpoint.errors import ManifestError, StateError
from everstep.checkpoint.layout import Fragment, TensorSpec
from everstep.checkpoint.manifest import Manifest
from everstep.checkpoint.plain_json import Json, from_json, to_json

OBJECT = "dcp"
MAX_PLAIN_BYTES = 2**16
"""Of one object in JSON; larger ones stay out of the manifest."""
MAX_INDEX = 2**20
"""Of an item in a list of the nested state."""
_EXACT = (type(None), bool, int, float, str)


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A checkpoint as DCP sees it; the names of the three kinds differ."""

    tensors: Mapping[str, TensorSpec]
    plain: Mapping[str, Json]
    raw: Mapping[str, TensorSpec]
    """Bytes that DCP has pickled, each kept as a U8 tensor of one dim."""
    paths: Any
    """What DCP calls planner data: name -> path, unless a planner made something else of it."""


def is_plain(value: Any) -> bool:
    """Whether JSON gives back exactly this value: subclasses, such as enums, would change."""
    if type(value) in _EXACT:
        return True
    if type(value) is list or type(value) is tuple:
        return all(map(is_plain, value))
    if type(value) is dict:
        return all(is_plain(k) and is_plain(v) for k, v in value.items())
    return False


def plain_form(value: Any, name: str) -> tuple[Json] | None:
    """The JSON form of an object that can go to the manifest, alone in a tuple; else None."""
    try:
        if not is_plain(value):
            return None
        coded = to_json(value, name)
        small = len(json.dumps(coded, allow_nan=False).encode()) <= MAX_PLAIN_BYTES
    except (RecursionError, UnicodeEncodeError):
        return None
    return (coded,) if small else None


def dcp_objects(plain: Mapping[str, Json], raw: list[str], paths: Any) -> dict[str, Json]:
    """The manifest's objects: ``dcp`` alone.

    Raises:
        StateError: a planner left planner data that is not plain.
    """
    if not is_plain(paths):
        raise StateError(
            "the planner's data for the checkpoint (Metadata.planner_data) are not plain: keep "
            "numbers, text, lists, tuples and mappings in them"
        )
    return {
        OBJECT: {
            "paths": to_json(paths, "planner_data"),
            "plain": dict(sorted(plain.items())),
            "bytes": list[Json](sorted(raw)),
        }
    }


def contents_of(manifest: Manifest, where: Path | str) -> Contents:
    """What a checkpoint holds, whoever wrote it.

    Of one that has no object ``dcp``, a run's own, the tensors have their logical names, nested by
    the first word (``model.<parameter>`` is ``<parameter>`` in ``model``), and the objects are
    ``object.<name>``, ``object.optimizer`` among them.

    Raises:
        ManifestError: the object ``dcp`` is not what ``dcp_objects`` makes.
    """
    specs = {name: stored.spec for name, stored in manifest.tensors.items()}
    if OBJECT not in manifest.objects:
        plain = {
            name if name.startswith("object.") else f"object.{name}": value
            for name, value in manifest.objects.items()
        }
        paths = {name: tuple(name.split(".", 1)) for name in (*specs, *plain)}
        return Contents(tensors=specs, plain=plain, raw={}, paths=paths)
    try:
        found = manifest.objects[OBJECT]
        names, plain = list(found["bytes"]), dict(found["plain"])
        raw = {name: specs[name] for name in names}
        if any(s.dtype != "U8" or len(s.shape) != 1 for s in raw.values()):
            raise ValueError("bytes are not kept as a U8 tensor of one dim")
        if plain.keys() & specs.keys():
            raise ValueError("a name is that of a tensor and of an object")
        paths = from_json(found["paths"])
        if isinstance(paths, dict):
            _check_indexes(paths)
    except (KeyError, TypeError, ValueError) as e:
        raise ManifestError(where, f"its object {OBJECT!r} cannot be decoded: {e!r}") from None
    tensors = {name: spec for name, spec in specs.items() if name not in raw}
    return Contents(tensors=tensors, plain=plain, raw=raw, paths=paths)


def _check_indexes(paths: Mapping[Any, Any]) -> None:
    """DCP makes lists as long as the largest index in a path says."""
    for path in paths.values():
        for index in path if isinstance(path, tuple) else ():
            if type(index) is int and not 0 <= index < MAX_INDEX:
                raise ValueError(f"a path has the index {index}")


def spread(fragments: Iterable[Fragment]) -> list[list[Fragment]]:
    """Fragments in as few lists as there may be packs, at least one, for a manifest to be valid.

    No two boxes of a tensor share a pack: a tensor has at most as many cells as there are packs.
    """
    packs: list[list[Fragment]] = [[]]
    seen: Counter[str] = Counter()
    for fragment in fragments:
        number = seen[fragment.spec.name]
        if number == len(packs):
            packs.append([])
        packs[number].append(fragment)
        seen[fragment.spec.name] += 1
    return packs


def plain_value(contents: Contents, name: str, where: Path | str) -> Any:
    """A plain object by name; raises ManifestError where it is none."""
    try:
        return from_json(contents.plain[name])
    except (TypeError, ValueError, RecursionError) as e:
        raise ManifestError(where, f"its object {name!r} cannot be decoded: {e}") from None
