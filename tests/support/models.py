"""Models and broken factories of a user, for tests of ``model.factory``."""

import torch
from torch import Tensor, nn


class Bigram(nn.Module):
    """Predicts the next token from the current one, through two residual layers."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.head = nn.Linear(width, vocab_size)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        x_BLD = self.embedding(tokens_BL)
        for layer in self.layers:
            x_BLD = x_BLD + torch.relu(layer(x_BLD))
        logits_BLV: Tensor = self.head(x_BLD)
        return logits_BLV


def bigram(vocab_size: int, seq_len: int, width: int = 16) -> nn.Module:
    """A model that works."""
    return Bigram(vocab_size, width)


def no_module(vocab_size: int, seq_len: int) -> str:
    """Returns the wrong thing."""
    return "a model"


def on_meta(vocab_size: int, seq_len: int) -> nn.Module:
    """Forgets to give the weights values."""
    with torch.device("meta"):
        return Bigram(vocab_size, 4)


def defective(vocab_size: int, seq_len: int) -> nn.Module:
    """Calls something wrongly itself."""
    return nn.Linear(vocab_size)  # type: ignore[call-arg]


NOT_CALLABLE = 3
