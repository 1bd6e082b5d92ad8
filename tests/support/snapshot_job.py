"""A job that takes snapshots, as a model: ranks, their memory, storage, and what may befall them.

It does what an engine does with ``slots``, ``tickets`` and ``recover``, one small act at a time, in
whatever order a test likes, and checks the promise. Memory is apart from what ranks think of it,
and outlives them.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from everstep.checkpoint.lineage import Generation, StepId, in_lineage
from everstep.checkpoint.snapshots.recover import Choice, Held, choose_restore
from everstep.checkpoint.snapshots.slot_format import Seal, owner_digest
from everstep.checkpoint.snapshots.slots import (
    NOTHING,
    Slots,
    SlotState,
    adopt,
    capture_needs,
    forget,
    newest_sealed,
    pick,
)
from everstep.checkpoint.snapshots.tickets import (
    Decision,
    Ticket,
    decide,
    encode,
    may_capture,
    ticket_of,
)


class PromiseBroken(AssertionError):
    """Something happened that must never happen."""


@dataclass(frozen=True)
class Rules:
    """What decides; a test of the test breaks one of them."""

    ticket_of: Callable[..., Ticket] = ticket_of
    decide: Callable[..., Decision] = decide
    pick: Callable[[Slots, int], int | None] = pick
    forget: Callable[[Slots, int], Slots] = forget
    must_agree: bool = True
    """Whether different decisions are an error by themselves."""


@dataclass(eq=False)
class Cell:
    """The memory of a slot, as a reader finds it."""

    sealed: StepId | None = None
    flushing: bool = False
    """A keeper reads it, whether trainers live or not."""


@dataclass
class Rank:
    """A trainer process; the cells are its keeper's."""

    number: int
    cells: list[Cell]
    cells_layout: int
    """The layout that the cells are for."""
    old_cells: list[Cell]
    """Those of earlier layouts, readable until a later snapshot is sealed on all ranks."""
    slots: Slots
    done: int
    """The newest step that ``save`` was called for."""
    durable: int
    layout: int | None = None
    """What this process has planned for."""
    posts: int = 0
    """How many tickets it has posted."""
    posted: Ticket | None = None
    """The last of them, until its decision is carried out."""
    waits: bool = False
    """A save that must not be skipped was."""
    captures: list[tuple[int, StepId]] = field(default_factory=list)
    """Under way, oldest first: index of the slot, and what was to be captured."""
    failed: list[int] = field(default_factory=list)
    flushes: dict[StepId, Cell] = field(default_factory=dict)
    """Ordered and not ended."""

    def change(self, index: int, **changes: Any) -> None:
        """Change what is known of a slot."""
        slots = list(self.slots)
        slots[index] = replace(slots[index], **changes)
        self.slots = tuple(slots)

    def all_cells(self) -> list[Cell]:
        """All memory of this rank."""
        return [*self.cells, *self.old_cells]

    def holds(self) -> set[StepId]:
        """What is sealed in the memory of this rank."""
        return {cell.sealed for cell in self.all_cells() if cell.sealed is not None}

    def end_flush(self, cell: Cell) -> None:
        """The keeper reads it no more."""
        if cell.flushing:
            cell.flushing = False
            if cell in self.cells:
                self.change(self.cells.index(cell), pinned=False)


