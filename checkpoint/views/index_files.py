"""The files of views that every checkpoint carries beside its manifest.

They are derived: a function of the manifest, written before it, and of no use to our own readers.
"""

from collections.abc import Callable, Mapping

from everstep.checkpoint.manifest import Manifest
from everstep.checkpoint.views.ocdbt import ocdbt_files


def index_files(manifest: Manifest) -> Mapping[str, bytes]:
    """The files to write into the directory of a step, by name; always the same for a manifest."""
    return ocdbt_files(manifest)


def damaged_index_files(manifest: Manifest, read: Callable[[str], bytes]) -> list[str]:
    """Names of those that are missing, or not what they should be.

    Args:
        manifest: the checkpoint.
        read: gives the bytes of a file of the step's directory, or raises FileNotFoundError; what
            else it raises is passed on.
    """
    damaged = []
    for name, data in index_files(manifest).items():
        try:
            good = read(name) == data
        except FileNotFoundError:
            good = False
        if not good:
            damaged.append(name)
    return damaged
