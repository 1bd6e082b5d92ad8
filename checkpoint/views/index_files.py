"""The files of views that every checkpoint carries beside its manifest.

They are derived: a function of the manifest, written before it, and of no use to our own readers.
"""

from collections.abc import Mapping
from dataclasses import replace

from everstep.checkpoint.manifest import Manifest, StoredTensor
from everstep.checkpoint.pack import PackRecord
from everstep.checkpoint.views.ocdbt import OcdbtView


def index_files(manifest: Manifest) -> Mapping[str, bytes]:
    """The files to write into the directory of a step, by name; always the same for a manifest."""
    return IndexFiles().of(manifest)


class IndexFiles:
    """Makes them for step after step; what follows from the layout is computed when it changes."""

    def __init__(self) -> None:
        self._view: OcdbtView | None = None
        self._tensors: Mapping[str, StoredTensor] = {}
        self._packs: tuple[PackRecord, ...] = ()

    def of(self, manifest: Manifest) -> Mapping[str, bytes]:
        """See ``index_files``; fast where ``manifest.tensors`` is the object of the last call."""
        packs = tuple(replace(pack, crc32c=0) for pack in manifest.packs)
        if self._view is None or self._tensors is not manifest.tensors or self._packs != packs:
            self._view = OcdbtView(manifest)
            self._tensors, self._packs = manifest.tensors, packs
        return self._view.files(manifest.step, manifest.generation)
