"""Work of a training step, and what a device could do at most: arithmetic only, no torch.

*Model* FLOPs, as Chowdhery et al. 2022 (PaLM, appendix B) and Narayanan et al. 2021 (Megatron-LM,
section 5.1) count them: what forward and backward of the model need, two per multiply-add,
backward twice forward. Recomputation of activations does not count; attention counts in full,
although half of it is masked. So the numbers compare with published ones.
"""

import re
from dataclasses import dataclass

from everstep.trainer.model_shape import ModelShape

TERA = 10**12


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Dense matrix products of one device, in FLOP/s."""

    bf16: float
    """bf16 inputs, fp32 sums."""
    tf32: float
    """fp32 inputs rounded to TF32."""
    fp32: float
    """Whole fp32."""


def _tera(bf16: float, tf32: float, fp32: float) -> Peak:
    return Peak(bf16=bf16 * TERA, tf32=tf32 * TERA, fp32=fp32 * TERA)


PEAKS: tuple[tuple[str, Peak], ...] = (
    # NVIDIA A100 datasheet (2021), both forms
    (r"NVIDIA A100-\S+", _tera(312, 156, 19.5)),
    (r"NVIDIA A100 80GB PCIe", _tera(312, 156, 19.5)),
    # NVIDIA H100 whitepaper (2022), table 2: SXM5, PCIe
    (r"NVIDIA H100 \d+GB HBM3", _tera(989.4, 494.7, 66.9)),
    (r"NVIDIA H100 PCIe", _tera(756, 378, 51.2)),
    # NVIDIA H100 NVL datasheet (2024): half of its figures, which are with sparsity
    (r"NVIDIA H100 NVL", _tera(835.5, 417.5, 60)),
    # NVIDIA GH200 and H200 datasheets (2024): the chip of the H100 SXM5; NVL as above
    (r"NVIDIA GH200 \d+GB", _tera(989.4, 494.7, 66.9)),
    (r"NVIDIA H200", _tera(989.4, 494.7, 66.9)),
    (r"NVIDIA H200 NVL", _tera(835.5, 417.5, 60)),
    # NVIDIA HGX B200 datasheet (2025): an eighth of the board, without sparsity
    (r"NVIDIA B200", _tera(2250, 1125, 75)),
    # NVIDIA L4 and L40S datasheets (2023), without sparsity
    (r"NVIDIA L4", _tera(121, 60, 30.3)),
    (r"NVIDIA L40S", _tera(362.05, 183, 91.6)),
    # NVIDIA Ada whitepaper (2023), appendix A, with fp32 sums
    (r"NVIDIA GeForce RTX 4090", _tera(165.2, 82.6, 82.6)),
    # AMD Instinct MI300X datasheet (2023)
    (r"AMD Instinct MI300X.*", _tera(1307.4, 653.7, 163.4)),
)
"""(name as the driver gives it, its peak); parts of a device (MIG) and other forms match none."""


def training_flops_per_token(shape: ModelShape, seq_len: int) -> float:
    """Model FLOPs of forward and backward, per token.

    6 for each weight of a matrix that the token is multiplied with (a look-up in the embedding
    table is no product; the head is one, tied or not), and 12 x layers x width of all query heads
    x ``seq_len`` for attention scores and their use.
    """
    weights = shape.layers * shape.layer_matrices + shape.vocab_size * shape.dim
    return 6.0 * weights + 12.0 * shape.layers * shape.heads * shape.head_dim * seq_len


def peak_flops_per_s(device_name: str, precision: str, matmul_precision: str) -> float | None:
    """The most that a device can do; None for one that is not known.

    ``precision`` and ``matmul_precision`` are those of section ``parallel``.
    """
    for pattern, peak in PEAKS:
        if re.fullmatch(pattern, device_name.strip()):
            if precision == "bf16":
                return peak.bf16
            return peak.tf32 if matmul_precision == "tf32" else peak.fp32
    return None
