"""The training that snapshots are taken of: a Llama under FSDP2, fp32, AdamW."""

from collections.abc import Iterator
from functools import cached_property

import torch
import torch.nn.functional as F
from snapshot_inflation_turns import RANKS, Size
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.tensor import DTensor

from everstep.trainer.config import MeshConfig, ModelConfig, ParallelConfig
from everstep.trainer.init import materialise
from everstep.trainer.mesh import build_mesh
from everstep.trainer.mesh_shape import resolve_mesh
from everstep.trainer.model import build_model
from everstep.trainer.parallelize import parallelize

SEED = 1


class Training:
    """One rank of it."""

    def __init__(self, rank: int, size: Size, adamw: str) -> None:
        config = ModelConfig(
            vocab_size=size.vocab,
            dim=size.dim,
            layers=size.layers,
            heads=size.heads,
            ffn_dim=size.ffn_dim,
        )
        shape = resolve_mesh(MeshConfig(dp_shard=RANKS), RANKS)
        self.model = build_model(config, vocab_size=size.vocab, seq_len=size.seq_len, seed=SEED)
        parallelize(self.model, build_mesh(shape, "cpu"), shape, ParallelConfig())
        materialise(self.model, torch.device("cpu"), SEED)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, foreach=adamw == "foreach", fused=adamw == "fused"
        )
        generator = torch.Generator().manual_seed(rank)
        self._tokens_BL = torch.randint(
            size.vocab, (size.batch, size.seq_len + 1), generator=generator
        )

    def step(self) -> None:
        """One step of training."""
        logits_BLV = self.model(self._tokens_BL[:, :-1], None)
        loss = F.cross_entropy(logits_BLV.flatten(0, 1), self._tokens_BL[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @cached_property
    def state_dict(self) -> dict[str, object]:
        """What DCP saves: DTensors that training goes on to change in place."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    @cached_property
    def local_tensors(self) -> dict[str, Tensor]:
        """This rank's share of all tensors, by name; the live ones."""
        return dict(_locals(self.state_dict, ""))

    @property
    def state_bytes(self) -> int:
        """Of this rank."""
        return sum(tensor.nbytes for tensor in self.local_tensors.values())


def _locals(value: object, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, DTensor):
        yield name, value.to_local().detach()
    elif isinstance(value, Tensor):
        yield name, value.detach()
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _locals(inner, f"{name}.{key}" if name else key)
