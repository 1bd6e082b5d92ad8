"""What a view shows of tensors that are laid out in odd ways."""

from typing import Any

import pytest

from everstep.checkpoint.layout import FlatRanges, TensorSpec
from everstep.checkpoint.manifest import Manifest, StoredTensor
from everstep.checkpoint.pack import PackRecord
from everstep.checkpoint.views.zarr_metadata import CORE_TYPES
from everstep.checkpoint.views.zarr_nodes import ArrayNode, GroupNode, zarr_nodes
from tests.support.written_steps import Cut, packed, random_bits, uneven_cuts


def _nodes(name: str) -> dict[str, ArrayNode | GroupNode]:
    manifest, _ = packed({name: uneven_cuts()[name]})
    return {node.path: node for node in zarr_nodes(manifest, CORE_TYPES)}


def test_boxes_are_gathered_by_shape() -> None:
    nodes = _nodes("boxes")
    assert list(nodes) == ["boxes/2x3", "boxes/3x5", "boxes/4x2", "boxes", ""]
    attributes = nodes["boxes/2x3"].metadata["attributes"]
    assert attributes == {"everstep_dtype": "I16", "everstep_offsets": [[0, 2], [2, 2]]}
    assert nodes["boxes"].metadata["attributes"] == {
        "everstep_dtype": "I16",
        "everstep_shape": [7, 5],
        "everstep_arrays": ["2x3", "3x5", "4x2"],
    }


def test_flat_ranges_are_the_boxes_that_they_consist_of() -> None:
    nodes = _nodes("flat")  # [0, 12), [12, 24) and [24, 35) of 7 by 5
    pieces = nodes["flat/1x2"].metadata["attributes"]["everstep_offsets"]
    assert pieces == [[2, 0]]
    assert "flat/2x5" in nodes


def test_flat_ranges_of_whole_rows_are_an_array() -> None:
    node = _nodes("flat rows")["flat rows"]
    assert isinstance(node, ArrayNode)
    assert node.counts in {(4, 1), (7, 1)}  # whether the last chunk can be made full


@pytest.mark.parametrize("shape", [(3, 0), (0,), (0, 3), (2, 0, 5)])
def test_a_tensor_without_items_is_an_array_even_as_flat_ranges(shape: tuple[int, ...]) -> None:
    fields: dict[str, Any] = {"generation": 1, "step": 1, "mesh": {}, "producer": {}, "objects": {}}
    record = PackRecord(
        file="rank-0.safetensors", rank=0, size_bytes=4096, data_start=4096, data_bytes=0, crc32c=0
    )
    tensor = StoredTensor(TensorSpec("w", "F32", shape), FlatRanges(shape, (0,)), ())
    manifest = Manifest(**fields, packs=(record,), tensors={"w": tensor})
    node = next(zarr_nodes(manifest, CORE_TYPES))
    assert isinstance(node, ArrayNode)
    assert node.metadata["shape"] == list(shape)
    assert not len(node.offsets)


def test_the_last_chunk_is_full_where_the_file_has_more() -> None:
    cuts = {
        "a": Cut("F32", random_bits((13, 4), "F32"), ([4, 8, 12], [])),
        "b": Cut("U8", random_bits((64,), "U8"), ([16, 32, 48],)),
    }
    manifest, packs = packed(cuts)
    (node,) = (n for n in zarr_nodes(manifest, CORE_TYPES) if n.path == "a")
    assert isinstance(node, ArrayNode)
    ends = node.offsets + node.chunk_bytes
    assert node.counts in {(4, 1), (13, 1)}
    assert all(
        end <= len(packs[manifest.packs[pack].file])
        for pack, end in zip(node.packs.tolist(), ends.tolist(), strict=True)
    )
