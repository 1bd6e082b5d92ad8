"""The state of an optimizer as logical tensors ``optimizer.<parameter>.<key>`` and plain values.

``names`` maps the model's live tensors to their logical names.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from everstep.checkpoint.errors import StateError, StateMismatchError
from everstep.checkpoint.layout import TensorSpec
from everstep.checkpoint.torch_layout import DTYPES

PREFIX = "optimizer."
_OF_THIS_RUN = frozenset(
    {"params", "param_names", "foreach", "fused", "capturable", "differentiable"}
)
"""Members of a parameter group that say how this run computes, not what was trained."""

Names = Mapping[torch.Tensor, str]


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Names
) -> Iterator[tuple[str, torch.Tensor]]:
    """Its state tensors by logical name.

    Raises:
        StateError: it holds what is no parameter of the model, or a key that cannot be a name.
    """
    for parameter, name in _own_names(optimizer, names).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(key, str) or "." in key:
                raise StateError(
                    f"the optimizer's state of {name!r} has the key {key!r}: a dot or "
                    "a key that is no text cannot be saved"
                )
            if isinstance(value, torch.Tensor):
                yield f"{PREFIX}{name}.{key}", value


def optimizer_values(optimizer: torch.optim.Optimizer, names: Names) -> dict[str, Any]:
    """Parameter groups and everything in the state that is no tensor."""
    own = _own_names(optimizer, names)
    values = {
        name: {k: v for k, v in optimizer.state.get(p, {}).items() if not _is_tensor(v)}
        for p, name in own.items()
    }
    return {
        "groups": [
            {"params": [own[p] for p in group["params"]]}
            | {k: v for k, v in group.items() if k not in _OF_THIS_RUN}
            for group in optimizer.param_groups
        ],
        "values": {name: plain for name, plain in values.items() if plain},
    }


def materialise(
    optimizer: torch.optim.Optimizer, names: Names, stored: Mapping[str, TensorSpec]
) -> None:
    """Give the optimizer exactly the state tensors that a checkpoint holds, to be loaded into.

    Optimizers create them at their first step; a resumed run has made none yet. A tensor of the
    parameter's global shape is laid out as the parameter, any other is whole on every rank.
    """
    wanted: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in stored.items():
        if name.startswith(PREFIX):
            parameter_name, _, key = name.removeprefix(PREFIX).rpartition(".")
            wanted.setdefault(parameter_name, {})[key] = spec
    own = _own_names(optimizer, names)
    for group in optimizer.param_groups:
        on_device = bool(group.get("fused") or group.get("capturable"))
        for parameter in group["params"]:
            live = optimizer.state.pop(parameter, {})
            made = {
                key: live[key]
                if _is_tensor(live.get(key))
                else _zeros(parameter, key, spec, on_device)
                for key, spec in wanted.get(own[parameter], {}).items()
            }
            if made:
                optimizer.state[parameter] = made


def load_values(
    optimizer: torch.optim.Optimizer, names: Names, stored: Mapping[str, Any], where: str
) -> None:
    """Inverse of ``optimizer_values``; what was saved of parameters of other ranks is left out.

    Raises:
        StateMismatchError: the checkpoint has other parameter groups.
    """
    own = _own_names(optimizer, names)
    mine = [{own[p] for p in group["params"]} for group in optimizer.param_groups]
    theirs = [set(group["params"]).intersection(own.values()) for group in stored["groups"]]
    if mine != theirs:
        differences = [f"the optimizer has {len(mine)} parameter groups, {len(theirs)} were saved"]
        for number, (here, there) in enumerate(zip(mine, theirs, strict=False)):
            if odd := sorted(here ^ there):
                differences.append(f"group {number} differs in {', '.join(odd[:3])}")
        raise StateMismatchError(where, differences)
    for group, saved in zip(optimizer.param_groups, stored["groups"], strict=True):
        group.update({k: v for k, v in saved.items() if k not in _OF_THIS_RUN})
    for parameter, name in own.items():
        if name in stored["values"]:
            optimizer.state[parameter].update(stored["values"][name])


def _zeros(parameter: torch.Tensor, key: str, spec: TensorSpec, on_device: bool) -> torch.Tensor:
    dtype = DTYPES[spec.dtype]
    if spec.shape == tuple(parameter.shape) and key != "step":
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    device = parameter.device if on_device else torch.device("cpu")
    return torch.zeros(spec.shape, dtype=dtype, device=device)


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _own_names(optimizer: torch.optim.Optimizer, names: Names) -> dict[torch.Tensor, str]:
    own = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in names:
                raise StateError(
                    f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is "
                    "not in the model: build the optimizer after wrapping and sharding the model"
                )
            own[parameter] = names[parameter]
    for key in optimizer.state:
        if key not in own:
            raise StateError(
                f"the optimizer keeps state under {str(key)[:40]!r}, which is no parameter of its "
                "groups: only state of parameters can be saved"
            )
    return own
