"""Text from a model, as a look at what it has learnt; works on every layout, without a cache."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from everstep.trainer.model import logits_of
from everstep.trainer.sharded_weights import axis_size

_STEP = 64
"""Windows grow by this many tokens, so that early tokens are cheap and compiled shapes are few."""
_STOP = -1
"""In place of a token: rank 0 was asked to stop."""


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt: Sequence[int],
    n_tokens: int,
    temperature: float,
    seed: int,
    seq_len: int,
    vocab_size: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[int]:
    """``prompt`` continued by ``n_tokens`` sampled tokens; the same list on every rank.

    Every rank calls it, with the same arguments. ``temperature`` 0 takes the likeliest token.
    Only the last ``seq_len`` tokens are looked at; only ids below ``vocab_size`` (the tokenizer's;
    None: any) are drawn. It ends early once ``should_stop`` of rank 0 says so. Each token costs a
    forward pass. Raises ValueError for an empty prompt.
    """
    if not prompt:
        raise ValueError("the prompt is empty: give at least one token")
    training = model.training
    model.eval()
    weight = next(model.parameters())
    device, tp = weight.device, axis_size(weight, "tp")
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    for _ in range(n_tokens):
        context = ids[-seq_len:]
        tokens_1L = torch.zeros(1, _window(len(context), seq_len, tp), dtype=torch.int64)
        tokens_1L[0, : len(context)] = torch.tensor(context)
        logits_V = logits_of(model, tokens_1L.to(device), None)[0, len(context) - 1]
        if isinstance(logits_V, DTensor):
            logits_V = logits_V.full_tensor()
        choice = _draw(logits_V[:vocab_size].double().cpu(), temperature, generator)
        agreed = _agreed(_STOP if should_stop() else choice, device)
        if agreed == _STOP:
            break
        ids.append(agreed)
    model.train(training)
    return ids


def _window(used: int, seq_len: int, tp: int) -> int:
    """Length to pad ``used`` tokens to: causal attention does not see what comes after them."""
    step = math.lcm(_STEP, tp)
    return min(-(-used // step) * step, seq_len)


def _draw(logits_V: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    weights_V = (logits_V / temperature).softmax(0)
    return int(torch.multinomial(weights_V, 1, generator=generator))


def _agreed(choice: int, device: torch.device) -> int:
    """Rank 0's choice: on mixed hardware, ranks may differ in the last bit of a logit."""
    if not dist.is_initialized():
        return choice
    chosen = torch.tensor(choice, device=device)
    dist.broadcast(chosen, src=0)
    return int(chosen)
