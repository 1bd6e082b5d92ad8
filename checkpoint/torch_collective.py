"""The collective over a gloo process group of its own.

Never the default group: a background exchange would collide with the trainer's collectives.
"""

import struct
import zlib
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.errors import CollectiveError

_HEAD = struct.Struct("<qq")
"""Checksum of the tag, bytes of the payload."""
_HEAD_BYTES = 1024
"""Of the first all-gather, which carries short payloads, too."""


class ProcessGroupCollective:
    """Exchanges bytes over a new gloo group of all ranks; creating it is a collective call.

    Args:
        timeout_s: longest time that an exchange waits for the other ranks.
    """

    def __init__(self, *, timeout_s: float = 600.0) -> None:
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def exchange(self, tag: str, payload: bytes) -> list[bytes]:
        """See ``Collective.exchange``: one all-gather, and another one where payloads are long."""
        try:
            mine = torch.zeros(_HEAD_BYTES, dtype=torch.uint8)
            head = _HEAD.pack(zlib.crc32(tag.encode()), len(payload)) + payload
            mine[: len(head)] = _as_tensor(head[:_HEAD_BYTES])
            heads = [found.numpy().tobytes() for found in self._gather(mine)]
            tags, sizes = zip(*(_HEAD.unpack_from(found) for found in heads), strict=True)
            if len(set(tags)) > 1:
                raise CollectiveError(f"ranks are out of step: this one is at {tag!r}")
            if _HEAD.size + max(sizes) <= _HEAD_BYTES:
                return [h[_HEAD.size :][:size] for h, size in zip(heads, sizes, strict=True)]
            sent = torch.zeros(max(sizes), dtype=torch.uint8)
            if payload:
                sent[: len(payload)] = _as_tensor(payload)
            received = self._gather(sent)
        except RuntimeError as e:
            raise CollectiveError(
                f"rank {self.rank} lost contact with the other ranks at {tag!r}: {e}"
            ) from e
        return [data[:size].numpy().tobytes() for data, size in zip(received, sizes, strict=True)]

    def swap(
        self, sends: Sequence[tuple[int, ByteArray]], receives: Sequence[tuple[int, ByteArray]]
    ) -> None:
        """See ``shared_read.Peers.swap``."""
        try:
            works = [
                dist.isend(torch.from_numpy(data), rank, group=self._group) for rank, data in sends
            ]
            works += [
                dist.irecv(torch.from_numpy(data), rank, group=self._group)
                for rank, data in receives
            ]
            for work in works:
                if work is not None:
                    work.wait()
        except RuntimeError as e:
            raise CollectiveError(
                f"rank {self.rank} lost contact with the other ranks while they shared packs: {e}"
            ) from e

    def _gather(self, mine: torch.Tensor) -> list[torch.Tensor]:
        gathered = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(gathered, mine, group=self._group)
        return gathered


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
