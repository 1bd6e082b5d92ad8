"""Writes a golden checkpoint: ``python -m tests.golden.make tests/golden/v1``.

Once for each format version, when it is released; what is there is for ever.
"""

import sys
from pathlib import Path

from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.lineage import StepId
from tests.golden.contents import BOUNDS, BOXES, FLAT, OBJECTS, OLDER, TENSORS, bits_of
from tests.support.stored import save_arrays

CREATED_S = 1_790_000_000.0
PRODUCER = {"everstep": "0.1.0", "python": "3.11.7", "torch": "2.13.0"}


def make(folder: Path) -> None:
    """Write the checkpoints into a new folder; the same bytes each time."""
    folder.mkdir()
    directory = CheckpointDirectory(folder)
    directory.create_generation(None, {"dp_shard": 1}, now_s=CREATED_S)
    for step in (1, 3):
        save_arrays(
            directory,
            StepId(1, step),
            {name: bits_of(name, *of, step) for name, of in OLDER.items()},
            dtypes={name: dtype for name, (dtype, _) in OLDER.items()},
            mesh={"dp_shard": 1},
            attempt="00000001",
            producer=PRODUCER,
        )
    directory.create_generation(StepId(1, 1), {"dp_shard": 3}, now_s=CREATED_S + 60)
    save_arrays(
        directory,
        StepId(2, 2),
        {name: bits_of(name, *of, 2) for name, of in TENSORS.items()},
        dtypes={name: dtype for name, (dtype, _) in TENSORS.items()},
        bounds=BOUNDS,
        boxes=BOXES,
        flat=FLAT,
        world_size=3,
        mesh={"dp_shard": 3},
        objects=OBJECTS,
        attempt="00000002",
        producer=PRODUCER,
    )


if __name__ == "__main__":
    make(Path(sys.argv[1]))
