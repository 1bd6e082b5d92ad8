"""Which fragments a pack holds, and where, without its header (pure)."""

from dataclasses import dataclass
from functools import cached_property

from everstep.checkpoint.layout import Fragment
from everstep.checkpoint.pack import PackRecord, pack_order, pack_starts


@dataclass(frozen=True)
class PackIndex:
    """Where fragments lie in a pack, from the fragments alone: no header needs to be read."""

    fragments: tuple[Fragment, ...]
    record: PackRecord

    @cached_property
    def starts(self) -> dict[tuple[str, tuple[int, ...]], tuple[int, Fragment]]:
        """(tensor name, box offset) -> (address as ``Manifest.starts`` gives it, fragment)."""
        ordered, record = pack_order(self.fragments), self.record
        starts = pack_starts(ordered)[0] if record.extents is None else record.blocks.starts
        return {(f.spec.name, f.box.offset): (s, f) for f, s in zip(ordered, starts, strict=True)}
