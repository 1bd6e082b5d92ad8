"""Ranks as threads, and small states to save."""

import errno
import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from everstep.checkpoint.checkpointer import Checkpointer
from everstep.checkpoint.direct_io import ByteArray
from everstep.checkpoint.errors import CollectiveError
from everstep.checkpoint.torch_state import State


class _Meeting:
    """Where threads leave what they exchange; knows who has gone home."""

    def __init__(self, world_size: int, timeout_s: float) -> None:
        self.world_size, self.timeout_s = world_size, timeout_s
        self.changed = threading.Condition()
        self.posts: dict[tuple[int, int], tuple[str, bytes]] = {}
        self.gone: set[int] = set()
        self.pipes: dict[tuple[int, int], queue.Queue[ByteArray]] = {
            (a, b): queue.Queue() for a in range(world_size) for b in range(world_size)
        }

    def leave(self, rank: int) -> None:
        with self.changed:
            self.gone.add(rank)
            self.changed.notify_all()

    def exchange(self, rank: int, number: int, tag: str, payload: bytes) -> list[bytes]:
        places = [(number, r) for r in range(self.world_size)]

        def settled() -> bool:
            return all(place in self.posts or place[1] in self.gone for place in places)

        with self.changed:
            self.posts[number, rank] = (tag, payload)
            self.changed.notify_all()
            arrived = self.changed.wait_for(settled, self.timeout_s)
            posts = [self.posts.get(place) for place in places]
        if not arrived or any(post is None or post[0] != tag for post in posts):
            raise CollectiveError(f"rank {rank} was left alone at {tag!r}")
        return [post[1] for post in posts if post is not None]


class ThreadCollective:
    """One rank of several that are threads of this process; remembers its exchanges."""

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        self.rank, self.world_size, self._meeting = rank, meeting.world_size, meeting
        self.tags: list[str] = []

    def exchange(self, tag: str, payload: bytes) -> list[bytes]:
        self.tags.append(tag)
        return self._meeting.exchange(self.rank, len(self.tags), tag, payload)


class ThreadPeers(ThreadCollective):
    """One that can also send bytes; counts those that it has sent."""

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        super().__init__(rank, meeting)
        self.sent_bytes = 0

    def swap(
        self, sends: Sequence[tuple[int, ByteArray]], receives: Sequence[tuple[int, ByteArray]]
    ) -> None:
        for rank, data in sends:
            self.sent_bytes += len(data)
            self._meeting.pipes[self.rank, rank].put(data.copy())
        for rank, target in receives:
            try:
                data = self._meeting.pipes[rank, self.rank].get(timeout=self._meeting.timeout_s)
            except queue.Empty:
                raise CollectiveError(f"rank {rank} sent nothing") from None
            assert len(data) == len(target)
            target[:] = data


C = TypeVar("C", bound=ThreadCollective)


def run_threads(
    fn: Callable[[C], Any],
    world_size: int,
    timeout_s: float = 20.0,
    kind: type[C] = ThreadCollective,  # type: ignore[assignment]
) -> list[Any]:
    """Call ``fn`` once per rank; for each rank its result, or the exception it raised."""
    meeting = _Meeting(world_size, timeout_s)

    def run(rank: int) -> Any:
        try:
            return fn(kind(rank, meeting))
        except Exception as error:
            return error
        finally:
            meeting.leave(rank)

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))


class Counter:
    """The smallest stateful object."""

    def __init__(self, value: Any = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.value = state_dict["value"]


def tiny_state(seed: int = 0, **objects: Any) -> State:
    """A model with parameters and buffers, and an AdamW that has made one step."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    state = State(model=model, optimizer=optimizer, **objects)
    train_step(state)
    return state


def fresh_state(**objects: Any) -> State:
    """What ``tiny_state`` is before its first step, with other values: to be loaded into."""
    torch.manual_seed(99)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    return State(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), fused=True), **objects
    )


def train_step(state: State) -> None:
    """One update on random input: needs every generator and every tensor of the state."""
    assert state.optimizer is not None
    state.model(torch.randn(4, 3)).square().sum().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()


def bits(state: State) -> dict[str, bytes]:
    """Every tensor of model and optimizer, as bytes."""
    tensors: dict[str, torch.Tensor] = {
        f"model.{k}": v for k, v in state.model.state_dict().items()
    }
    if state.optimizer is not None:
        for index, values in state.optimizer.state_dict()["state"].items():
            tensors |= {f"{index}.{k}": v for k, v in values.items() if torch.is_tensor(v)}
    return {k: v.detach().cpu().numpy().tobytes() for k, v in tensors.items()}


def packs(root: Path) -> list[Path]:
    """All packs below a directory."""
    return sorted(root.glob("step-*/rank-*.safetensors"))


def step_names(root: Path) -> list[str]:
    """Names of the folders of steps, committed or not."""
    return sorted(p.name for p in root.iterdir() if p.name.startswith("step-"))


def no_space(*args: Any, **kwargs: Any) -> Any:
    """Any system call on a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Holder(nn.Module):
    """Any tensors as buffers."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def save_and_load(tmp_path: Path, saved: State, loaded: State) -> Checkpointer:
    """Save one state as step 4 and load it into another."""
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.load(saved)
        checkpointer.save(4, saved)
        assert checkpointer.load(loaded) == 5
    return checkpointer
