"""transformers' Trainer with a snapshot at every step, resumed at the exact sample.

    python examples/hf_trainer.py --directory /tmp/checkpoints --steps 60

Stop it at any moment, run it again. With a keeper, snapshots outlive the process; under torchrun
(DDP, with ``--max-restarts``) also all processes of a node:

    everstep keeper start --job hf
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 \\
        torchrun --nproc-per-node 2 --max-restarts 3 examples/hf_trainer.py --keeper-job hf

(The variable gives every restart a rendezvous of its own: docs/loops.md.)
"""

import argparse
import inspect
import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import everstep
from everstep.integrations.hf import attach

WINDOW = 64


def lessons() -> list[dict[str, torch.Tensor]]:
    """Something to learn from: the source of a module, as bytes, in pieces."""
    text = torch.tensor(list(inspect.getsource(argparse).encode()))
    pieces = text[: len(text) // WINDOW * WINDOW].view(-1, WINDOW)
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", default="checkpoints")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--keeper-job")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as nothing_goes_here:
        arguments = TrainingArguments(
            nothing_goes_here,
            max_steps=options.steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            logging_steps=10,
            save_strategy="no",  # every step is saved already
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        rank, ranks = arguments.process_index, arguments.world_size  # starts the process group
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=256, n_embd=48, n_layer=2, n_head=2, n_positions=WINDOW)
        trainer = Trainer(model=GPT2LMHeadModel(config), args=arguments, train_dataset=lessons())

        job = options.keeper_job
        with everstep.Checkpointer(
            options.directory,
            durable_every=20,
            collective=everstep.ProcessGroupCollective() if ranks > 1 else None,
            memory=everstep.KeeperMemory(job, rank=rank, world_size=ranks) if job else None,
        ) as checkpointer:
            attach(trainer, checkpointer)
            trainer.train()  # continues after the newest step that there is
    if rank == 0:
        print(f"ends at step {trainer.state.global_step}")


if __name__ == "__main__":
    main()
