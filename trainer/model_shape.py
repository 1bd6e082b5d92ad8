"""The sizes of the built-in model, with everything that was ``auto`` decided (pure, no torch)."""

from dataclasses import dataclass

from everstep.trainer.config import AUTO, ModelConfig
from everstep.trainer.errors import ConfigError

_ROUND = 64
"""Multiple that automatic sizes are rounded up to: keeps matrices friendly to hardware and TP."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a Llama-style decoder; counts, not bytes."""

    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    tie_embeddings: bool

    @property
    def layer_matrices(self) -> int:
        """Weights in the matrices of one layer."""
        attention = 2 * self.dim * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.dim * self.ffn_dim

    @property
    def parameters(self) -> int:
        """Number of parameters; tied embeddings count once."""
        block = self.layer_matrices + 2 * self.dim
        embeddings = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        return self.layers * block + self.dim + embeddings


def resolve_model(config: ModelConfig, vocab_size: int) -> ModelShape:
    """The sizes of ``config`` for a tokenizer of ``vocab_size`` tokens.

    Raises ConfigError when ``model.vocab_size`` has fewer rows than the tokenizer has tokens.
    """
    rows = round_up(vocab_size, _ROUND) if config.vocab_size == AUTO else config.vocab_size
    if rows < vocab_size:
        raise ConfigError(
            f"model.vocab_size={rows} is smaller than the {vocab_size} tokens of the tokenizer: "
            "raise it, or use 'auto'"
        )
    ffn_dim = config.ffn_dim
    if ffn_dim == AUTO:
        ffn_dim = round_up(-(-8 * config.dim // 3), _ROUND)
    return ModelShape(
        vocab_size=rows,
        dim=config.dim,
        layers=config.layers,
        heads=config.heads,
        kv_heads=config.heads if config.kv_heads == AUTO else config.kv_heads,
        head_dim=config.dim // config.heads,
        ffn_dim=ffn_dim,
        tie_embeddings=config.tie_embeddings,
    )


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple
