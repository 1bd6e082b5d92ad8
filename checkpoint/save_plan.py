"""What this rank writes, planned together with the other ranks (no torch)."""

import hashlib
import json
import zlib
from collections.abc import Sequence

from everstep.checkpoint.collective import Collective
from everstep.checkpoint.fragment_codec import SpecPool, fragments_from_json, fragments_to_json
from everstep.checkpoint.layout import Fragment
from everstep.checkpoint.pack import PackPlan, plan_pack
from everstep.checkpoint.reshard import plan_save


class SavePlan:
    """The pack of one rank, planned anew only when the layout of some rank has changed.

    For each save: ``digest`` on every rank, ``update`` with the digests of all, then ``pack``.
    """

    def __init__(self, collective: Collective) -> None:
        self._collective = collective
        self._layout = b""
        self._digests: Sequence[str] = ()
        self._layouts: Sequence[bytes] = ()
        self._pack: PackPlan | None = None

    def digest(self, layout: Sequence[Fragment]) -> str:
        """Takes over the fragments that this rank holds; equal digests mean equal layouts."""
        self._layout = json.dumps(fragments_to_json(layout)).encode()
        return hashlib.blake2b(self._layout, digest_size=16).hexdigest()

    def update(self, digests: Sequence[str]) -> None:
        """Exchanges the layouts if one has changed; every rank calls it with the same digests."""
        if digests != self._digests:
            self._layouts = self._collective.exchange("layouts", zlib.compress(self._layout, 1))
            self._digests, self._pack = digests, None

    def pack(self) -> PackPlan:
        """The pack that this rank is to write.

        Raises:
            LayoutError: ranks disagree about a tensor.
        """
        if self._pack is None:
            known: SpecPool = {}
            layouts = [
                fragments_from_json(json.loads(zlib.decompress(x)), known) for x in self._layouts
            ]
            rank = self._collective.rank
            self._pack = plan_pack(rank, plan_save(layouts)[rank])
        return self._pack
