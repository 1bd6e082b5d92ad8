"""What model a run trains, kept in its checkpoints so that these can be exported on their own."""

from typing import Any

from everstep.checkpoint.convert.architecture import Architecture, to_object
from everstep.trainer.config import RunConfig
from everstep.trainer.model_shape import resolve_model


def architecture_of(config: RunConfig, vocab_size: int) -> Architecture:
    """The built-in model of a run whose tokenizer has ``vocab_size`` tokens. Raises ConfigError."""
    shape = resolve_model(config.model, vocab_size)
    return Architecture(
        vocab_size=shape.vocab_size,
        dim=shape.dim,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        ffn_dim=shape.ffn_dim,
        seq_len=config.data.seq_len,
        rope_theta=config.model.rope_theta,
        norm_eps=config.model.norm_eps,
        tie_embeddings=shape.tie_embeddings,
    )


class ArchitectureNote:
    """Goes into checkpoints; coming back it changes nothing, as the configuration decides."""

    def __init__(self, config: RunConfig, vocab_size: int) -> None:
        if config.model.factory is not None:
            self._value: dict[str, Any] = {"kind": "factory", "factory": config.model.factory}
        else:
            self._value = to_object(architecture_of(config, vocab_size))

    def state_dict(self) -> dict[str, Any]:
        """See ``torch_state.Stateful``."""
        return self._value

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See ``torch_state.Stateful``."""
