"""Ranks load from an object store together: each byte is read once, and trouble is everyone's."""

import threading
import tracemalloc
from typing import Any

import pytest
import torch
from torch import nn

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.errors import BlockChecksumError, LoadFailedError, StateMismatchError
from everstep.checkpoint.store_memory import MemoryStore
from everstep.checkpoint.torch_state import State
from tests.support.checkpoints import ThreadCollective, ThreadPeers, bits, run_threads


class _Store(MemoryStore):
    """Counts the bytes of packs that are read; some of them cannot be."""

    def __init__(self) -> None:
        super().__init__()
        self.read_bytes = 0
        self.broken = ""
        self._guard = threading.Lock()

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        if "rank-" in key:
            if self.broken and self.broken in key and offset > 2**20:
                raise OSError(5, "Input/output error", key)
            with self._guard:
                self.read_bytes += length or 0
        return super().read(key, offset, length)


def _state(value: float) -> State:
    model = nn.ParameterList([torch.full((700, 1000), value + n) for n in range(6)])
    return State(model=model)


@pytest.fixture
def store() -> _Store:
    """A step of two packs of 8 MiB, whose tensors all ranks hold."""
    made = _Store()

    def save(c: ThreadCollective) -> None:
        with Checkpointer(made, collective=c) as checkpointer:
            checkpointer.save(1, _state(1.0))

    assert run_threads(save, 2) == [None] * 2
    return made


def _packs(store: MemoryStore) -> list[str]:
    step = "step-00000001-g00001"
    return [f"{step}/{name}" for name in store.list(step) if name.startswith("rank-")]


def _load(store: MemoryStore, value: float = 0.0) -> Any:
    def load(c: ThreadPeers) -> Any:
        state, seen = _state(value), list[int]()
        with Checkpointer(store, collective=c, read_only=True) as checkpointer:
            checkpointer.load(state, on_bytes=seen.append)
        return bits(state), seen[-1], c.sent_bytes

    return load


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_byte_is_read_once_and_all_have_it(store: _Store, world_size: int) -> None:
    results = run_threads(_load(store), world_size, kind=ThreadPeers)
    for found, seen, _ in results:
        assert found == bits(_state(1.0))
        assert seen >= 6 * 700 * 1000 * 4
    generators = 3 * 2**20  # another mesh: the generators' blocks are not needed
    sizes = sum(store.size(pack) or 0 for pack in _packs(store))
    assert sizes - generators <= store.read_bytes <= sizes
    sent = [sent for _, _, sent in results]
    assert sum(sent) >= (world_size - 1) * 6 * 700 * 1000 * 4
    assert max(sent) - min(sent) <= 8 * 2**20


def test_ranks_that_cannot_send_read_for_themselves(store: _Store) -> None:
    def load(c: ThreadCollective) -> Any:
        state = _state(0.0)
        with Checkpointer(store, collective=c, read_only=True) as checkpointer:
            checkpointer.load(state)
        return bits(state)

    assert run_threads(load, 2) == [bits(_state(1.0))] * 2
    assert store.read_bytes > 2 * 6 * 700 * 1000 * 4


@pytest.mark.parametrize("pack", [0, 1])
def test_what_one_rank_cannot_read_fails_all(store: _Store, pack: int) -> None:
    store.broken = _packs(store)[pack]
    errors = run_threads(_load(store), 3, timeout_s=10, kind=ThreadPeers)
    assert [type(e) for e in errors] == [LoadFailedError] * 3
    assert errors[0].causes == errors[1].causes
    assert any("Input/output error" in cause for cause in errors[0].causes.values())


def test_damage_is_found_by_all_that_need_it(store: _Store) -> None:
    key = _packs(store)[1]
    data = bytearray(store.read(key))
    data[-(2**21)] ^= 1
    store.delete(key)
    store.put(key, bytes(data))
    errors = run_threads(_load(store), 3, timeout_s=10, kind=ThreadPeers)
    assert [type(e) for e in errors] == [LoadFailedError] * 3
    assert all(isinstance(e.__cause__, BlockChecksumError) for e in errors)
    assert set(errors[0].causes) == {0, 1, 2}


def test_a_state_that_does_not_fit_fails_before_anything_is_read(store: _Store) -> None:
    def load(c: ThreadPeers) -> None:
        model = nn.ParameterList([torch.zeros(700, 1000 + (c.rank == 1)) for _ in range(6)])
        with Checkpointer(store, collective=c, read_only=True) as checkpointer:
            checkpointer.load(State(model=model))

    errors = run_threads(load, 2, timeout_s=10, kind=ThreadPeers)
    assert [type(e) for e in errors] == [LoadFailedError] * 2
    assert set(errors[0].causes) == {1}
    assert isinstance(errors[1].__cause__, StateMismatchError)
    assert store.read_bytes == 0


@pytest.mark.parametrize("world_size", [1, 2])
def test_little_memory_is_needed_beside_the_tensors(world_size: int) -> None:
    """Everything that Python and NumPy allocate while ranks load 120 MiB that all of them need."""
    store = MemoryStore()
    shape = (30, 2**20)
    with Checkpointer(store) as checkpointer:
        checkpointer.save(1, State(model=nn.ParameterList([torch.ones(shape)])))
    ready = threading.Barrier(world_size)

    def load(c: ThreadPeers) -> None:
        state = State(model=nn.ParameterList([torch.zeros(shape)]))
        with Checkpointer(store, collective=c, read_only=True) as checkpointer:
            if ready.wait() == 0:
                tracemalloc.start()
            checkpointer.load(state)
        assert bool((next(state.model.parameters()) == 1).all())

    try:
        assert run_threads(load, world_size, kind=ThreadPeers) == [None] * world_size
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes <= world_size * 64 * 2**20
