"""What clients may ask of a keeper: each request is a function of the house and its client."""

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from everstep.checkpoint.errors import EverstepError, KeeperError
from everstep.checkpoint.json_checks import mapping, natural, text
from everstep.checkpoint.keeper import segments
from everstep.checkpoint.keeper.carried import encode_error
from everstep.checkpoint.keeper.flushes import Outcome
from everstep.checkpoint.keeper.house import House
from everstep.checkpoint.keeper.slots import SetShape, Slot, SlotSet
from everstep.checkpoint.keeper.wire import Channel, Frame, WireError, close_all
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.snapshots.memory import FlushOrder


@dataclass(eq=False, kw_only=True)
class Client:
    """A process that is connected."""

    channel: Channel
    pid: int
    """0 where it cannot be seen from here."""
    pidfd: int | None = None
    """Readable when the process has ended."""
    rank: int | None = None
    """None: it only looks."""
    world_size: int = 0
    finished: bool = False
    """It has said that nothing of it is needed any more."""
    pins: dict[int, Slot] = field(default_factory=dict)
    """Slots that it reads, by a number that it knows."""
    closed: bool = False

    @property
    def is_owner(self) -> bool:
        """True for those for whom the keeper stays."""
        return self.rank is not None or bool(self.pins)


class Answer:
    """How a request is answered, now or later; once."""

    def __init__(self, client: Client, number: int) -> None:
        self._client, self._number = client, number

    def __call__(self, result: dict[str, Any] | None = None, fds: list[int] | None = None) -> None:
        """Send what was asked for."""
        self._send({"id": self._number, "result": result or {}}, fds or [])

    def fail(self, error: BaseException) -> None:
        """Send why not."""
        self._send({"id": self._number, "error": encode_error(error)}, [])

    def _send(self, body: dict[str, Any], fds: list[int]) -> None:
        if self._client.closed:
            return
        try:
            self._client.channel.send(body, fds)
        except (OSError, WireError):
            self._client.channel.shut_down()  # the loop notices


Request = Callable[[House, Client, dict[str, Any], list[int], Answer], None]


def serve(house: House, client: Client, frame: Frame) -> None:
    """Do what a client asks; bad requests are answered with an error."""
    number = frame.body.get("id")
    answer = Answer(client, number if type(number) is int else -1)
    name = str(frame.body.get("do"))[:40]
    fds = list(frame.fds)  # a request takes out what it keeps
    try:
        if name not in _REQUESTS:
            raise KeeperError(
                f"this keeper does not know the request {name!r}: it is of another version; end "
                "the job, and stop and start the keeper"
            )
        _REQUESTS[name](house, client, frame.body, fds, answer)
    except (EverstepError, OSError) as error:
        answer.fail(error)
    except Exception as error:  # a keeper that ends of it would be asked the same again
        answer.fail(KeeperError(f"the keeper cannot do {name!r}: {type(error).__name__}: {error}"))
    finally:
        close_all(fds)


def _rank(client: Client) -> int:
    if client.rank is None:
        raise KeeperError("only a rank of the job may ask for this: connect as one")
    return client.rank


def _step_id(coded: Any) -> StepId | None:
    if coded is None:
        return None
    generation, step = coded
    return StepId(natural(generation), natural(step))


def _adopt(h: House, c: Client, body: dict[str, Any], fds: list[int], to: Answer) -> None:
    shape = SetShape.from_json(body)
    if shape.rank != _rank(c):
        raise ValueError(f"rank {c.rank} offers slots of rank {shape.rank}")
    taken = fds.copy()
    fds.clear()
    h.adopt(shape, taken, current=body.get("current") is True)
    to()


def _reserve(h: House, c: Client, body: dict[str, Any], fds: list[int], to: Answer) -> None:

    def made(found: SlotSet | Exception) -> None:
        if isinstance(found, Exception):
            to.fail(found)
        else:
            to(found.shape.as_json(), found.fds)

    slot_bytes, slots = natural(body["slot_bytes"]), natural(body["slots"])
    h.reserve(_rank(c), slot_bytes, slots, made)


def _free_others(h: House, c: Client, body: dict[str, Any], fds: list[int], to: Answer) -> None:
    h.table.free_others(_rank(c))
    h.free_surpassed()
    to()


def _sealed(h: House, c: Client, body: dict[str, Any], fds: list[int], to: Answer) -> None:
    current = h.table.current(_rank(c))
    index = natural(body["index"])
    if current is not None and index < len(current.slots):
        current.slots[index].sealed_at_s = time.monotonic()
    step_id = _step_id(body["all_sealed"])
    if step_id is not None:
        h.tell_all_sealed(step_id)
    to()


