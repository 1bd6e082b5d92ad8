"""The collective over a gloo process group of its own.

Never the default group: a background exchange would collide with the trainer's collectives.
"""

import zlib
from datetime import timedelta

import torch
import torch.distributed as dist

from everstep.checkpoint.errors import CollectiveError


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
        """See ``Collective.exchange``; two all-gathers, lengths first."""
        mine = torch.tensor([zlib.crc32(tag.encode()), len(payload)], dtype=torch.int64)
        heads = torch.empty(self.world_size, 2, dtype=torch.int64)
        try:
            dist.all_gather_into_tensor(heads, mine, group=self._group)
            tags, sizes = heads[:, 0].tolist(), heads[:, 1].tolist()
            if len(set(tags)) > 1:
                raise CollectiveError(f"ranks are out of step: this one is at {tag!r}")
            width = max(sizes)
            if width == 0:
                return [b""] * self.world_size
            sent = torch.zeros(width, dtype=torch.uint8)
            if payload:
                sent[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
            received = torch.empty(self.world_size, width, dtype=torch.uint8)
            dist.all_gather_into_tensor(received, sent, group=self._group)
        except RuntimeError as e:
            raise CollectiveError(
                f"rank {self.rank} lost contact with the other ranks at {tag!r}: {e}"
            ) from e
        return [received[r, :n].numpy().tobytes() for r, n in enumerate(sizes)]
