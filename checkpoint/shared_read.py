"""Ranks fill their tensors from an object store together: each byte is fetched once per job.

Every rank plans what it needs, all learn what all need, and then windows of packs go round by
round from the rank that fetches them to those that need them (see ``fan_out``). A rank in trouble
goes on serving the others, and raises at the end. Beside the arrays that are filled this takes the
windows under way (24 MiB) and two rounds of buffers (at most 16 MiB each).
"""

import base64
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any, Protocol, runtime_checkable

import numpy as np

from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.errors import CheckpointError
from everstep.checkpoint.fan_out import Delivery, plan_fan_out
from everstep.checkpoint.ranged_plan import Blocks, Piece, Window
from everstep.checkpoint.ranged_read import Arrivals, RangedReader, Request


@runtime_checkable
class Peers(Protocol):
    """A collective whose ranks can also send bytes to one another."""

    @property
    def rank(self) -> int:
        """Number of this rank, from 0."""
        ...

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        ...

    def swap(
        self, sends: Sequence[tuple[int, ByteArray]], receives: Sequence[tuple[int, ByteArray]]
    ) -> None:
        """Send arrays to ranks and fill arrays from ranks; between two ranks in the same order.

        Raises:
            CollectiveError: a rank is gone or too late.
        """
        ...


class SharedRead:
    """One load of one rank; every rank makes the same calls, with an exchange between them.

    ``needs`` tells what to give to ``open``, ``open`` what to give to ``fill``: both are JSON-able.

    Args:
        reader: of the checkpoint.
        peers: the ranks.
        requests: what this rank wants.
    """

    def __init__(self, reader: RangedReader, peers: Peers, requests: Sequence[Request]) -> None:
        self._reader, self._peers, self._requests = reader, peers, requests
        self._plan: dict[int, list[Piece]] = reader.plan(requests)
        self._needs = reader.needs(self._plan)
        self._all: list[dict[int, Blocks]] = []

    def needs(self) -> dict[str, str]:
        """Which blocks of which packs this rank needs."""
        return {str(pack): _encode(np.packbits(b).tobytes()) for pack, b in self._needs.items()}

    def open(self, needs: Sequence[Mapping[str, str]]) -> dict[str, str]:
        """Open this rank's share of the packs that anyone needs; their block tables.

        Raises:
            DamagedError: a pack is not what the manifest says.
        """
        self._all = [
            {int(pack): self._blocks(int(pack), coded) for pack, coded in blocks.items()}
            for blocks in needs
        ]
        packs = sorted({pack for blocks in self._all for pack in blocks})
        share = packs[self._peers.rank :: self._peers.world_size]
        self._reader.open_packs(share)
        return {str(p): _encode(self._reader.tables[p].astype("<u4").tobytes()) for p in share}

    def fill(
        self,
        tables: Sequence[Mapping[str, str]],
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        """Fill the arrays of the requests.

        Raises:
            DamagedError: a pack is not what the manifest says; part of the arrays may be filled.
            CheckpointError: another rank could not read what this one needs.
            OSError: as the store reports it.
        """
        for part in tables:
            for pack, coded in part.items():
                self._reader.tables[int(pack)] = np.frombuffer(_decode(coded), "<u4")
        arrivals = self._deliver(plan_fan_out(self._all))
        try:
            self._reader.copy(self._requests, self._plan, self._needs, arrivals, on_bytes)
        finally:
            for _ in arrivals:  # the others wait for what this rank fetches
                pass

    def _blocks(self, pack: int, coded: str) -> Blocks:
        bits = np.unpackbits(np.frombuffer(_decode(coded), np.uint8))
        return bits[: self._reader.n_blocks(pack)].astype(np.bool_)

    def _deliver(self, rounds: Sequence[Sequence[Delivery]]) -> Arrivals:
        """The windows that this rank needs, in order; raises after the last round."""
        me = self._peers.rank
        own = [d.window for each in rounds for d in each if d.reader == me]
        errors: list[Exception] = []

        def fetch(window: Window) -> ByteArray:
            """The window and one byte: whether it could be read."""
            sealed = np.zeros(self._reader.window_bytes(window) + 1, np.uint8)
            try:
                sealed[:-1] = self._reader.fetch(window)
                sealed[-1] = 1
            except Exception as e:  # whatever it is, the others wait for this window
                errors.append(e)
            return sealed

        with closing(self._reader.fetch_all(own, fetch)) as fetched:
            for each in rounds:
                mine = [d for d in each if me in d.needers]
                for delivery, sealed in zip(mine, self._swap(mine, fetched), strict=True):
                    if not sealed[-1] and delivery.reader != me:
                        errors.append(
                            CheckpointError(f"rank {delivery.reader} could not read a pack for it")
                        )
                    if not errors:
                        yield delivery.window, sealed[:-1]
        if errors:
            raise errors[0]

    def _swap(self, deliveries: Sequence[Delivery], fetched: Arrivals) -> list[ByteArray]:
        me = self._peers.rank
        arrays: list[ByteArray] = []
        sends: list[tuple[int, ByteArray]] = []
        receives: list[tuple[int, ByteArray]] = []
        for delivery in deliveries:
            if delivery.reader == me:
                arrays.append(next(fetched)[1])
                sends += [(rank, arrays[-1]) for rank in delivery.needers if rank != me]
            else:
                size = self._reader.window_bytes(delivery.window) + 1
                arrays.append(np.empty(size, np.uint8))
                receives.append((delivery.reader, arrays[-1]))
        self._peers.swap(sends, receives)
        return arrays


def _encode(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 1)).decode()


def _decode(coded: Any) -> bytes:
    return zlib.decompress(base64.b64decode(coded))
