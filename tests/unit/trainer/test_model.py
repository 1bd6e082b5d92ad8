"""The decoder against a slow reference; its names, sizes and user factories."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from everstep.trainer.config import ModelConfig
from everstep.trainer.errors import ConfigError
from everstep.trainer.init import materialise
from everstep.trainer.model import Llama, build_model, logits_of, same_document
from everstep.trainer.model_shape import resolve_model, round_up
from tests.support.models import Bigram

Array = NDArray[np.float64]
CONFIG = ModelConfig(dim=16, layers=2, heads=4, kv_heads=2, init_std=0.3, rope_theta=100.0)
SEQ_LEN = 6


def _model(config: ModelConfig = CONFIG, document_end: int | None = None) -> Llama:
    model = build_model(config, vocab_size=50, seq_len=SEQ_LEN, seed=1, document_end=document_end)
    materialise(model, torch.device("cpu"), 1)
    assert isinstance(model, Llama)
    return model


def _reference_logits(model: Llama, tokens: list[int]) -> Array:
    """Logits (L, V) of one sample: loops over positions and heads, in double precision."""
    weights = {name: w.detach().double().numpy() for name, w in model.state_dict().items()}
    shape, width = model.shape, model.shape.head_dim

    def norm(x: Array, name: str) -> Array:
        scale = np.sqrt((x * x).mean(-1, keepdims=True) + model.config.norm_eps)
        return np.asarray(x / scale * weights[f"{name}.weight"])

    def turn(head: Array, position: int) -> Array:
        half = width // 2
        angle = position * model.config.rope_theta ** -(np.arange(half) / half)
        pair = (head[:half] + 1j * head[half:]) * np.exp(1j * angle)
        return np.concatenate((pair.real, pair.imag))

    def attention(x: Array, name: str) -> Array:
        q, k, v = (x @ weights[f"{name}.{part}_proj.weight"].T for part in "qkv")
        out = np.zeros_like(q)
        for head in range(shape.heads):
            group = head // (shape.heads // shape.kv_heads)
            own, shared = (slice(i * width, (i + 1) * width) for i in (head, group))
            for t in range(len(x)):
                query = turn(q[t, own], t)
                keys = np.stack([turn(k[s, shared], s) for s in range(t + 1)])
                score = np.exp(keys @ query / np.sqrt(width))
                out[t, own] = score / score.sum() @ v[: t + 1, shared]
        return np.asarray(out @ weights[f"{name}.o_proj.weight"].T)

    def mlp(x: Array, name: str) -> Array:
        gate, up = (x @ weights[f"{name}.{part}_proj.weight"].T for part in ("gate", "up"))
        return np.asarray(gate / (1 + np.exp(-gate)) * up @ weights[f"{name}.down_proj.weight"].T)

    x = weights["model.embed_tokens.weight"][tokens]
    for index in range(shape.layers):
        layer = f"model.layers.{index}"
        x = x + attention(norm(x, f"{layer}.input_layernorm"), f"{layer}.self_attn")
        x = x + mlp(norm(x, f"{layer}.post_attention_layernorm"), f"{layer}.mlp")
    return np.asarray(norm(x, "model.norm") @ weights["lm_head.weight"].T)


@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_the_reference(tied: bool) -> None:
    model = _model(CONFIG.model_copy(update={"tie_embeddings": tied}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    tokens = [3, 49, 0, 7, 7, 12]
    logits = model(torch.tensor([tokens, tokens[::-1]])).detach().numpy()
    np.testing.assert_allclose(logits[0], _reference_logits(model, tokens), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        logits[1], _reference_logits(model, tokens[::-1]), rtol=1e-4, atol=1e-4
    )


def test_no_token_sees_what_follows() -> None:
    model = _model()
    tokens_BL = torch.randint(0, 50, (1, SEQ_LEN))
    changed_BL = tokens_BL.clone()
    changed_BL[0, 4] = (tokens_BL[0, 4] + 1) % 50
    before, after = model(tokens_BL), model(changed_BL)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_documents_in_a_sample_get_the_logits_that_they_would_have_alone() -> None:
    end = 9
    model = _model(document_end=end)
    samples = [[3, 4, end, 5, 6, 7], [end, end, 8, 1, 2, end]]
    together = model(torch.tensor(samples)).detach()
    alone = [
        [part for document in documents for part in model(torch.tensor([document]))[0].detach()]
        for documents in ([[3, 4, end], [5, 6, 7]], [[end], [end], [8, 1, 2, end]])
    ]
    torch.testing.assert_close(together, torch.stack([torch.stack(row) for row in alone]))
    unmasked = _model()(torch.tensor(samples)).detach()
    assert not torch.allclose(together, unmasked, atol=1e-2)


def test_the_document_mask_in_words() -> None:
    end = 9
    samples = torch.tensor([[1, end, 2, 3, end, 4], [5, 6, 7, 8, 0, 1]])
    for sample, mask_LL in zip(samples.tolist(), same_document(samples, end)[:, 0], strict=True):
        for query in range(len(sample)):
            for key in range(len(sample)):
                same = key <= query and end not in sample[key:query]
                assert mask_LL[query, key] == same


def test_names_are_those_of_hugging_face() -> None:
    model = _model(CONFIG.model_copy(update={"layers": 1}))
    assert sorted(model.state_dict()) == [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.v_proj.weight",
        "model.norm.weight",
    ]


@pytest.mark.parametrize("tied", [False, True])
def test_counted_parameters_are_the_real_ones(tied: bool) -> None:
    model = _model(CONFIG.model_copy(update={"tie_embeddings": tied}))
    assert model.shape.parameters == sum(weight.numel() for weight in model.parameters())


def test_automatic_sizes() -> None:
    shape = resolve_model(ModelConfig(dim=512, heads=8), 257)
    assert (shape.vocab_size, shape.kv_heads, shape.ffn_dim) == (320, 8, 1408)
    assert [round_up(value, 64) for value in (1, 64, 65)] == [64, 64, 128]


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.vocab_size=256 is smaller than the 257 tokens"):
        resolve_model(ModelConfig(vocab_size=256), 257)


def test_dropout_acts_in_training_only_and_needs_sample_indices() -> None:
    model = _model(CONFIG.model_copy(update={"dropout": 0.5}))
    tokens_BL, sample_B = torch.randint(0, 50, (2, SEQ_LEN)), torch.tensor([5, 6])
    first = model(tokens_BL, sample_B)
    assert torch.equal(first, model(tokens_BL, sample_B))
    assert not torch.allclose(first, model(tokens_BL, sample_B + 2))
    with pytest.raises(ValueError, match="needs sample_B"):
        model(tokens_BL)
    model.eval()
    assert torch.equal(model(tokens_BL), _model()(tokens_BL))


def test_a_users_model_is_the_same_on_every_rank() -> None:
    config = ModelConfig(factory="tests.support.models:bigram", factory_args={"width": 8})
    first, again = (build_model(config, vocab_size=20, seq_len=4, seed=3) for _ in range(2))
    assert isinstance(first, Bigram)
    tokens_BL = torch.arange(4)[None]
    assert torch.equal(logits_of(first, tokens_BL, None), logits_of(again, tokens_BL, None))
    assert logits_of(first, tokens_BL, torch.tensor([0])).shape == (1, 4, 20)


@pytest.mark.parametrize(
    ("factory", "arguments", "message"),
    [
        ("bigram", {}, "is not of the form 'pkg.module:function'"),
        (".models:bigram", {}, "is not of the form 'pkg.module:function'"),
        ("no_such_package:bigram", {}, "cannot be imported .*PYTHONPATH"),
        ("tests.support.models:trigram", {}, "has no callable 'trigram'"),
        ("tests.support.models:NOT_CALLABLE", {}, "has no callable 'NOT_CALLABLE'"),
        ("tests.support.models:bigram", {"depth": 3}, "does not accept its arguments .*depth"),
        ("tests.support.models:no_module", {}, r"returned str, expected a torch.nn.Module"),
        ("tests.support.models:on_meta", {}, r"on the meta device, .*build the model on the CPU"),
    ],
)
def test_a_bad_factory_is_one_clear_sentence(
    factory: str, arguments: dict[str, int], message: str
) -> None:
    config = ModelConfig(factory=factory, factory_args=arguments)
    with pytest.raises(ConfigError, match=message):
        build_model(config, vocab_size=20, seq_len=4, seed=3)


def test_a_defect_inside_of_a_factory_is_not_taken_for_wrong_arguments() -> None:
    config = ModelConfig(factory="tests.support.models:defective")
    with pytest.raises(TypeError, match="out_features"):
        build_model(config, vocab_size=20, seq_len=4, seed=3)
