"""Checkpoints in a training loop of your own, with nothing else of everstep.

Run it, stop it at any moment (Ctrl-C, kill -9), run it again: it goes on after the newest
checkpoint. With ``torchrun --nproc-per-node 2 examples/own_loop.py`` every rank writes its part.

    python examples/own_loop.py --directory /tmp/checkpoints --steps 200
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn

import everstep
from everstep.checkpoint.torch_collective import ProcessGroupCollective


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", default="checkpoints")
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()

    distributed = "WORLD_SIZE" in os.environ
    if distributed:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))
    if distributed:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)

    collective = ProcessGroupCollective() if distributed else None
    with everstep.Checkpointer(arguments.directory, keep=3, collective=collective) as checkpointer:
        state = everstep.State(model=model, optimizer=optimizer, scheduler=scheduler)
        start = checkpointer.load(state)  # 0 when nothing was saved yet
        print(f"starting at step {start}")
        for step in range(start, arguments.steps):
            x = torch.randn(32, 8)  # the random generators are part of the checkpoint, too
            loss = (model(x) - x.sum(1, keepdim=True)).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            if step % 20 == 19:
                checkpointer.save(step, state)  # durable when it returns
                print(f"step {step}: loss {loss.item():.6f}")

    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
