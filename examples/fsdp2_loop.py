"""FSDP2: every rank keeps and writes its own shards, and none twice.

    torchrun --nproc-per-node 2 examples/fsdp2_loop.py --directory /tmp/checkpoints

With a keeper on each node, workers that torchrun starts again continue from its memory:

    everstep keeper start --job fsdp
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 \\
        torchrun --nproc-per-node 2 --max-restarts 3 examples/fsdp2_loop.py --keeper-job fsdp

(The variable gives every restart a rendezvous of its own: docs/loops.md.)

Run it again with another --nproc-per-node: what was saved is laid out anew.
"""

import argparse
import inspect

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import everstep

WINDOW = 32


def text() -> torch.Tensor:
    """Something to learn from: the source of a module, as bytes."""
    return torch.tensor(list(inspect.getsource(argparse).encode()))


class Predictor(nn.Module):
    """The next byte from the few before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 16)
        self.hidden = nn.Sequential(nn.Linear(16 * WINDOW, 128), nn.GELU(), nn.Dropout(0.1))
        self.head = nn.Linear(128, 256)

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.hidden(self.embedding(windows).flatten(1)))
        return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", default="checkpoints")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--keeper-job")
    options = parser.parse_args()

    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    data, model = text(), Predictor()
    for part in (model.embedding, model.hidden, model.head, model):
        fully_shard(part)
    torch.manual_seed(1 + rank)  # from here on each rank draws its own samples and dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)  # after sharding
    state = everstep.State(model=model, optimizer=optimizer)

    job = options.keeper_job
    with everstep.Checkpointer(
        options.directory,
        keep=3,
        durable_every=50,
        collective=everstep.ProcessGroupCollective(),
        memory=everstep.KeeperMemory(job, rank=rank, world_size=ranks) if job else None,
    ) as checkpointer:
        start = checkpointer.load(state)
        if rank == 0:
            print(f"starting at step {start}", flush=True)
        for step in range(start, options.steps):
            at = torch.randint(len(data) - WINDOW, (32,))
            windows = data[at[:, None] + torch.arange(WINDOW + 1)]
            loss = nn.functional.cross_entropy(model(windows[:, :-1]), windows[:, -1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            last = step + 1 == options.steps
            checkpointer.save(step, state, durable=True if last else None)
            if rank == 0 and (step % 20 == 19 or last):
                print(f"step {step}: loss {loss.item():.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
