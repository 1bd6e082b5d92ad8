"""The files of views that every checkpoint carries beside its manifest.

They are derived: a function of the manifest, written before it, and of no use to our own readers.
"""

from collections.abc import Mapping

from everstep.checkpoint.manifest import Manifest
from everstep.checkpoint.views.ocdbt import ocdbt_files


def index_files(manifest: Manifest) -> Mapping[str, bytes]:
    """The files to write into the directory of a step, by name; always the same for a manifest."""
    return ocdbt_files(manifest)
