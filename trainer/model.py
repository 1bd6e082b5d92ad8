"""A Llama-style decoder with the parameter names of Hugging Face's LlamaForCausalLM.

Shape suffixes: B samples, L tokens (this rank's part of the sequence under tensor parallelism),
D width of the residual stream, H heads and K key/value heads (this rank's part), E width of a head,
F hidden width of the MLP, V vocabulary. Nothing here knows how it is parallelised, except that
weights are taken through ``local_weight``.

Source: Touvron et al. 2023 (Llama, Llama 2); grouped-query attention, Ainslie et al. 2023; rotary
positions, Su et al. 2021, in the half-split convention of Hugging Face.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everstep.trainer.config import ModelConfig
from everstep.trainer.dropout import LayoutFreeDropout, TokenKeys, keys_of_layer
from everstep.trainer.errors import ConfigError
from everstep.trainer.factory import load_factory
from everstep.trainer.model_shape import ModelShape, resolve_model
from everstep.trainer.sharded_weights import local_weight

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines (L, E), fp32."""


def same_document(tokens_BL: Tensor, document_end: int) -> Tensor:
    """Which tokens may be attended to, (B, 1, L, L) bool: earlier ones of the same document.

    A token ``document_end`` belongs to the document that it ends. Rotary positions only act
    through their differences, so that a document's logits are those it would have alone.
    """
    is_end_BL = tokens_BL == document_end
    document_BL = is_end_BL.cumsum(1) - is_end_BL.long()
    same_BLL = document_BL[:, :, None] == document_BL[:, None, :]
    return same_BLL.tril()[:, None]


class Linear(nn.Linear):
    """A linear map without bias; under tensor parallelism, this rank's rows or columns of it."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, local_weight(self.weight))


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019) over the last dim, computed in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D), in the type of the input."""
        x32_BLD = x_BLD.float()
        scale_BL1 = torch.rsqrt(x32_BLD.square().mean(-1, keepdim=True) + self.eps)
        return local_weight(self.weight) * (x32_BLD * scale_BL1).to(x_BLD.dtype)


class RotaryTable(nn.Module):
    """Cosines and sines of every position; not saved, ``fill`` computes them."""

    cos_LE: Tensor
    sin_LE: Tensor

    def __init__(self, seq_len: int, head_dim: int, theta: float) -> None:
        super().__init__()
        self._theta = theta
        self.register_buffer("cos_LE", torch.empty(seq_len, head_dim), persistent=False)
        self.register_buffer("sin_LE", torch.empty(seq_len, head_dim), persistent=False)

    def fill(self) -> None:
        """Compute the table, in double precision on the CPU, so that it is the same everywhere."""
        seq_len, head_dim = self.cos_LE.shape
        power = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        angle = torch.arange(seq_len, dtype=torch.float64)[:, None] * self._theta**-power
        self.cos_LE.copy_(angle.cos().repeat(1, 2))
        self.sin_LE.copy_(angle.sin().repeat(1, 2))

    def forward(self, seq_len: int) -> Rotary:
        """The table of the first ``seq_len`` positions."""
        return self.cos_LE[:seq_len], self.sin_LE[:seq_len]


