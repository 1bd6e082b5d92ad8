"""Text from a model, as a look at what it has learnt; works on every layout, without a cache."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from everstep.trainer.model import logits_of

_STEP = 64
"""Windows grow by this many tokens, so that early tokens are cheap and compiled shapes are few."""
_STOP = -1
"""In place of a token: rank 0 was asked to stop."""


LogitsAt = Callable[[Tensor, int], Tensor]
"""Tokens (1, L) on the CPU and a position -> the logits (V,) there, the same on every rank."""


def logits_at(model: nn.Module) -> LogitsAt:
    """The logits of a model that is not cut into pipeline stages, in evaluation mode."""

    @torch.no_grad()
    def forward(tokens_1L: Tensor, position: int) -> Tensor:
        training = model.training
        model.eval()
        try:
            device = next(model.parameters()).device
            logits_V = logits_of(model, tokens_1L.to(device), None)[0, position]
        finally:
            model.train(training)
        return logits_V.full_tensor() if isinstance(logits_V, DTensor) else logits_V

    return forward


def generate(
    forward: LogitsAt,
    prompt: Sequence[int],
    n_tokens: int,
    temperature: float,
    seed: int,
    seq_len: int,
    vocab_size: int | None = None,
    tp: int = 1,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[int]:
    """``prompt`` continued by ``n_tokens`` sampled tokens; the same list on every rank.

    Every rank calls it, with the same arguments. ``temperature`` 0 takes the likeliest token.
    Only the last ``seq_len`` tokens are looked at; only ids below ``vocab_size`` (the tokenizer's;
    None: any) are drawn. It ends early once ``should_stop`` of rank 0 says so. Each token costs a
    forward pass, over a multiple of ``tp`` tokens. Raises ValueError for an empty prompt.
    """
    if not prompt:
        raise ValueError("the prompt is empty: give at least one token")
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    for _ in range(n_tokens):
        context = ids[-seq_len:]
        tokens_1L = torch.zeros(1, _window(len(context), seq_len, tp), dtype=torch.int64)
        tokens_1L[0, : len(context)] = torch.tensor(context)
        logits_V = forward(tokens_1L, len(context) - 1)
        choice = _draw(logits_V[:vocab_size].double().cpu(), temperature, generator)
        agreed = _agreed(_STOP if should_stop() else choice, logits_V.device)
        if agreed == _STOP:
            break
        ids.append(agreed)
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
