"""Initial weights from a checkpoint or from safetensors, on any layout (``model.init_from``).

Every rank reads the boxes that it holds, straight into its parameters where the dtype is the same;
nothing else is kept in memory.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from everstep.checkpoint.collective import Collective, SingleProcess, on_rank0
from everstep.checkpoint.convert.architecture import OBJECT_NAME, Architecture, from_objects
from everstep.checkpoint.convert.converted import Converted
from everstep.checkpoint.convert.hf import plan_hf_import, read_architecture
from everstep.checkpoint.convert.plan import plan_extract, plan_union
from everstep.checkpoint.convert.safetensors_source import SafetensorsSource
from everstep.checkpoint.convert.source import Source
from everstep.checkpoint.convert.spec import load_spec
from everstep.checkpoint.convert.step_source import StepSource
from everstep.checkpoint.layout import TensorSpec
from everstep.checkpoint.lineage import StepId
from everstep.checkpoint.open_place import Place, find_place
from everstep.checkpoint.stores import is_url, without_scheme
from everstep.checkpoint.torch_layout import (
    DTYPE_NAMES,
    LiveTensor,
    live_tensor,
    strided_bytes,
)
from everstep.checkpoint.torch_state import named_tensors
from everstep.trainer.architecture import architecture_of
from everstep.trainer.config import RunConfig
from everstep.trainer.errors import ConfigError
from everstep.trainer.model import build_model


def init_from(
    model: nn.Module, config: RunConfig, vocab_size: int, collective: Collective | None = None
) -> str:
    """Overwrite every parameter and buffer of a parallelised model; says what with.

    Args:
        model: as ``init.materialise`` left it.
        config: of the run; ``model.init_from`` is a folder of transformers, a safetensors file, or
            a checkpoint of ours, as a path or URL: see ``open_place``.
        vocab_size: the tokenizer's.
        collective: of the job, whose ranks all call this; None: it has one.

    Raises:
        ConfigError: there is nothing, or it is of another model; every difference is told.
        ConversionError: it does not hold exactly the tensors of this model.
        DamagedError: it is damaged; the model is not to be used.
    """
    named = without_scheme(config.model.init_from or "")
    path = Path(named).expanduser()
    ours = architecture_of(config, vocab_size) if config.model.factory is None else None
    place = find_place(named if is_url(named) else path)
    if place is not None:
        step_id = _chosen(place, collective or SingleProcess())
        with place.open(step_id) as reader:
            if ours is not None and OBJECT_NAME in reader.manifest.objects:
                _compare(ours, from_objects(reader.manifest.objects, reader.where), reader.where)
            source = StepSource(reader)
            wanted = _whole_model(model, config, vocab_size)
            plan = plan_extract(load_spec("weights"), source.tensors, wanted, where=reader.where)
            _fill(model, Converted(plan, source))
            return f"the weights of {reader.where}"
    if not path.exists():
        raise ConfigError(
            f"model.init_from: there is no {path} (looked in {Path.cwd()}); give a folder with "
            "config.json and safetensors, a safetensors file, or a checkpoint of a run"
        )
    wanted = _whole_model(model, config, vocab_size)
    with SafetensorsSource(path) as files:
        if ours is not None:
            theirs = read_architecture(path)
            _compare(ours, theirs, str(path))
            plan = plan_hf_import(files, theirs, wanted, path)
        else:
            plan = plan_union(load_spec("model"), files.tensors, wanted, where=str(path))
        _fill(model, Converted(plan, files))
    return f"the weights of {path}"


def _chosen(place: Place, collective: Collective) -> StepId:
    """The same step on all ranks, though another job may be saving there."""

    def choose() -> tuple[int, int]:
        step_id = place.chosen()
        return step_id.generation, step_id.step

    generation, step = on_rank0(collective, "init_from", choose)
    return StepId(generation, step)


def _whole_model(model: nn.Module, config: RunConfig, vocab_size: int) -> dict[str, TensorSpec]:
    """All tensors of the run's model, also those of other pipeline stages, by logical name."""
    if config.model.factory is None:
        model = build_model(
            config.model, vocab_size=vocab_size, seq_len=config.data.seq_len, seed=config.seed
        )
    return {name: _spec(name, tensor) for name, tensor in _named(model).items()}


def _named(model: nn.Module) -> Mapping[str, torch.Tensor]:
    return {f"model.{name}": tensor for name, tensor in named_tensors(model).items()}


def _spec(name: str, tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))


def _compare(ours: Architecture, theirs: Architecture, where: str) -> None:
    differences = ours.differences(theirs)
    if differences:
        raise ConfigError(
            f"model.init_from: {where} is of another model: {'; '.join(differences)}: set these "
            "keys to its values"
        )


@torch.no_grad()
def _fill(model: nn.Module, source: Source) -> None:
    for name, tensor in _named(model).items():
        _fill_tensor(live_tensor(name, tensor), source)


def _fill_tensor(live: LiveTensor, source: Source) -> None:
    if not live.local.numel():
        return
    on_host = live.local.device.type == "cpu"
    host = live.local if on_host else torch.empty_like(live.local, device="cpu")
    source.fill(live.fragment.spec.name, live.fragment.box, strided_bytes(host))
    if not on_host:
        live.local.copy_(host)