class Job:
    """All of it; every public method is an act, of one rank or of fate."""

    def __init__(
        self, ranks: int, slots: int, *, every: int | None = None, rules: Rules | None = None
    ) -> None:
        self.rules, self.every, self.n_slots = rules or Rules(), every, slots
        self.generations: dict[int, Generation] = {}
        self.durable: set[StepId] = set()
        self.layout = 1
        self.captured: dict[StepId, int] = {}
        """The layout of each snapshot."""
        self.foreign: StepId | None = None
        """What another number of ranks has left in memory of its own."""
        self.floor = NOTHING
        """What a restart must reach: the newest step that all ranks have sealed."""
        self.ranks = [Rank(n, self._new_cells(), self.layout, [], (), 0, 0) for n in range(ranks)]
        self._start(None)

    # --- acts of one rank ---

    def step(self, rank: Rank) -> bool:
        """Post the next ticket, or carry out what was decided; False if that must wait."""
        if rank.posted is None:
            return self._post(rank)
        posted = self.posts[rank.posts]
        if len(posted) < len(self.ranks):
            return False
        reduced = [min(numbers) for numbers in zip(*map(encode, posted), strict=True)]
        decision = self.rules.decide(reduced, rank.posted, durable_every=self.every)
        if self.rules.must_agree and self.decisions.setdefault(rank.posts, decision) != decision:
            raise PromiseBroken(f"{decision} here, {self.decisions[rank.posts]} elsewhere")
        return self._carry_out(rank, rank.posted, decision)

    def end_capture(self, rank: Rank, *, fails: bool = False) -> bool:
        """Seal the oldest capture, or fail to; False if there is none."""
        if not rank.captures:
            return False
        index, step_id = rank.captures.pop(0)
        cell = rank.cells[index]
        if rank.slots[index].step_id is None or fails:  # void meanwhile, or now
            rank.change(index, pinned=False)
            if rank.flushes.pop(step_id, None):
                self.failed_flushes.add(step_id)
            if fails and rank.slots[index].step_id is not None:
                rank.failed.append(step_id.step)
        else:
            cell.sealed, cell.flushing = step_id, step_id in rank.flushes
            rank.change(index, sealed=True, pinned=cell.flushing)
        return True

    def flush(self, rank: Rank) -> bool:
        """Write the oldest snapshot that is to be durable, or see what became of it."""
        for step_id, cell in sorted(rank.flushes.items(), key=lambda item: item[0]):
            if step_id in self.failed_flushes or step_id in self.durable:
                if step_id in self.failed_flushes and cell.sealed != step_id:
                    continue  # its capture has not ended
                rank.end_flush(cell)
                del rank.flushes[step_id]
                if step_id in self.durable:
                    rank.durable = max(rank.durable, step_id.step)
                return True
            written = self.written.setdefault(step_id, set())
            if cell.flushing and rank.number not in written:
                if cell.sealed != step_id:
                    raise PromiseBroken(f"{cell} is flushed as {step_id}")
                written.add(rank.number)
                if len(written) == len(self.ranks):
                    self.durable.add(step_id)
                return True
        return False

    # --- acts of fate ---

    def fail_flush(self) -> None:
        """Storage fails: what is being flushed comes to nothing."""
        self.failed_flushes |= {s for r in self.ranks for s in r.flushes} - self.durable

    def want_durable(self) -> None:
        """The next step that nobody has saved is one that must not be skipped."""
        self.wishes.add(max(rank.done for rank in self.ranks) + 1)

    def change_layout(self, rank: Rank) -> None:
        """The state of a rank is no longer what it was planned for."""
        self.layout += 1
        rank.layout = None

    def end_orphans(self) -> None:
        """Keepers have finished what an earlier attempt ordered."""
        for rank in self.ranks:
            for cell in rank.all_cells():
                if cell not in rank.flushes.values():
                    rank.end_flush(cell)

    def die(self, flushes: str, *, step: int | None = None) -> None:
        """Some trainers die, the others are ended; all start again from memory or storage.

        Args:
            flushes: what was ordered is "done" before they are back, "lost", or "running" still.
            step: one that the user asks for, if it can be had.
        """
        last = max(rank.done for rank in self.ranks)
        if flushes == "done":
            ordered = {step_id for rank in self.ranks for step_id in rank.flushes}
            self.durable |= ordered & self._common()
        for rank in self.ranks:
            for cell in rank.all_cells():
                cell.flushing = cell.flushing and flushes == "running"
        choices = choose_restore(self._held(), self.durable, self.generations)
        reached = choices[0].step_id.step if choices else 0
        if reached < self.floor:
            raise PromiseBroken(f"all had sealed step {self.floor}, but {reached} is the newest")
        if not self.skipped and reached < last - 1:
            raise PromiseBroken(f"nothing was skipped, but of {last} steps {reached} are left")
        if step is not None:
            asked = choose_restore(self._held(), self.durable, self.generations, step=step)
            if asked:
                self.floor = min(self.floor, step)
                choices = asked
        self._start(choices[0] if choices else None)

    def detour(self, steps: int, freed: Collection[int]) -> None:
        """All die; one rank alone goes on from there, and dies, too; all start again from what it
        has left in memory of its own.

        Args:
            steps: that it makes.
            freed: numbers of ranks whose memory it has freed.
        """
        self.die("lost")
        begin = self.restored.step if self.restored else 0
        step_id = StepId(self._begin_generation(), begin + steps)
        self.foreign = step_id
        for rank in self.ranks:
            if rank.number in freed:
                rank.cells, rank.old_cells = self._new_cells(), []
        choices = choose_restore(self._held(), self.durable, self.generations)
        if choices[0].step_id != step_id:
            raise PromiseBroken(f"{choices[0]} is newer than what was sealed last, {step_id}")
        self._start(choices[0])

    def lose_node(self, rank: Rank) -> None:
        """A rank dies with its memory: the others' is worth nothing without it."""
        rank.cells, rank.old_cells = self._new_cells(), []
        self.floor, self.skipped = NOTHING, True
        self.die("lost")
        self.floor = self.restored.step if self.restored else NOTHING

    # --- what must hold ---

    def check(self) -> None:
        """There is always a snapshot that all ranks have sealed, and never an older one.

        Before the first one after a restart from storage, or from the memory of other ranks, that
        which was read there stands for it.
        """
        elsewhere = not self.in_memory or self.restored == self.foreign
        stored = self.restored.step if self.restored and elsewhere else NOTHING
        common = max(stored, *(s.step for s in self._lineage(self._common())), NOTHING)
        if common < self.floor:
            raise PromiseBroken(f"all had sealed step {self.floor}, now it is {common}")
        self.floor = common
        for rank in self.ranks:
            for slot, cell in zip(rank.slots, rank.cells, strict=True):
                if slot.sealed and slot.step_id != cell.sealed:
                    raise PromiseBroken(f"{slot} is taken for {cell}")
                if cell.flushing and not slot.pinned:
                    raise PromiseBroken(f"{cell} is flushed, but {slot} is not pinned")

    def settle(self) -> None:
        """Where nothing goes wrong any more, steps are captured again."""
        self.end_orphans()
        target = max(rank.done for rank in self.ranks) + 6
        for _ in range(50):
            for rank in self.ranks:
                while self.end_capture(rank):
                    pass
            while sum(self.flush(rank) for rank in self.ranks):
                pass
            behind = [rank for rank in self.ranks if rank.done < target]
            if not behind:
                break
            for rank in behind:
                self.step(rank)
            self.check()
        if self.generation is None or StepId(self.generation, target) not in self.captured:
            raise PromiseBroken(f"steps are skipped for ever: {[r.slots for r in self.ranks]}")

    # --- how it is done ---

    def _start(self, choice: Choice | None) -> None:
        """All trainers begin, from a choice or from nothing."""
        self.restored = choice.step_id if choice else None
        self.in_memory = choice is not None and choice.tier == "memory"
        self.generation: int | None = None
        self.skipped = False
        self.posts: dict[int, list[Ticket]] = {}
        self.decisions: dict[int, Decision] = {}
        self.wishes: set[int] = set()
        self.written: dict[StepId, set[int]] = {}
        self.failed_flushes: set[StepId] = set()
        step = self.restored.step if self.restored else 0
        for i, rank in enumerate(self.ranks):
            slots = tuple(
                SlotState(cell.sealed, cell.sealed is not None, cell.flushing)
                for cell in rank.cells
            )
            self.ranks[i] = Rank(
                rank.number,
                rank.cells,
                rank.cells_layout,
                rank.old_cells,
                adopt(slots, self.restored if self.in_memory else None),
                done=step,
                durable=step,
            )

    def _post(self, rank: Rank) -> bool:
        in_the_way = not may_capture(capture_needs(rank.slots), newest_sealed(rank.slots))
        if rank.waits and in_the_way and not rank.failed:
            return False
        if self.generation is None:
            self.generation = self._begin_generation()
        ticket = self.rules.ticket_of(
            rank.slots, generation=self.generation, step=rank.done + 1, layout=rank.layout
        )
        rank.posted = replace(
            ticket,
            failed=min(rank.failed, default=None),
            durable=rank.durable,
            flush_idle=not rank.flushes,
        )
        rank.posts += 1
        self.posts.setdefault(rank.posts, []).append(rank.posted)
        return True

    def _begin_generation(self) -> int:
        number = max(self.generations, default=0) + 1
        self.generations[number] = Generation(
            number=number,
            parent=self.restored.generation if self.restored else None,
            fork_step=self.restored.step if self.restored else None,
            created_s=0.0,
            mesh={},
            owner=f"attempt {number}",
        )
        return number

    def _carry_out(self, rank: Rank, mine: Ticket, decision: Decision) -> bool:
        if decision.action == "out_of_step":
            raise PromiseBroken(decision.reason)
        if decision.action == "replan":
            if rank.captures:
                return False
            self._replan(rank)
        elif decision.action == "skip":
            if decision.void is not None:
                self.skipped = True  # the step that failed was
                rank.slots = self.rules.forget(rank.slots, decision.void)
                rank.failed = [step for step in rank.failed if step != decision.void]
            rank.waits = mine.step in self.wishes
            if not rank.waits:
                self.skipped, rank.done = True, mine.step
        else:
            self._capture(rank, mine, decision)
        rank.posted = None
        return True

    def _capture(self, rank: Rank, mine: Ticket, decision: Decision) -> None:
        index = self.rules.pick(rank.slots, decision.all_sealed)
        if index is None:
            raise PromiseBroken(f"{rank.slots} has no slot, although {decision}")
        cell, step_id = rank.cells[index], StepId(mine.generation, mine.step)
        if cell.flushing:
            raise PromiseBroken(f"{cell} is overwritten while it is being flushed")
        if self.captured.setdefault(step_id, rank.cells_layout) != rank.cells_layout:
            raise PromiseBroken(f"{step_id} is captured with two layouts")
        if rank.old_cells and not any(old.flushing for old in rank.old_cells):
            newest = max(old.sealed.step if old.sealed else NOTHING for old in rank.old_cells)
            if newest < decision.all_sealed:
                rank.old_cells = []
        cell.sealed = None
        rank.change(index, step_id=step_id, sealed=False, pinned=True)
        rank.captures.append((index, step_id))
        rank.done, rank.waits = mine.step, False
        if decision.flush or mine.step in self.wishes:
            rank.flushes[step_id] = cell

    def _replan(self, rank: Rank) -> None:
        rank.layout = self.layout
        if rank.cells_layout != self.layout:
            rank.cells_layout, rank.old_cells = self.layout, rank.all_cells()
            rank.cells = self._new_cells()
            rank.slots = tuple(SlotState() for _ in rank.cells)

    def _new_cells(self) -> list[Cell]:
        return [Cell() for _ in range(self.n_slots)]

    def _common(self) -> set[StepId]:
        """What all ranks hold, of this attempt or what it goes on from."""
        held = set.intersection(*(rank.holds() for rank in self.ranks))
        begun_from = self.restored.step if self.restored else NOTHING
        return {s for s in held if s.generation == self.generation or s.step <= begun_from}

    def _lineage(self, steps: Iterable[StepId]) -> list[StepId]:
        tip = self.generation or (self.restored.generation if self.restored else None)
        return in_lineage(self.generations, steps, tip)

    def _held(self) -> list[Held]:
        found = [
            self._held_by(rank.number, len(self.ranks), step_id)
            for rank in self.ranks
            for step_id in sorted(rank.holds())
        ]
        return found if self.foreign is None else [*found, self._held_by(0, 1, self.foreign)]

    def _held_by(self, rank: int, world_size: int, step_id: StepId) -> Held:
        seal = Seal(
            step_id=step_id,
            rank=rank,
            world_size=world_size,
            owner=owner_digest(self.generations[step_id.generation].owner),
            part_start=0,
            part_bytes=0,
            pack_start=0,
            pack_bytes=0,
            part_crc32c=0,
        )
        return Held(seal, f"keeper {rank}")