def _flush(h: House, c: Client, body: dict[str, Any], fds: list[int], to: Answer) -> None:
    order = FlushOrder.from_json(mapping(body["order"]))
    slot = h.table.slot(text(body["set_id"]), natural(body["index"]))
    if slot is None or slot.shape.rank != _rank(c) or order.rank != c.rank:
        raise KeeperError(
            f"there is no slot {body['index']} of rank {order.rank} for rank {c.rank}: flush what "
            "it has reserved"
        )

    def tell(outcome: Outcome) -> None:
        if isinstance(outcome, Exception):
            to.fail(outcome)
        else:
            to(asdict(outcome))

    h.flush(slot, order, tell)


def _lend_lock(h: House, c: Client, body: dict[str, Any], fds: list[int], to: Answer) -> None:
    if len(fds) != 1:
        raise ValueError("a lock is one descriptor")
    directory, rank = text(body["directory"]), _rank(c)
    h.take_lock(directory, fds.pop(), rank)
    to()


def _borrow_lock(h: House, c: Client, body: dict[str, Any], fds: list[int], to: Answer) -> None:
    _rank(c)
    found = h.lock_of(text(body["directory"]))
    to(fds=[] if found is None else [found])


def _orphan_order(h: House, c: Client, body: dict[str, Any], fds: list[int], to: Answer) -> None:
    h.set_orphan_order(_rank(c), FlushOrder.from_json(mapping(body["order"])))
    to()


def _flushing(h: House, c: Client, body: dict[str, Any], fds: list[int], to: Answer) -> None:
    to({"steps": sorted(h.flushes.steps())})


def _pinned(h: House, c: Client, body: dict[str, Any], fds: list[int], to: Answer) -> None:
    current = h.table.current(_rank(c))
    to({"slots": [slot.index for slot in current.slots if slot.pins] if current else []})


def _holdings(h: House, c: Client, body: dict[str, Any], fds: list[int], to: Answer) -> None:
    """Read-only descriptors, a few at a time: those of the sets that follow ``after``."""
    known = {(text(set_id), natural(index)) for set_id, index in body.get("known", [])}
    found = [
        slot
        for slot in h.table.slots()
        if (slot.shape.set_id, slot.index) not in known and slot.seal() is not None
    ][:_HOLDINGS_AT_ONCE]
    opened: list[int] = []
    try:
        opened.extend(segments.read_only(slot.fd) for slot in found)
        told = [_pin(h, c, slot) for slot in found]
        to({"slots": told, "more": len(found) == _HOLDINGS_AT_ONCE}, opened)
    finally:
        close_all(opened)


_HOLDINGS_AT_ONCE = 128


def _pin(h: House, c: Client, slot: Slot) -> dict[str, Any]:
    number = max(c.pins, default=0) + 1
    c.pins[number] = slot
    h.table.pin(slot)
    return {"pin": number, "set_id": slot.shape.set_id, "index": slot.index}


def _pin_again(h: House, c: Client, body: dict[str, Any], fds: list[int], to: Answer) -> None:
    """What a client has mapped already; 0 for what is no more here."""
    slot = h.table.slot(text(body["set_id"]), natural(body["index"]))
    to({"pin": 0} if slot is None else _pin(h, c, slot))


def _release(h: House, c: Client, body: dict[str, Any], fds: list[int], to: Answer) -> None:
    slot = c.pins.pop(natural(body["pin"]), None)
    if slot is not None:
        h.table.unpin(slot)
    to()


def _tell(h: House, c: Client, body: dict[str, Any], fds: list[int], to: Answer) -> None:
    h.stats[_rank(c)] = mapping(body["stats"])
    to()


def _status(h: House, c: Client, body: dict[str, Any], fds: list[int], to: Answer) -> None:
    to(h.status())


def _address(h: House, c: Client, body: dict[str, Any], fds: list[int], to: Answer) -> None:
    to({"address": h.address})


def _goodbye(h: House, c: Client, body: dict[str, Any], fds: list[int], to: Answer) -> None:
    if body["finished"] is True:
        c.finished = True
        h.finish(_rank(c))
    to()


def _stop(h: House, c: Client, body: dict[str, Any], fds: list[int], to: Answer) -> None:
    to({"pid": os.getpid()})
    h.stop("now" if body.get("now") is True else "flush")


_REQUESTS: dict[str, Request] = {
    "address": _address,
    "adopt": _adopt,
    "borrow_lock": _borrow_lock,
    "flush": _flush,
    "flushing": _flushing,
    "free_others": _free_others,
    "goodbye": _goodbye,
    "holdings": _holdings,
    "lend_lock": _lend_lock,
    "orphan_order": _orphan_order,
    "pin_again": _pin_again,
    "pinned": _pinned,
    "release": _release,
    "reserve": _reserve,
    "sealed": _sealed,
    "status": _status,
    "stop": _stop,
    "tell": _tell,
}
