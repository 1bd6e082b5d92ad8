"""Votes are counted as they come, and each is read once."""

import pytest

from everstep.checkpoint.commit import CheckpointDirectory
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.store_memory import MemoryStore
from everstep.checkpoint.tally import Tally

STEP = StepId(1, 3)


def test_votes_are_counted_and_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    store, reads = MemoryStore(), list[str]()
    real = store.read

    def read(key: str, offset: int = 0, length: int | None = None) -> bytes:
        reads.append(key)
        return real(key, offset, length)

    monkeypatch.setattr(store, "read", read)
    directory, tally = CheckpointDirectory(store), Tally(store, STEP, 3)
    tally.look()
    assert (tally.voted, tally.causes, tally.complete) == (frozenset(), {}, False)
    directory.put_vote(STEP, 2, b"a part")
    directory.put_vote(STEP, 3, b"a rank too many")
    store.put("step-00000003-g00001/parts/notes", b"none of ours")
    for _ in range(3):
        tally.look()
    assert (tally.voted, tally.causes) == (frozenset({2}), {})
    assert len(reads) == 1
    directory.put_failure(STEP, 0, "no room")
    tally.look()
    assert (tally.voted, tally.causes, tally.complete) == (frozenset({0, 2}), {0: "no room"}, False)
    directory.put_vote(STEP, 1, b"a part")
    tally.look()
    assert tally.complete
    directory.delete(STEP)
    tally.look()
    assert not tally.voted
