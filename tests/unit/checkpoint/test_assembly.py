"""What is kept from step to step gives what starting anew gives, whatever changes in between."""

import json
from collections.abc import Mapping, Sequence

import pytest

from everstep.checkpoint.assembly import Assembly
from everstep.checkpoint.errors import ManifestError
from everstep.checkpoint.layout import Box, Fragment, TensorSpec
from everstep.checkpoint.manifest import (
    Manifest,
    Part,
    build_manifest,
    decode_part,
    encode_manifest,
    encode_part,
)
from everstep.checkpoint.pack import PackRecord, plan_pack
from everstep.checkpoint.records import encode_record
from everstep.checkpoint.views import index_files as index_module
from everstep.checkpoint.views.index_files import index_files

NAMES = ("model.w", "zz behind zarr.json", "model.scalar")


def _layout(cut: int) -> list[list[Fragment]]:
    """Two ranks: rows up to ``cut``, and from there on."""
    specs = [TensorSpec(name, "F32", (8, 3)) for name in NAMES[:2]]
    first = [Fragment(s, Box((0, 0), (cut, 3))) for s in specs]
    scalar = TensorSpec(NAMES[2], "I64", ())
    return [
        [*first, Fragment(scalar, scalar.whole)],
        [Fragment(s, Box((cut, 0), (8 - cut, 3))) for s in specs],
    ]


def _encoded(step: int, cut: int, attempt: str = "ab") -> list[tuple[str, bytes]]:
    parts = []
    for rank, fragments in enumerate(_layout(cut)):
        plan = plan_pack(rank, fragments)
        record = PackRecord(
            file=f"rank-{rank:05d}-{attempt}.safetensors",
            rank=rank,
            size_bytes=plan.size_bytes,
            data_start=len(plan.header),
            data_bytes=plan.data_bytes,
            crc32c=step * 7 + rank,
        )
        context = {"mesh": {"dp": 2}, "producer": {}, "objects": {"step": step}} if not rank else {}
        part = Part(
            generation=1,
            step=step,
            rank=rank,
            world_size=2,
            pack=record,
            fragments=plan.fragments,
            context=context,
        )
        parts.append((f"parts/{rank}", encode_part(part)))
    return parts


def _anew(named: Sequence[tuple[str, bytes]]) -> tuple[Manifest, Mapping[str, bytes]]:
    manifest = build_manifest([decode_part(data, path) for path, data in named])
    return manifest, index_files(manifest)


def test_step_after_step_is_as_if_each_were_the_first() -> None:
    assembly = Assembly()
    steps = [(1, 4, "ab"), (2, 4, "ab"), (13, 4, "ab"), (14, 5, "ab"), (15, 4, "ab"), (16, 4, "cd")]
    for step, cut, attempt in steps:
        named = _encoded(step, cut, attempt)
        manifest = assembly.manifest(assembly.parts(named), None)
        expected, files = _anew(named)
        assert manifest == expected
        assert encode_manifest(manifest) == encode_manifest(expected)
        assert assembly.index_files(manifest) == files


def test_an_unchanged_layout_is_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Manifest] = []
    view = index_module.OcdbtView

    def counted(manifest: Manifest) -> object:
        made.append(manifest)
        return view(manifest)

    monkeypatch.setattr(index_module, "OcdbtView", counted)
    assembly = Assembly()
    manifests = []
    for step in range(1, 5):
        manifests.append(assembly.manifest(assembly.parts(_encoded(step, 4)), None))
        assembly.index_files(manifests[-1])
    assert len(made) == 1
    assert all(m.tensors is manifests[0].tensors for m in manifests)


def test_what_only_compares_equal_is_refused_every_time() -> None:
    assembly = Assembly()
    named = _encoded(1, 4)
    assembly.parts(named)
    path, data = named[1]
    members = json.loads(data)
    del members["crc32c"], members["everstep_part"]
    members["fragments"]["rows"][0][2] = False  # 0 before
    spoilt = encode_record("everstep_part", 1, members)
    with pytest.raises(ManifestError, match="its content is not a part"):
        assembly.parts([named[0], (path, spoilt)])
    assert assembly.parts(named) == [decode_part(d, p) for p, d in named]


def test_checksums_are_those_of_the_step() -> None:
    assembly = Assembly()
    crcs = []
    for step in (1, 2):
        manifest = assembly.manifest(assembly.parts(_encoded(step, 4)), None)
        crcs.append([p.crc32c for p in manifest.packs])
    assert crcs == [[7, 8], [14, 15]]
