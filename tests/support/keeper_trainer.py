"""A trainer that seals a step after the other until it is killed.

``python -m tests.support.keeper_trainer PLACE RANK WORLD_SIZE ORPHANS``: prints each step that is
sealed.
"""

import sys
from pathlib import Path

from everstep.checkpoint.keeper.client import KeeperMemory
from everstep.checkpoint.snapshots.slot_format import read_seal
from tests.support.keepers import SLOT_BYTES, order, seal


def main(place: Path, rank: int, world_size: int, orphans: Path) -> None:
    """Go on with the newest step that was sealed."""
    memory = KeeperMemory("job", rank=rank, world_size=world_size, place=place)
    slots = memory.reserve(SLOT_BYTES, 3)
    memory.set_orphan_order(order(orphans, 0, rank=rank, world_size=world_size))
    sealed = [found.step_id.step for slot in slots if (found := read_seal(slot)) is not None]
    step = max(sealed, default=-1)
    while True:
        step += 1
        index = step % len(slots)
        if index in memory.pinned():
            continue
        step_id = seal(slots[index], step, rank=rank, world_size=world_size)
        memory.sealed(index, step_id if world_size == 1 else None)
        print(step, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
