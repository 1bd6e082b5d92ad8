"""What a checkpoint says of the model that it is of, and Hugging Face's words for it (pure).

The built-in model is a Llama without biases and without scaled rotary positions; ``config.json`` of
another architecture is refused with everything that differs.

Source: the fields and defaults of ``LlamaConfig`` in transformers.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from everstep.checkpoint.convert.errors import ArchitectureError
from everstep.checkpoint.errors import CheckpointError
from everstep.checkpoint.layout import TensorSpec

OBJECT_NAME = "object.architecture"
"""Where a manifest of our trainer keeps it."""
KIND = "llama"
_HF_NAMES = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_dim": "intermediate_size",
    "seq_len": "max_position_embeddings",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
_HF_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
_HF_DEFAULTS = {
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The built-in model: counts, and the two numbers that no tensor shows."""

    vocab_size: int
    """Rows of the embedding."""
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    seq_len: int
    """Tokens per sample that it was trained with; not compared, the model works with any."""
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool

    def differences(self, other: "Architecture", prefix: str = "model.") -> list[str]:
        """One phrase for each field in which another one, found elsewhere, differs."""
        return [
            f"{prefix}{f.name} is {getattr(self, f.name)} here and {getattr(other, f.name)} there"
            for f in fields(self)
            if f.name != "seq_len" and getattr(self, f.name) != getattr(other, f.name)
        ]

    def hf_tensors(self, dtype: str) -> dict[str, TensorSpec]:
        """The tensors of LlamaForCausalLM; a tied head is none of its own."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        block = {
            "self_attn.q_proj": (queries, self.dim),
            "self_attn.k_proj": (keys, self.dim),
            "self_attn.v_proj": (keys, self.dim),
            "self_attn.o_proj": (self.dim, queries),
            "mlp.gate_proj": (self.ffn_dim, self.dim),
            "mlp.up_proj": (self.ffn_dim, self.dim),
            "mlp.down_proj": (self.dim, self.ffn_dim),
            "input_layernorm": (self.dim,),
            "post_attention_layernorm": (self.dim,),
        }
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (self.vocab_size, self.dim)}
        for layer in range(self.layers):
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
        shapes["model.norm"] = (self.dim,)
        if not self.tie_embeddings:
            shapes["lm_head"] = (self.vocab_size, self.dim)
        return {f"{n}.weight": TensorSpec(f"{n}.weight", dtype, s) for n, s in shapes.items()}


def to_object(architecture: Architecture) -> dict[str, Any]:
    """What a checkpoint keeps under ``OBJECT_NAME``; plain JSON."""
    return {"kind": KIND, **asdict(architecture)}


def from_objects(objects: Mapping[str, Any], where: str) -> Architecture:
    """The architecture that a manifest's objects tell.

    Raises:
        CheckpointError: they tell none, or that of a model that is not the built-in one.
    """
    found = objects.get(OBJECT_NAME)
    if not isinstance(found, dict) or "kind" not in found:
        raise CheckpointError(
            f"{where} does not say what model it is of ({OBJECT_NAME} is missing): export it as "
            "safetensors, torch or zarr instead"
        )
    if found["kind"] != KIND:
        raise CheckpointError(
            f"{where} is of a model of its own (model.factory), not of the built-in Llama: export "
            "it as safetensors, torch or zarr, or use it with the same model.factory"
        )
    values = {f.name: found.get(f.name) for f in fields(Architecture)}
    return _checked(values, where)


def to_hf_config(architecture: Architecture, dtype: str) -> dict[str, Any]:
    """``config.json`` for tensors of this dtype."""
    own = {hf: getattr(architecture, name) for name, hf in _HF_NAMES.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **own,
        **_HF_FIXED,
        "attention_dropout": 0.0,
        "rope_scaling": None,
        "use_cache": True,
        "torch_dtype": _TORCH_NAMES[dtype],
        "bos_token_id": None,
        "eos_token_id": None,
    }


def from_hf_config(config: Any, where: str) -> Architecture:
    """Inverse of ``to_hf_config``.

    Raises:
        ArchitectureError: what it describes is not what the built-in model can be.
        CheckpointError: it is no such configuration.
    """
    if not isinstance(config, dict) or "model_type" not in config:
        raise CheckpointError(f"{where} is no config.json of transformers: it has no model_type")
    if config["model_type"] != "llama":
        raise ArchitectureError(
            where, [f"its model_type is {config['model_type']!r}, the built-in model is 'llama'"]
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{where}: its rotary positions are {rope!r}, expected a mapping")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    wrong = [
        f"its {name} is {config[name]!r}, the built-in model has {value!r}"
        for name, value in _HF_FIXED.items()
        if config.get(name, value) != value
    ]
    if rope_type != "default":
        wrong.append(f"its rotary positions are scaled ({rope_type!r}), the built-in model's never")
    if wrong:
        raise ArchitectureError(where, wrong)
    values = {name: config.get(hf, _HF_DEFAULTS.get(hf)) for name, hf in _HF_NAMES.items()}
    values["rope_theta"] = config.get("rope_theta", rope.get("rope_theta", 10000.0))
    if values["kv_heads"] is None:
        values["kv_heads"] = values["heads"]
    dim, heads = values["dim"], values["heads"]
    if values["head_dim"] is None and isinstance(dim, int) and isinstance(heads, int) and heads > 0:
        values["head_dim"] = dim // heads
    return _checked(values, where)


def _checked(values: Mapping[str, Any], where: str) -> Architecture:
    kinds: dict[str, type] = {"rope_theta": float, "norm_eps": float, "tie_embeddings": bool}
    found = dict(values)
    for name, value in values.items():
        kind = kinds.get(name, int)
        if kind is float and type(value) is int:
            value = found[name] = float(value)
        fits = type(value) is kind
        if not fits or (kind is not bool and not value > 0):
            expected = "true or false" if kind is bool else f"a positive {kind.__name__}"
            raise CheckpointError(
                f"{where}: {_HF_NAMES[name]} (our {name}) is {value!r}, expected {expected}"
            )
    return Architecture(**found)
