"""A step that somebody reads is not retired."""

import os
from pathlib import Path

import pytest

from everstep.checkpoint.leases import LEASE_S, free_to_delete, held_for_reading
from everstep.checkpoint.store import Store
from everstep.checkpoint.store_local import LocalStore
from everstep.checkpoint.store_memory import MemoryStore

STEP = ("step", "step/manifest.json")


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    made: Store = LocalStore(tmp_path) if request.param == "local" else MemoryStore()
    made.put(STEP[1], b"{}")
    return made


def _free(store: Store, now_s: float | None = None) -> bool:
    with free_to_delete(store, *STEP, now_s=now_s) as free:
        return free


def test_it_is_free_when_nobody_reads(store: Store) -> None:
    assert _free(store)
    with held_for_reading(store, *STEP), held_for_reading(store, *STEP):
        assert not _free(store)
    assert _free(store)
    assert store.list("step") == ["manifest.json"]


def test_what_a_dead_reader_left_counts_for_a_while() -> None:
    store = MemoryStore()
    held = held_for_reading(store, *STEP, now_s=1000.0)
    held.__enter__()
    assert not _free(store, 1000.0 + LEASE_S)
    assert _free(store, 1001.0 + LEASE_S)
    store.put("step/leases/odd.json", b"no lease")
    assert _free(store, 1001.0 + LEASE_S)


def test_a_reader_that_may_not_write_reads_all_the_same(store: Store) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise PermissionError

    if isinstance(store, MemoryStore):
        store.put = refuse  # type: ignore[method-assign]
    with held_for_reading(store, *STEP):
        pass


def test_a_step_that_is_being_deleted_is_not_held(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put(STEP[1], b"{}")
    with free_to_delete(store, *STEP) as free, held_for_reading(store, *STEP):
        assert free
    assert _free(store)
    os.unlink(tmp_path / STEP[1])
    assert _free(store)
