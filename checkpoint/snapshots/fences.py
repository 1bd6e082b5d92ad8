"""Hooks on optimizers: nothing is updated before the snapshot under way has been copied."""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch.utils.hooks import RemovableHandle

from everstep.checkpoint.errors import StateError


class Fences:
    """Calls a function before every update of the optimizers that it watches.

    Args:
        before_update: called on the thread that steps; cheap when there is nothing to wait for
            (an optimizer may call it twice per step).
    """

    def __init__(self, before_update: Callable[[], None]) -> None:
        self._before_update = before_update
        self._hooks: dict[int, tuple[torch.optim.Optimizer, RemovableHandle]] = {}
        self._fired: dict[int, int] = {}
        self._by_hand = 0

    def watch(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Hook those that are not hooked yet, and no others.

        Copies of an optimizer have lost its hooks.

        Raises:
            StateError: one cannot be hooked.
        """
        optimizers = list(optimizers)
        for key in self._hooks.keys() - {id(optimizer) for optimizer in optimizers}:
            self._hooks.pop(key)[1].remove()
            del self._fired[key]
        for optimizer in optimizers:
            key = id(optimizer)
            known = self._hooks.get(key)
            hooks = getattr(optimizer, "_optimizer_step_pre_hooks", None)
            if known is not None and known[0] is optimizer and hooks and known[1].id in hooks:
                continue
            self._hooks[key] = optimizer, self._hook(optimizer)
            self._fired[key] = 0

    def passed(self) -> None:
        """The function was called by hand, for all."""
        self._by_hand += 1

    @property
    def proven(self) -> bool:
        """Whether every optimizer has been seen to call its hook, or somebody calls it by hand."""
        return self._by_hand > 0 or (bool(self._fired) and all(self._fired.values()))

    def count(self, optimizer: torch.optim.Optimizer) -> int:
        """How often the hook of an optimizer was called, or the function by hand."""
        return self._fired.get(id(optimizer), 0) + self._by_hand

    def close(self) -> None:
        """Take all hooks away; may be called twice."""
        for _, handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()

    def _hook(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        key = id(optimizer)

        # Traced by a compiler, it would run when the compiler sees fit: after the update, even.
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def before_update(*_: object) -> None:
            self._fired[key] += 1
            self._before_update()

        try:
            handle: RemovableHandle = optimizer.register_step_pre_hook(before_update)
        except AttributeError:
            raise StateError(
                f"State(optimizer=...): {type(optimizer).__name__} only wraps an optimizer and "
                "takes no step hooks: give the optimizer inside of it"
            ) from None
        # other hooks may change tensors as well: they come after this one
        hooks = cast("OrderedDict[int, Any]", optimizer._optimizer_step_pre_hooks)
        hooks.move_to_end(handle.id, last=False)
        return handle
