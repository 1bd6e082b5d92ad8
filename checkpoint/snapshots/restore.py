"""What all ranks of a job can resume from together, in memory or in storage, and opening it."""

import contextlib
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from everstep.checkpoint.collective import Collective, agree, on_rank0
from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.errors import CheckpointError, LoadFailedError
from everstep.checkpoint.keeper.remote_slots import RemoteSlots
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.manifest import Manifest
from everstep.checkpoint.snapshots.memory import Holding, OutlivingMemory
from everstep.checkpoint.snapshots.memory_step import HeldSlot, MemoryStep
from everstep.checkpoint.snapshots.recover import Choice, Held, choose_restore
from everstep.checkpoint.snapshots.slot_format import Seal, decode_seal, encode_seal
from everstep.checkpoint.step_reader import StepReader


class Source(Protocol):
    """A step that is loaded from."""

    @property
    def where(self) -> str:
        """Path or URL, or the memory of keepers."""
        ...

    def manifest(self) -> Manifest:
        """Its manifest; raises ManifestError and its kinds."""
        ...

    def reader(self, manifest: Manifest, threads: int) -> StepReader:
        """Reads its tensors."""
        ...


@dataclass(frozen=True)
class _Stored:
    """A committed checkpoint."""

    directory: CheckpointDirectory
    step_id: StepId

    @property
    def where(self) -> str:
        return self.directory.describe(self.step_id)

    def manifest(self) -> Manifest:
        return self.directory.manifest(self.step_id)

    def reader(self, manifest: Manifest, threads: int) -> StepReader:
        return self.directory.reader(self.step_id, manifest, threads=threads)


@dataclass(frozen=True)
class _InMemory:
    """A snapshot of the keepers."""

    step: MemoryStep
    in_place: bool

    @property
    def where(self) -> str:
        return self.step.where

    def manifest(self) -> Manifest:
        return self.step.manifest

    def reader(self, manifest: Manifest, threads: int) -> StepReader:
        return self.step.reader(threads=threads, in_place=self.in_place)


@dataclass(frozen=True, kw_only=True)
class _Node:
    """What one rank has told of its keeper."""

    name: str
    address: str | None
    token: str
    seals: list[Seal]


class Candidates:
    """What can be resumed from, the best first; a context manager. Every rank makes the same calls.

    Args:
        directory: of the durable checkpoints.
        collective: the ranks.
        memory: of this rank, where it outlives trainers; None on all ranks where there is none.

    Raises:
        StepNotFoundError: the step that was asked for is nowhere.
        CheckpointError: a keeper failed; or another error of rank 0's look at the directory.
    """

    def __init__(
        self,
        directory: CheckpointDirectory,
        collective: Collective,
        memory: OutlivingMemory | None,
        step: int | None,
    ) -> None:
        self._directory, self._collective, self._memory = directory, collective, memory
        self._holdings: Sequence[Holding] = ()
        self._nodes: list[_Node] = []
        self._remote: dict[str, RemoteSlots] = {}
        if memory is not None:
            self._gather(memory)
        held = [Held(seal, node.name) for node in self._nodes for seal in node.seals]

        def find() -> tuple[list[Any], list[int]]:
            committed = directory.committed()
            stored = directory.lineage(committed)
            generations = directory.generations()
            choices = choose_restore(held, committed, generations, step=step)
            if not choices and step is not None:
                directory.find(step, stored)
            coded = [[c.step_id, c.tier, c.why, c.places] for c in choices]
            return coded, [s.step for s in stored]

        coded, self.durable_steps = on_rank0(collective, "find", find)
        self.choices = [
            Choice(step_id=StepId(*step_id), tier=tier, why=why, places=tuple(places))
            for step_id, tier, why, places in coded
        ]

    def _gather(self, memory: OutlivingMemory) -> None:
        def look() -> dict[str, Any]:
            self._holdings = memory.holdings()
            return {
                "name": memory.name,
                "address": memory.address(),
                "token": memory.token().hex(),
                "seals": [encode_seal(holding.seal).hex() for holding in self._holdings],
            }

        found = agree(self._collective, "holdings", look)
        if found.causes:
            raise LoadFailedError(0, found.causes) from found.error
        for told in found.results:
            seals = [decode_seal(bytes.fromhex(seal), 2**63) for seal in told["seals"]]
            self._nodes.append(
                _Node(
                    name=told["name"],
                    address=told["address"],
                    token=told["token"],
                    seals=[seal for seal in seals if seal is not None],
                )
            )

    def open(self, choice: Choice) -> AbstractContextManager[Source]:
        """What a choice is loaded from; every rank opens it, in the same order.

        Raises:
            LoadFailedError: some rank cannot read what it would need.
        """
        return self._stored(choice) if choice.tier == "durable" else self._in_memory(choice)

    def close(self) -> None:
        """Let go of the slots of keepers; may be called twice."""
        for holding in self._holdings:
            holding.release()
        self._holdings = ()
        for remote in self._remote.values():
            remote.close()
        self._remote = {}

    @contextlib.contextmanager
    def _stored(self, choice: Choice) -> Iterator[Source]:
        with contextlib.ExitStack() as stack:
            if self._collective.rank == 0:
                stack.enter_context(self._directory.held(choice.step_id))
            yield _Stored(self._directory, choice.step_id)

    @contextlib.contextmanager
    def _in_memory(self, choice: Choice) -> Iterator[Source]:
        mine = self._nodes[self._collective.rank].name
        here = {h.seal.rank: h for h in self._holdings if h.seal.step_id == choice.step_id}
        speakers: dict[str, int] = {}
        for rank, node in enumerate(self._nodes):
            speakers.setdefault(node.name, rank)
        told = [
            [rank, here[rank].part.decode()]
            for rank, place in enumerate(choice.places)
            if place == mine and speakers[mine] == self._collective.rank
        ]
        replies = self._collective.exchange("parts", zlib.compress(json.dumps(told).encode(), 1))
        parts: dict[int, bytes] = {}
        for reply in replies:
            for rank, part in json.loads(zlib.decompress(reply)):
                parts[rank] = part.encode()
        opened: list[MemoryStep] = []

        def build() -> bool:
            slots = [self._slot(choice, r, here, parts, speakers) for r in range(len(parts))]
            opened.append(MemoryStep(slots))
            return opened[0].is_here

        outcome = agree(self._collective, "opened", build)
        if outcome.causes:
            raise LoadFailedError(choice.step_id.step, outcome.causes) from outcome.error
        yield _InMemory(opened[0], all(outcome.results))

    def _slot(
        self,
        choice: Choice,
        rank: int,
        here: dict[int, Holding],
        parts: dict[int, bytes],
        speakers: dict[str, int],
    ) -> HeldSlot:
        place = choice.places[rank]
        if place == self._nodes[self._collective.rank].name:
            return HeldSlot(seal=here[rank].seal, part=here[rank].part, memory=here[rank].memory)
        node = self._nodes[speakers[place]]
        seal = next(s for s in node.seals if (s.step_id, s.rank) == (choice.step_id, rank))
        if node.address is None:
            raise CheckpointError(
                f"step {choice.step_id.step} of rank {rank} is in the memory of {place}, whose "
                "keeper has no data plane: start keepers with --interface NAME, so that other "
                "nodes can read from them"
            )
        if place not in self._remote:
            self._remote[place] = RemoteSlots(node.address, bytes.fromhex(node.token))
        return HeldSlot(seal=seal, part=parts[rank], memory=self._remote[place])

    def __enter__(self) -> "Candidates":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
