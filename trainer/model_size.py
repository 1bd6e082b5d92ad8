"""Sizes of the built-in decoder that follow from its config: derived widths, parameter count."""

from dataclasses import dataclass

from everstep.trainer.config import AUTO, ModelConfig

BYTES_VOCAB = 257
"""Tokens of the 'bytes' tokenizer: 256 byte values and the end of a document."""


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """A ``ModelConfig`` with nothing left to derive."""

    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    tie_embeddings: bool

    @property
    def parameters(self) -> int:
        """Number of trained scalars."""
        attention = 2 * self.dim * self.head_dim * (self.heads + self.kv_heads)
        feed_forward = 3 * self.dim * self.ffn_dim
        norms = 2 * self.dim
        embeddings = (1 if self.tie_embeddings else 2) * self.vocab_size * self.dim
        return self.layers * (attention + feed_forward + norms) + self.dim + embeddings


def model_size(model: ModelConfig, tokenizer_vocab: int) -> ModelSize:
    """Derive every ``auto`` of a model config; ``tokenizer_vocab`` counts the tokenizer's ids."""
    return ModelSize(
        vocab_size=_round_up_64(tokenizer_vocab) if model.vocab_size == AUTO else model.vocab_size,
        dim=model.dim,
        layers=model.layers,
        heads=model.heads,
        kv_heads=model.heads if model.kv_heads == AUTO else model.kv_heads,
        head_dim=model.dim // model.heads,
        ffn_dim=_round_up_64(-(-8 * model.dim // 3)) if model.ffn_dim == AUTO else model.ffn_dim,
        tie_embeddings=model.tie_embeddings,
    )


def _round_up_64(value: int) -> int:
    return -(-value // 64) * 64
