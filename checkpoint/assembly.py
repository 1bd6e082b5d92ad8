"""From the parts of a step to its manifest and index, for step after step of a job (no I/O).

Layouts seldom change: what follows from them alone is kept from one step to the next, as long as
the parts say the same.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from everstep.checkpoint.collector import collector_paused
from everstep.checkpoint.fragment_codec import SpecPool, fragments_from_json
from everstep.checkpoint.layout import Fragment
from everstep.checkpoint.manifest import (
    Lineage,
    Manifest,
    Part,
    StoredTensor,
    Written,
    build_manifest,
    decode_part,
    stored_tensors,
)
from everstep.checkpoint.views.index_files import IndexFiles


class Assembly:
    """Gives the same as ``decode_part``, ``build_manifest`` and ``index_files``, which see."""

    def __init__(self) -> None:
        self._fragments: dict[str, tuple[Fragment, ...]] = {}
        self._written: Written = ()
        self._tensors: Mapping[str, StoredTensor] = {}
        self._index = IndexFiles()

    @collector_paused()
    def parts(self, named: Iterable[tuple[str, bytes]]) -> list[Part]:
        """Decode the parts of all ranks of a step.

        Args:
            named: the path of each, for errors, and its bytes.

        Raises:
            ManifestError: one is damaged.
        """
        pool: SpecPool = {}
        seen: dict[str, tuple[Fragment, ...]] = {}

        def decode(coded: Any) -> tuple[Fragment, ...]:
            text = json.dumps(coded)  # values that only compare equal, as 1 and True, differ in it
            known = self._fragments.get(text)
            seen[text] = fragments_from_json(coded, pool) if known is None else known
            return seen[text]

        parts = [decode_part(data, path, decode) for path, data in named]
        self._fragments = seen
        return parts

    def manifest(self, parts: Sequence[Part], lineage: Lineage | None) -> Manifest:
        """The manifest of a step; raises as ``build_manifest``."""
        return build_manifest(parts, lineage, self._stored)

    def index_files(self, manifest: Manifest) -> Mapping[str, bytes]:
        """The files of its views."""
        return self._index.of(manifest)

    def _stored(self, written: Written) -> Mapping[str, StoredTensor]:
        before = self._written
        if len(before) != len(written) or any(
            a is not b for a, b in zip(before, written, strict=True)
        ):
            self._tensors = stored_tensors(written)
            self._written = written
        return self._tensors
