"""A training loop of your own that never loses a step, with nothing else of everstep.

Every step is kept in memory while the next one computes, and every 50th becomes durable. Run it,
stop it at any moment (Ctrl-C, kill -9), run it again: it goes on as if nothing had happened.

    python examples/own_loop.py --directory /tmp/checkpoints --steps 200

Memory of the process ends with it. That of a keeper does not: then only the last step is redone.

    everstep keeper start --job own
    python examples/own_loop.py --directory /tmp/checkpoints --steps 200 --keeper-job own
"""

import argparse
import inspect

import torch
from torch import nn

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

    torch.manual_seed(0)
    data, model = text(), predictor()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    state = everstep.State(model=model, optimizer=optimizer, scheduler=scheduler)

    job = options.keeper_job
    memory = everstep.KeeperMemory(job, rank=0, world_size=1) if job else None
    with everstep.Checkpointer(
        options.directory, keep=3, durable_every=50, memory=memory
    ) as checkpointer:
        start = checkpointer.load(state)  # 0 when nothing was saved yet
        print(f"starting at step {start}", flush=True)
        for step in range(start, options.steps):
            # the random generators are part of every snapshot: these are the exact next samples
            at = torch.randint(len(data) - WINDOW, (64,))
            windows = data[at[:, None] + torch.arange(WINDOW + 1)]
            loss = nn.functional.cross_entropy(model(windows[:, :-1]), windows[:, -1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()  # waits, if it must, until the step before is copied
            scheduler.step()
            last = step + 1 == options.steps
            checkpointer.save(step, state, durable=True if last else None)  # returns at once
            if step % 20 == 19 or last:
                print(f"step {step}: loss {loss.item():.6f}", flush=True)


if __name__ == "__main__":
    main()
