"""The state of optimizers as logical tensors ``optimizer.<parameter>.<key>`` and plain values.

Several optimizers, each over some of the parameters, are saved as one that has all their groups.
``names`` maps the model's live tensors to their logical names.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate

from everstep.checkpoint.errors import StateError, StateMismatchError
from everstep.checkpoint.layout import TensorSpec
from everstep.checkpoint.torch_layout import DTYPES

PREFIX = "optimizer."
_OF_THIS_RUN = frozenset(
    {"params", "param_names", "foreach", "fused", "capturable", "differentiable"}
)
"""Members of a parameter group that say how this run computes, not what was trained."""

Names = Mapping[torch.Tensor, str]
Optimizers = Sequence[torch.optim.Optimizer]


def optimizer_tensors(optimizers: Optimizers, names: Names) -> Iterator[tuple[str, torch.Tensor]]:
    """Their state tensors by logical name.

    Raises:
        StateError: they hold what is no parameter of the model, or a key that cannot be a name.
    """
    for parameter, (name, optimizer) in _own(optimizers, names).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(key, str) or "." in key:
                raise StateError(
                    f"the optimizer's state of {name!r} has the key {key!r}: a dot or "
                    "a key that is no text cannot be saved"
                )
            if isinstance(value, torch.Tensor):
                yield f"{PREFIX}{name}.{key}", value


def optimizer_values(optimizers: Optimizers, names: Names) -> dict[str, Any]:
    """Parameter groups and everything in the state that is no tensor."""
    own = _own(optimizers, names)
    values = {
        name: {k: v for k, v in optimizer.state.get(p, {}).items() if not _is_tensor(v)}
        for p, (name, optimizer) in own.items()
    }
    held = [[own[p][0] for p in group["params"]] for group in _groups(optimizers)]
    return {
        "groups": group_values(optimizers, held),
        "values": {name: plain for name, plain in values.items() if plain},
    }


def group_values(optimizers: Optimizers, held: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Hyperparameters of every parameter group, and the names of the parameters in it.

    Args:
        optimizers: whose groups.
        held: these names, for each group.
    """
    return [
        {"params": list(names)} | {k: _plain(v) for k, v in group.items() if k not in _OF_THIS_RUN}
        for group, names in zip(_groups(optimizers), held, strict=True)
    ]


def materialise(optimizers: Optimizers, names: Names, stored: Mapping[str, TensorSpec]) -> None:
    """Give optimizers exactly the state tensors that a checkpoint holds, to be loaded into.

    Optimizers create them at their first step; a resumed run has made none yet. A tensor of the
    parameter's global shape is laid out as the parameter, any other is whole on every rank: on the
    parameter's mesh, as torch makes it of a gradient there, but for scalars, such as the step.
    """
    wanted: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in stored.items():
        if name.startswith(PREFIX):
            parameter_name, _, key = name.removeprefix(PREFIX).rpartition(".")
            wanted.setdefault(parameter_name, {})[key] = spec
    own = _own(optimizers, names)
    for group in _groups(optimizers):
        on_device = bool(group.get("fused") or group.get("capturable"))
        for parameter in group["params"]:
            name, optimizer = own[parameter]
            live = optimizer.state.pop(parameter, {})
            made = {
                key: live[key]
                if _is_tensor(live.get(key))
                else _zeros(parameter, key, spec, on_device)
                for key, spec in wanted.get(name, {}).items()
            }
            if made:
                optimizer.state[parameter] = made


def load_values(
    optimizers: Optimizers, names: Names, stored: Mapping[str, Any], where: str
) -> None:
    """Inverse of ``optimizer_values``; what was saved of parameters of other ranks is left out.

    Raises:
        StateMismatchError: the checkpoint has other parameter groups.
    """
    own = _own(optimizers, names)
    groups = _groups(optimizers)
    held = {name for name, _ in own.values()}
    mine = [{own[p][0] for p in group["params"]} for group in groups]
    theirs = [held.intersection(group["params"]) for group in stored["groups"]]
    if mine != theirs:
        differences = [f"the optimizer has {len(mine)} parameter groups, {len(theirs)} were saved"]
        for number, (here, there) in enumerate(zip(mine, theirs, strict=False)):
            if odd := sorted(here ^ there):
                differences.append(f"group {number} differs in {', '.join(odd[:3])}")
        raise StateMismatchError(where, differences)
    for group, saved in zip(groups, stored["groups"], strict=True):
        for key in saved.keys() - _OF_THIS_RUN:
            if _is_tensor(group.get(key)):
                group[key].fill_(saved[key])  # whoever captured or compiled it has this tensor
            else:
                group[key] = saved[key]
    for parameter, (name, optimizer) in own.items():
        if name in stored["values"]:
            optimizer.state[parameter].update(stored["values"][name])


def _zeros(parameter: torch.Tensor, key: str, spec: TensorSpec, on_device: bool) -> torch.Tensor:
    dtype = DTYPES[spec.dtype]
    if spec.shape == tuple(parameter.shape) and key != "step":
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    if isinstance(parameter, DTensor) and spec.shape:
        local = torch.zeros(spec.shape, dtype=dtype, device=parameter.device)
        mesh = parameter.device_mesh
        return DTensor.from_local(local, mesh, [Replicate()] * mesh.ndim, run_check=False)
    device = parameter.device if on_device else torch.device("cpu")
    return torch.zeros(spec.shape, dtype=dtype, device=device)


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _plain(value: Any) -> Any:
    """A hyperparameter as a Python value, where it is a tensor of one item, such as ``lr``."""
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def _groups(optimizers: Optimizers) -> list[dict[str, Any]]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def _own(
    optimizers: Optimizers, names: Names
) -> dict[torch.Tensor, tuple[str, torch.optim.Optimizer]]:
    """Name and optimizer of each parameter that has one."""
    own: dict[torch.Tensor, tuple[str, torch.optim.Optimizer]] = {}
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise StateError(
                "LBFGS keeps one history for all its parameters together, which cannot be saved: "
                "leave it out of the State, and let it begin anew"
            )
        if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
            raise StateError(
                "ZeroRedundancyOptimizer keeps its state in an optimizer inside of it, of other "
                "parameters on each rank, which cannot be saved: shard with fully_shard instead"
            )
        mine = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter in mine:
            if parameter not in names:
                raise StateError(
                    f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is "
                    "not in the model: build the optimizer after wrapping and sharding the model"
                )
            if parameter in own:
                raise StateError(
                    f"two optimizers hold the parameter {names[parameter]!r}: a checkpoint keeps "
                    "one state of each, so save their states in two checkpoints"
                )
            own[parameter] = names[parameter], optimizer
        for key in optimizer.state:
            if key not in own or own[key][1] is not optimizer:
                raise StateError(
                    f"the optimizer keeps state under {str(key)[:40]!r}, which is no parameter of "
                    "its groups: only state of parameters can be saved"
                )
    return own