def rotate(x_BHLE: Tensor, rotary: Rotary) -> Tensor:
    """Turn each pair (e, e + E/2) of every head by its position's angle."""
    cos_LE, sin_LE = rotary
    x32_BHLE = x_BHLE.float()
    left, right = x32_BHLE.chunk(2, dim=-1)
    turned_BHLE = torch.cat((-right, left), dim=-1)
    return (x32_BHLE * cos_LE + turned_BHLE * sin_LE).to(x_BHLE.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.q_proj = Linear(shape.dim, shape.heads * shape.head_dim)
        self.k_proj = Linear(shape.dim, shape.kv_heads * shape.head_dim)
        self.v_proj = Linear(shape.dim, shape.kv_heads * shape.head_dim)
        self.o_proj = Linear(shape.heads * shape.head_dim, shape.dim)

    def forward(self, x_BLD: Tensor, rotary: Rotary, mask_B1LL: Tensor | None) -> Tensor:
        """(B, L, D) -> (B, L, D); a partial sum over tp ranks under tensor parallelism.

        ``mask_B1LL`` is ``same_document``; None: every earlier token is attended to.
        """
        q_BHLE = rotate(self._heads(self.q_proj(x_BLD)), rotary)
        k_BKLE = rotate(self._heads(self.k_proj(x_BLD)), rotary)
        v_BKLE = self._heads(self.v_proj(x_BLD))
        grouped = q_BHLE.shape[1] != k_BKLE.shape[1]
        out_BHLE = F.scaled_dot_product_attention(
            q_BHLE,
            k_BKLE,
            v_BKLE,
            attn_mask=mask_B1LL,
            is_causal=mask_B1LL is None,
            enable_gqa=grouped,
        )
        out: Tensor = self.o_proj(out_BHLE.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        """(B, L, heads * E) -> (B, heads, L, E)."""
        heads: Tensor = x.unflatten(-1, (-1, self.head_dim))
        return heads.transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.gate_proj = Linear(shape.dim, shape.ffn_dim)
        self.up_proj = Linear(shape.dim, shape.ffn_dim)
        self.down_proj = Linear(shape.ffn_dim, shape.dim)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D); a partial sum over tp ranks under tensor parallelism."""
        hidden_BLF = F.silu(self.gate_proj(x_BLD)) * self.up_proj(x_BLD)
        out: Tensor = self.down_proj(hidden_BLF)
        return out


class Block(nn.Module):
    """One decoder layer: attention and MLP, each behind a norm and added to the stream."""

    def __init__(self, config: ModelConfig, shape: ModelShape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.dim, config.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.dim, config.norm_eps)
        self.mlp = MLP(shape)
        self.attn_dropout = LayoutFreeDropout(config.dropout, dim=shape.dim, site="self_attn")
        self.mlp_dropout = LayoutFreeDropout(config.dropout, dim=shape.dim, site="mlp")

    def forward(
        self,
        x_BLD: Tensor,
        rotary: Rotary,
        keys_BL: Tensor | None,
        mask_B1LL: Tensor | None = None,
    ) -> Tensor:
        """(B, L, D) -> (B, L, D).

        ``keys_BL`` are the tokens' dropout keys, None for no dropout; ``mask_B1LL`` as in
        ``Attention``.
        """
        attended_BLD = self.self_attn(self.input_layernorm(x_BLD), rotary, mask_B1LL)
        x_BLD = x_BLD + self.attn_dropout(attended_BLD, keys_BL)
        mixed_BLD = self.mlp(self.post_attention_layernorm(x_BLD))
        x_BLD = x_BLD + self.mlp_dropout(mixed_BLD, keys_BL)
        return x_BLD


class TokenContext(nn.Module):
    """What all blocks need to know of a batch besides the stream; nothing of it is saved.

    ``document_end`` is the token that ends a document where attention stays inside of documents.
    """

    def __init__(
        self,
        config: ModelConfig,
        shape: ModelShape,
        *,
        seq_len: int,
        seed: int,
        document_end: int | None,
    ) -> None:
        super().__init__()
        self.rotary = RotaryTable(seq_len, shape.head_dim, config.rope_theta)
        self.token_keys = TokenKeys(seed)
        self.dropout = config.dropout
        self.document_end = document_end

    def forward(
        self, tokens_BL: Tensor, sample_B: Tensor | None
    ) -> tuple[Rotary, Tensor | None, Tensor | None]:
        """Rotary table, dropout keys (None: no dropout) and mask (None: causal) of a batch."""
        seq_len = tokens_BL.shape[1]
        keys_BL = mask_B1LL = None
        if self.training and self.dropout > 0:
            if sample_B is None:
                raise ValueError("dropout in training needs sample_B, the global sample indices")
            keys_BL = self.token_keys(sample_B, seq_len)
        if self.document_end is not None:
            mask_B1LL = same_document(tokens_BL, self.document_end)
        return self.rotary(seq_len), keys_BL, mask_B1LL


def run_blocks(
    x_BLD: Tensor,
    blocks: Iterable[tuple[str, nn.Module]],
    rotary: Rotary,
    keys_BL: Tensor | None,
    mask_B1LL: Tensor | None,
) -> Tensor:
    """The stream (B, L, D) after ``blocks``, each under its number in the whole model."""
    for number, block in blocks:
        block_keys_BL = None if keys_BL is None else keys_of_layer(keys_BL, int(number))
        x_BLD = block(x_BLD, rotary, block_keys_BL, mask_B1LL)
    return x_BLD


class Decoder(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, config: ModelConfig, shape: ModelShape, context: TokenContext) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.dim)
        self.layers = nn.ModuleList(Block(config, shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.dim, config.norm_eps)
        self.context = context

    def forward(self, tokens_BL: Tensor, sample_B: Tensor | None) -> Tensor:
        """Tokens (B, L) -> normalised stream (B, L, D)."""
        context = self.context(tokens_BL, sample_B)
        x_BLD = run_blocks(self.embed_tokens(tokens_BL), self.layers.named_children(), *context)
        out: Tensor = self.norm(x_BLD)
        return out


class Llama(nn.Module):
    """The decoder with its output head; weights are set by ``init.init_weights``."""

    def __init__(
        self,
        config: ModelConfig,
        shape: ModelShape,
        *,
        seq_len: int,
        seed: int,
        document_end: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.shape = shape
        self.seq_len = seq_len
        context = TokenContext(config, shape, seq_len=seq_len, seed=seed, document_end=document_end)
        self.model = Decoder(config, shape, context)
        self.lm_head = Linear(shape.dim, shape.vocab_size)
        self.stages: list[nn.Module] = []
        """This rank's pipeline stages, in order, once ``stage.split_model`` has cut the model."""
        self.tie()

    def tie(self) -> None:
        """Make the output head share the embedding's parameter, if the configuration says so."""
        if self.config.tie_embeddings and hasattr(self, "lm_head"):
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def roots(self) -> list[nn.Module]:
        """What computes, and together holds every parameter: the stages, or the whole model."""
        return self.stages or [self]

    def forward(self, tokens_BL: Tensor, sample_B: Tensor | None = None) -> Tensor:
        """Tokens (B, L) -> logits (B, L, V); a DTensor cut along V under tensor parallelism.

        ``sample_B`` are the global indices of the samples, which decide the dropout in training;
        raises ValueError if they are missing there.
        """
        logits_BLV: Tensor = self.lm_head(self.model(tokens_BL, sample_B))
        return logits_BLV


def build_model(
    config: ModelConfig,
    *,
    vocab_size: int,
    seq_len: int,
    seed: int,
    document_end: int | None = None,
) -> nn.Module:
    """The model of a run, before it is parallelised.

    ``vocab_size`` is the tokenizer's; with ``document_end``, its token for the end of a document,
    attention of the built-in model stays inside of documents. The built-in model comes without
    memory, on the meta device (``parallelize``, then ``init.materialise``); a model of
    ``config.factory`` comes as its factory made it, on the CPU, after torch was seeded with
    ``seed``, hence alike on every rank.
    Raises ConfigError for a factory that cannot be imported, called, or returns something else.
    """
    if config.factory is not None:
        return _user_model(config.factory, config.factory_args, vocab_size, seq_len, seed)
    shape = resolve_model(config, vocab_size)
    with torch.device("meta"):
        return Llama(config, shape, seq_len=seq_len, seed=seed, document_end=document_end)


def logits_of(model: nn.Module, tokens_BL: Tensor, sample_B: Tensor | None) -> Tensor:
    """Logits (B, L, V) of the built-in model or of a user's, which takes tokens only."""
    logits_BLV: Tensor = (
        model(tokens_BL, sample_B) if isinstance(model, Llama) else model(tokens_BL)
    )
    return logits_BLV


def _user_model(
    factory: str, arguments: dict[str, Any], vocab_size: int, seq_len: int, seed: int
) -> nn.Module:
    make = load_factory(factory, "model.factory")
    torch.manual_seed(seed)
    try:
        model = make(**{"vocab_size": vocab_size, "seq_len": seq_len} | arguments)
    except TypeError as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
            raise  # not the call itself: a defect inside of it, whose traceback is needed
        raise ConfigError(
            f"model.factory={factory!r} does not accept its arguments ({error}): it is called with "
            f"vocab_size, seq_len and the keys of model.factory_args {sorted(arguments)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model.factory={factory!r} returned {type(model).__name__}, expected a torch.nn.Module"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigError(
            f"model.factory={factory!r} returned parameters on the meta device, which have no "
            "values: build the model on the CPU"
        )
    return model
