"""Snapshots as they were sealed, to be compared with what was to be saved."""

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from everstep.checkpoint.copier import Copier, CopyJob
from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.kernels import crc32c
from everstep.checkpoint.layout import Fragment
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.manifest import Part, decode_part
from everstep.checkpoint.pack import BLOCK_BYTES, pack_starts
from everstep.checkpoint.snapshots import engine
from everstep.checkpoint.snapshots.arena import ArenaMemory
from everstep.checkpoint.snapshots.slot_format import pack_of, part_of, read_seal
from everstep.checkpoint.state_capture import Place, capture
from everstep.checkpoint.torch_state import State

ALONE = Place(0, {"rank": 1}, {"rank": 0})


@dataclass(frozen=True)
class Moment:
    """Everything that a snapshot of one rank is to hold."""

    tensors: dict[Fragment, bytes]
    context: dict[str, Any]


def moment(state: State, place: Place = ALONE) -> Moment:
    """A copy of what a state holds now."""
    held, context = capture(state, place)
    told = {name: context[name] for name in ("objects", "optimizer") if name in context}
    tensors = {fragment: raw(live.local) for fragment, live in held.items()}
    return Moment(tensors, json.loads(json.dumps(told)))


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor, dense."""
    dense = tensor.detach().cpu().contiguous().reshape(-1)
    if dense.is_complex():
        dense = torch.view_as_real(dense)
    return dense.view(torch.uint8).numpy().tobytes()


class SealedCopies(ArenaMemory):
    """Memory that keeps a copy of each slot at the moment when it is sealed."""

    def __init__(self) -> None:
        super().__init__()
        self._slots: Sequence[ByteArray] = ()
        self._seals = threading.Condition()
        self.found: dict[int, Moment] = {}

    def reserve(self, slot_bytes: int, slots: int) -> Sequence[ByteArray]:
        self._slots = super().reserve(slot_bytes, slots)
        return self._slots

    def sealed(self, index: int, all_sealed: StepId | None) -> None:
        super().sealed(index, all_sealed)
        step, found = unpack(self._slots[index])
        with self._seals:
            self.found[step] = found
            self._seals.notify_all()

    def take(self, step: int, timeout_s: float = 20.0) -> Moment:
        """What was sealed as a step, once it is; it is forgotten here."""
        with self._seals:
            assert self._seals.wait_for(lambda: step in self.found, timeout_s), f"step {step}"
            return self.found.pop(step)


def unpack(slot: ByteArray) -> tuple[int, Moment]:
    """The step and the content of a sealed slot, whose checksums are true."""
    seal = read_seal(slot)
    assert seal is not None
    part = decode_part(part_of(slot, seal), "slot")
    assert part.step == seal.step_id.step
    pack = pack_of(slot, seal)
    _check_table(part, pack)
    starts, data_bytes = pack_starts(part.fragments)
    assert data_bytes == part.pack.data_bytes
    tensors = {}
    for fragment, start in zip(part.fragments, starts, strict=True):
        begin = part.pack.data_start + start
        tensors[fragment] = pack[begin : begin + fragment.size_bytes].tobytes()
    told = {name: part.context[name] for name in ("objects", "optimizer") if name in part.context}
    return part.step, Moment(tensors, told)


def _check_table(part: Part, pack: ByteArray) -> None:
    begin, end = part.pack.data_start, part.pack.table_start
    table = pack[end:].tobytes()
    assert crc32c(table, crc32c(pack[:begin].tobytes())) == part.pack.crc32c
    blocks = range(begin, end, BLOCK_BYTES)
    sums = [crc32c(pack[at : min(at + BLOCK_BYTES, end)].tobytes()) for at in blocks]
    assert b"".join(s.to_bytes(4, "little") for s in sums) == table


def differences(wanted: Moment, found: Moment) -> list[str]:
    """The names of what is not as it was to be."""
    names = [
        fragment.key
        for fragment in wanted.tensors.keys() | found.tensors.keys()
        if wanted.tensors.get(fragment) != found.tensors.get(fragment)
    ]
    return sorted(names) + [k for k in wanted.context if wanted.context[k] != found.context.get(k)]


def copy_at(monkeypatch: pytest.MonkeyPatch, bytes_per_s: float | None) -> None:
    """From now on background threads copy at a rate."""

    class Paced(Copier):
        def start(self, *args: Any, **kwargs: Any) -> CopyJob:
            return super().start(*args, **{**kwargs, "bytes_per_s": bytes_per_s})

    monkeypatch.setattr(engine, "Copier", Paced)
