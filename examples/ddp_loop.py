"""DistributedDataParallel that goes on at the exact step when its processes are killed.

    torchrun --nproc-per-node 2 examples/ddp_loop.py --directory /tmp/checkpoints

A keeper holds the snapshots of all ranks of a node. torchrun starts killed workers again, and
these continue from its memory; at most the last step is redone:

    everstep keeper start --job ddp
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 \\
        torchrun --nproc-per-node 2 --max-restarts 3 examples/ddp_loop.py --keeper-job ddp

(The variable gives every restart a rendezvous of its own: docs/loops.md.)
"""

import argparse
import inspect

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import everstep

WINDOW = 32


def text() -> torch.Tensor:
    """Something to learn from: the source of a module, as bytes."""
    return torch.tensor(list(inspect.getsource(argparse).encode()))


def predictor() -> nn.Module:
    """The next byte from the few before it."""
    return nn.Sequential(
        nn.Embedding(256, 16),
        nn.Flatten(),
        nn.Linear(16 * WINDOW, 128),
        nn.GELU(),
        nn.Dropout(0.1),
        nn.Linear(128, 256),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", default="checkpoints")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--keeper-job")
    options = parser.parse_args()

    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    data, model = text(), DistributedDataParallel(predictor())
    torch.manual_seed(1 + rank)  # from here on each rank draws its own samples and dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
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
