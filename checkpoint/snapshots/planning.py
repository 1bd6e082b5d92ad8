"""All ranks agree on who copies what of a state that is new, or has changed its layout (torch)."""

import hashlib
import os
from collections.abc import Collection
from dataclasses import dataclass

from everstep.checkpoint.collective import Collective, agree
from everstep.checkpoint.errors import SaveFailedError
from everstep.checkpoint.optimizer_parts import digest_values
from everstep.checkpoint.pack import PackPlan
from everstep.checkpoint.save_plan import SavePlan
from everstep.checkpoint.snapshots.live_state import LiveState
from everstep.checkpoint.snapshots.report import Interval
from everstep.checkpoint.state_capture import Place
from everstep.checkpoint.torch_state import State


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What was agreed on."""

    live: LiveState
    """The state, as this rank holds it."""
    pack: PackPlan
    """What this rank copies of it."""
    tells_optimizer: bool
    """Whether this rank tells of the optimizer's groups: the first of those that say the same."""
    layout: int
    """63 bits that stand for all of it, the same on every rank."""


class Planning:
    """Plans one state after the other; every rank makes the same calls.

    Args:
        collective: the ranks.
        place: of this rank.
        interval: between durable checkpoints, which all ranks have to agree on, too.
        lazy_objects: names of objects whose tensors change only after ``wait_captured``.
    """

    def __init__(
        self,
        collective: Collective,
        place: Place,
        *,
        interval: Interval,
        lazy_objects: Collection[str],
    ) -> None:
        self._collective, self._place = collective, place
        self._interval, self._lazy_objects = interval, lazy_objects
        self._save_plan = SavePlan(collective)
        self.file = f"rank-{collective.rank:05d}-{os.urandom(4).hex()}.safetensors"
        """Name of this rank's packs."""

    def plan(self, step: int, state: State) -> Planned:
        """Look at a state and agree.

        Raises:
            SaveFailedError: some rank cannot save its state; causes by rank.
            LayoutError: ranks disagree about a tensor.
        """
        found: list[LiveState] = []

        def find() -> list[str]:
            live = LiveState(state, self._place, self._lazy_objects)
            found.append(live)
            optimizer = digest_values(live.first.context.get("optimizer"))
            return [self._save_plan.digest(live.fragments), optimizer]

        outcome = agree(self._collective, "captured", find)
        if outcome.causes:
            raise SaveFailedError(step, outcome.causes) from outcome.error
        layouts, optimizers = zip(*outcome.results, strict=True)
        self._save_plan.update(layouts)
        rank = self._collective.rank
        agreed = repr((layouts, self._interval)).encode()
        digest = hashlib.blake2b(agreed, digest_size=8).digest()
        return Planned(
            live=found[0],
            pack=self._save_plan.pack(),
            tells_optimizer=optimizers.index(optimizers[rank]) == rank,
            layout=(int.from_bytes(digest, "little") >> 1) or 1,
        )
