"""Token loss of plain logits (sharded ones: ``tests/multiproc/test_parallel.py``)."""

import numpy as np
import torch

from everstep.trainer.loss import IGNORED, token_loss_sum


def test_sum_of_negative_log_probabilities_of_counted_tokens() -> None:
    logits_BLV = torch.randn(2, 3, 5, dtype=torch.float64)
    targets_BL = torch.tensor([[0, 4, IGNORED], [2, IGNORED, 1]])
    probabilities = logits_BLV.softmax(-1).numpy()
    expected = -sum(
        np.log(probabilities[b, t, targets_BL[b, t]]) for b, t in [(0, 0), (0, 1), (1, 0), (1, 2)]
    )
    loss = token_loss_sum(logits_BLV, targets_BL)
    assert loss.dtype == torch.float32
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-6)


def test_bf16_logits_are_summed_in_fp32() -> None:
    logits_BLV = torch.zeros(1, 600, 2, dtype=torch.bfloat16)
    loss = token_loss_sum(logits_BLV, torch.zeros(1, 600, dtype=torch.int64))
    np.testing.assert_allclose(loss.item(), 600 * np.log(2), rtol=1e-6)
