"""What to resume from: the newest step that is whole, in memory or in storage (pure).

A snapshot in memory is whole if every rank of one generation and world size has sealed the same
step. Identity is that of checkpoints, generation and step, and the digest of the generation's
owner: two runs that use the same numbers are told apart. Steps and lineages are never mixed.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from everstep.checkpoint.lineage import Generation, StepId, in_lineage
from everstep.checkpoint.snapshots.slot_format import Seal, owner_digest


@dataclass(frozen=True)
class Held:
    """A sealed slot that somebody has found."""

    seal: Seal
    place: str
    """Who holds it: the address of a keeper, or whatever its finder understands."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A step that can be resumed from."""

    step_id: StepId
    tier: Literal["memory", "durable"]
    why: str
    """One sentence for people: what it is, and what newer ones were passed over for which cause."""
    places: tuple[str, ...] = ()
    """In memory: for each rank that captured it, who holds it."""


def choose_restore(
    held: Iterable[Held],
    durable: Collection[StepId],
    generations: Mapping[int, Generation],
    *,
    step: int | None = None,
) -> list[Choice]:
    """What can be resumed from, best first: the newest step, from memory rather than from storage.

    Args:
        held: all sealed slots, nearest first: of equal ones the first counts.
        durable: all committed checkpoints.
        generations: all of them, by number.
        step: the only step that will do; None for any.

    Empty where there is nothing; ``passed_over`` says why.
    """
    snapshots = [s for s in _snapshots(held) if step in (None, s.id.step)]
    whole = {s.id: s for s in snapshots if s.is_of(generations) and not s.missing}
    stored = {step_id for step_id in durable if step in (None, step_id.step)}
    left_out = _passed_over(snapshots, generations)
    choices = []
    for step_id in reversed(in_lineage(generations, whole.keys() | stored)):
        newer = [text for other, text in left_out if other.step > step_id.step]
        behind = f" (not used: {'; '.join(newer)})" if newer else ""
        if step_id in whole:
            why = f"step {step_id.step} is in memory on {_all_ranks(whole[step_id].world_size)}"
            choices.append(
                Choice(
                    step_id=step_id,
                    tier="memory",
                    why=f"{why}{behind}",
                    places=whole[step_id].places(),
                )
            )
        if step_id in stored:
            why = f"step {step_id.step} is the newest durable checkpoint"
            if any(c.tier == "durable" for c in choices):
                why = f"step {step_id.step} is an older durable checkpoint"
            choices.append(Choice(step_id=step_id, tier="durable", why=f"{why}{behind}"))
    return choices


def passed_over(held: Iterable[Held], generations: Mapping[int, Generation]) -> list[str]:
    """Why snapshots in memory cannot be resumed from; a clause for each, the newest step first."""
    return [text for _, text in _passed_over(_snapshots(held), generations)]


class _Key(NamedTuple):
    step_id: StepId
    owner: bytes
    world_size: int


@dataclass(frozen=True)
class _Snapshot:
    """What is held of one snapshot."""

    id: StepId
    owner: bytes
    world_size: int
    place_of: dict[int, str]

    @property
    def missing(self) -> list[int]:
        """Ranks whose slot nobody holds."""
        return [rank for rank in range(self.world_size) if rank not in self.place_of]

    def places(self) -> tuple[str, ...]:
        """Who holds it, by rank; of a whole one."""
        return tuple(self.place_of[rank] for rank in range(self.world_size))

    def is_of(self, generations: Mapping[int, Generation]) -> bool:
        """Whether one of these generations made it, and not another run's of the same number."""
        generation = generations.get(self.id.generation)
        return generation is not None and owner_digest(generation.owner) == self.owner


def _snapshots(held: Iterable[Held]) -> list[_Snapshot]:
    """What is held, by snapshot; the newest step first."""
    found: dict[_Key, dict[int, str]] = {}
    for slot in held:
        seal = slot.seal
        key = _Key(seal.step_id, seal.owner, seal.world_size)
        found.setdefault(key, {}).setdefault(seal.rank, slot.place)
    newest_first = sorted(found, key=lambda key: (-key.step_id.step, -key.step_id.generation, key))
    return [_Snapshot(key.step_id, key.owner, key.world_size, found[key]) for key in newest_first]


def _passed_over(
    snapshots: Iterable[_Snapshot], generations: Mapping[int, Generation]
) -> list[tuple[StepId, str]]:
    """Snapshots that cannot be resumed from, and why."""
    found = []
    for snapshot in snapshots:
        step = snapshot.id.step
        if not snapshot.is_of(generations):
            found.append((snapshot.id, f"step {step} in memory belongs to another run"))
        elif not in_lineage(generations, [snapshot.id]):
            number = snapshot.id.generation
            found.append(
                (snapshot.id, f"step {step} of generation {number} is not of this lineage")
            )
        elif snapshot.missing:
            total = snapshot.world_size
            found.append(
                (
                    snapshot.id,
                    f"step {step} is in memory on {total - len(snapshot.missing)} of {total} ranks "
                    f"only, that of {_ranks(snapshot.missing)} is gone or was never complete",
                )
            )
    return found


def _all_ranks(world_size: int) -> str:
    return "its only rank" if world_size == 1 else f"all {world_size} ranks"


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
