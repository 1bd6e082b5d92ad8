"""FLOPs of a step and peaks of devices, against numbers computed by hand."""

import pytest

from everstep.trainer.config import ModelConfig
from everstep.trainer.config_load import load_config
from everstep.trainer.flops import peak_flops_per_s, training_flops_per_token
from everstep.trainer.model_shape import resolve_model


def test_flops_of_a_small_model_by_hand() -> None:
    config = ModelConfig(vocab_size=10, dim=8, layers=3, heads=4, kv_heads=2, ffn_dim=16)
    # per block: q and o 8 x 8, k and v 8 x 4, three MLP matrices 8 x 16; head: 10 x 8
    weights = 3 * (2 * 64 + 2 * 32 + 3 * 128) + 80
    # attention: scores and values, 2 x 2 x (4 heads of 2) x 5 tokens, and twice that backward
    attention = 3 * (2 * 2 * 8 * 5) * 3
    assert training_flops_per_token(resolve_model(config, 10), 5) == 6 * weights + attention


def test_tying_the_embedding_changes_no_flops() -> None:
    sizes = [
        resolve_model(ModelConfig(vocab_size=64, tie_embeddings=tied), 64) for tied in (True, False)
    ]
    assert len({training_flops_per_token(size, 128) for size in sizes}) == 1


def test_the_billion_parameter_config() -> None:
    config = load_config("llama_1b", [])
    size = resolve_model(config.model, 257)
    assert size.parameters == 1_235_814_400
    # tied, so that all parameters but the norms are multiplied; 12 x 16 x 2048 x 4096
    norms = (2 * 16 + 1) * 2048
    expected = 6 * (1_235_814_400 - norms) + 1_610_612_736
    assert training_flops_per_token(size, config.data.seq_len) == expected


@pytest.mark.parametrize(
    ("name", "bf16", "tf32", "fp32"),
    [
        ("NVIDIA A100-SXM4-40GB", 312, 156, 19.5),
        ("NVIDIA A100-SXM4-80GB", 312, 156, 19.5),
        ("NVIDIA A100-PCIE-40GB", 312, 156, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 156, 19.5),
        ("NVIDIA H100 80GB HBM3", 989.4, 494.7, 66.9),
        ("NVIDIA H100 PCIe", 756, 378, 51.2),
        ("NVIDIA H100 NVL", 835.5, 417.5, 60),
        ("NVIDIA GH200 480GB", 989.4, 494.7, 66.9),
        ("NVIDIA H200", 989.4, 494.7, 66.9),
        ("NVIDIA H200 NVL", 835.5, 417.5, 60),
        ("NVIDIA B200", 2250, 1125, 75),
        ("NVIDIA L4", 121, 60, 30.3),
        ("NVIDIA L40S", 362.05, 183, 91.6),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6, 82.6),
        ("AMD Instinct MI300X", 1307.4, 653.7, 163.4),
        ("AMD Instinct MI300X VF", 1307.4, 653.7, 163.4),
    ],
)
def test_peaks_by_name(name: str, bf16: float, tf32: float, fp32: float) -> None:
    assert peak_flops_per_s(name, "bf16", "fp32") == pytest.approx(bf16 * 1e12)
    assert peak_flops_per_s(name, "fp32", "tf32") == pytest.approx(tf32 * 1e12)
    assert peak_flops_per_s(name, "fp32", "fp32") == pytest.approx(fp32 * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA A10",
        "NVIDIA H20",
        "NVIDIA L40",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "Tesla V100-SXM2-16GB",
    ],
)
def test_what_is_not_known_has_no_peak(name: str) -> None:
    assert peak_flops_per_s(name, "bf16", "fp32") is None
