"""The files of views that every checkpoint carries beside its manifest.

They are derived: a function of the manifest, written before it, and of no use to our own readers.
"""

from collections.abc import Mapping
from pathlib import Path

from everstep.checkpoint.manifest import Manifest
from everstep.checkpoint.views.ocdbt import ocdbt_files


def index_files(manifest: Manifest) -> Mapping[str, bytes]:
    """The files to write into the directory of a step, by name; always the same for a manifest."""
    return ocdbt_files(manifest)


def damaged_index_files(manifest: Manifest, step_path: Path) -> list[str]:
    """Names of those that are missing, or not what they should be.

    Raises:
        OSError: a file that is there cannot be read.
    """
    damaged = []
    for name, data in index_files(manifest).items():
        path = step_path / name
        if not path.is_file() or path.read_bytes() != data:
            damaged.append(name)
    return damaged
