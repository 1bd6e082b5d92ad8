"""A reader written from checkpoint/FORMAT.md alone, without a line of everstep."""

import json
from itertools import pairwise, product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = {"F32": "<f4", "I64": "<i8", "U8": "u1", "BF16": "<u2", "BOOL": "?", "C128": "<c16"}


def _crc32c(data: bytes) -> int:
    """Bit by bit, as RFC 3720 has it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def read_record(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    body, tail = data[: data.rindex(b',"crc32c":')], data[data.rindex(b',"crc32c":') :]
    assert tail == b',"crc32c":"%08x"}\n' % _crc32c(body)
    record: dict[str, Any] = json.loads(data)
    return record


def _cells(tensor: dict[str, Any]) -> list[tuple[list[tuple[int, int]], int]]:
    """For each cell its [begin, end) per dim (of the flat tensor, if it is flat), and its pack."""
    if "boxes" in tensor:
        cells = [
            [(o, o + n) for o, n in zip(offset, shape, strict=True)]
            for offset, shape in tensor["boxes"]
        ]
    else:
        entries = tensor.get("grid", [tensor.get("flat")])
        extents = tensor["shape"] if "grid" in tensor else [prod(tensor["shape"])]
        spans = []
        for entry, n in zip(entries, extents, strict=True):
            inner = list(range(entry, n, entry)) if isinstance(entry, int) else entry
            edges = [0, *inner, n] if n else [0]
            spans.append(list(pairwise(edges)))
        cells = list(map(list, product(*spans)))
    packs = [first + i * step for first, count, step in tensor["packs"] for i in range(count)]
    return list(zip(cells, packs, strict=True))


def _fill(
    tensor: np.ndarray[Any, Any],
    coded: dict[str, Any],
    cell: list[tuple[int, int]],
    data: bytes,
    at: int,
) -> bytes:
    """Fill a cell from the bytes of a file, from byte ``at`` on; the bytes that it took."""
    whole = tensor.reshape(-1) if "flat" in coded else tensor
    target = whole[(*(slice(*span) for span in cell), ...)]
    target[...] = np.frombuffer(data, target.dtype, target.size, at).reshape(target.shape)
    return data[at : at + target.nbytes]


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """The objects and all tensors of one checkpoint."""
    manifest = read_record(folder / "manifest.json")
    held: list[list[tuple[int, str, list[int], list[tuple[int, int]]]]] = [
        [] for _ in manifest["packs"]
    ]
    found = {}
    for name, tensor in manifest["tensors"].items():
        dtype = np.dtype(DTYPES[tensor["dtype"]])
        found[name] = np.zeros(tensor["shape"], dtype)
        for cell, pack in _cells(tensor):
            held[pack].append((-dtype.itemsize, name, [begin for begin, _ in cell], cell))
    for pack, cells in zip(manifest["packs"], held, strict=True):
        data = (folder / pack["file"]).read_bytes()
        assert len(data) == pack["size_bytes"]
        block = manifest["block_bytes"]
        offsets = [first + i * step for first, n, step in pack.get("offsets", []) for i in range(n)]
        if pack["kind"] == "raw_extents":
            table = (folder / (pack["file"] + ".crc32c")).read_bytes()
            assert _crc32c(table) == pack["crc32c"]
            sums = iter(np.frombuffer(table, "<u4").tolist())
            for at, (_, name, _, cell) in zip(offsets, sorted(cells), strict=True):
                stored = _fill(found[name], manifest["tensors"][name], cell, data, at)
                for begin in range(0, len(stored), block):
                    assert next(sums) == _crc32c(stored[begin : begin + block])
            assert next(sums, None) is None
            continue
        begin, end = pack["data_start"], pack["data_start"] + pack["data_bytes"]
        assert _crc32c(data[:begin] + data[end:]) == pack["crc32c"]
        table = np.frombuffer(data[end:], "<u4")
        blocks = [data[at : min(at + block, end)] for at in range(begin, end, block)]
        assert table.tolist() == [_crc32c(b) for b in blocks]
        for _, name, _, cell in sorted(cells):
            begin += len(_fill(found[name], manifest["tensors"][name], cell, data, begin))
        assert begin == end
    return manifest["objects"], found
