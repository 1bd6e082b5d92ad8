"""Layout-free dropout against a slow reference, and as a random number generator."""

import hashlib

import numpy as np
import pytest
import torch
from torch import Tensor

from everstep.trainer.dropout import LayoutFreeDropout, TokenKeys, keys_of_layer

MASK = 0xFFFFFFFF


def _key(number: int, name: str) -> int:
    text = f"everstep dropout {name} {number}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "little")


def _scramble(x: int) -> int:
    x = (x ^ (x >> 16)) * 0x7FEB352D & MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & MASK
    return x ^ (x >> 16)


def _signed_shift(x: int, by: int) -> int:
    return ((x - (1 << 32) if x >> 31 else x) >> by) & MASK


def _keep_reference(
    seed: int, layer: int, site: str, sample: int, position: int, channel: int, p: float
) -> bool:
    """One element of the mask, in Python integers."""
    token = _scramble(_scramble(_key(seed, "tokens") ^ (sample >> 32)) ^ (sample & MASK))
    token = _scramble(_scramble(token ^ position) ^ _key(layer, "layer"))
    row = _scramble(token ^ _key(0, site))
    x = row ^ _scramble((channel // 2) ^ (~_key(0, site) & MASK))
    x = x * 0x9E3779B1 & MASK
    x ^= _signed_shift(x, 16)
    x = x * 0x85EBCA77 & MASK
    x ^= _signed_shift(x, 15)
    x = x * 0xC2B2AE3D & MASK
    half = x >> 16 if channel % 2 else x & 0xFFFF
    return (half - (1 << 16) if half >> 15 else half) >= round(p * 65536) - 32768


def _keys(seed: int, samples: list[int], seq_len: int, layer: int = 0) -> Tensor:
    return keys_of_layer(TokenKeys(seed)(torch.tensor(samples), seq_len), layer)


def test_mask_equals_reference() -> None:
    samples = [0, 7, 2**31 + 5, 2**40 + 3]
    keys_BL = _keys(11, samples, 3, layer=2)
    keep = LayoutFreeDropout(0.3, dim=6, site="mlp").keep(keys_BL)
    expected = [
        [
            [_keep_reference(11, 2, "mlp", sample, position, d, 0.3) for d in range(6)]
            for position in range(3)
        ]
        for sample in samples
    ]
    assert keep.tolist() == expected


def test_any_slice_of_batch_and_sequence_has_the_same_mask() -> None:
    dropout = LayoutFreeDropout(0.5, dim=8, site="mlp")
    whole = dropout.keep(_keys(1, [4, 5, 6, 7], 12))
    assert torch.equal(dropout.keep(_keys(1, [6, 7], 12)), whole[2:])
    assert torch.equal(dropout.keep(_keys(1, [4, 5, 6, 7], 12)[:, 8:]), whole[:, 8:])


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_look_independent(p: float) -> None:
    samples = list(range(32))
    mlp = LayoutFreeDropout(p, dim=256, site="mlp")
    masks = [
        mlp.keep(_keys(1, samples, 128)),
        mlp.keep(_keys(2, samples, 128)),
        mlp.keep(_keys(1, samples, 128, layer=1)),
        LayoutFreeDropout(p, dim=256, site="self_attn").keep(_keys(1, samples, 128)),
    ]
    flat = [(mask.numpy().reshape(-1, 256) - (1 - p)) / np.sqrt(p * (1 - p)) for mask in masks]
    score = flat[0]
    tokens, channels = score.shape
    # Each sum below is a standard normal variate if the elements are independent.
    assert abs(score.sum()) < 4 * np.sqrt(score.size)
    assert np.abs(score.sum(0)).max() < 5 * np.sqrt(tokens)
    assert np.abs(score.sum(1)).max() < 7 * np.sqrt(channels)
    pairs = (score.T @ score)[~np.eye(channels, dtype=bool)] / np.sqrt(tokens)
    assert np.abs(pairs).max() < 6
    assert abs(pairs.std() - 1) < 0.02
    rows = score[:1024] @ score[1024:2048].T / np.sqrt(channels)
    assert abs(rows.std() - 1) < 0.02
    for other in flat[1:]:
        assert abs((score * other).sum()) < 4 * np.sqrt(score.size)


def test_kept_activations_are_scaled_and_gradients_follow_the_mask() -> None:
    keys_BL = _keys(3, [0, 1], 5)
    dropout = LayoutFreeDropout(0.25, dim=4, site="mlp")
    x_BLD = torch.randn(2, 5, 4, requires_grad=True)
    out_BLD = dropout(x_BLD, keys_BL)
    factor_BLD = dropout.keep(keys_BL) / (1 - 0.25)
    torch.testing.assert_close(out_BLD, x_BLD * factor_BLD)
    out_BLD.sum().backward()
    torch.testing.assert_close(x_BLD.grad, factor_BLD)


def test_no_keys_or_no_rate_changes_nothing() -> None:
    x_BLD = torch.randn(1, 2, 4)
    assert LayoutFreeDropout(0.5, dim=4, site="mlp")(x_BLD, None) is x_BLD
    assert LayoutFreeDropout(0.0, dim=4, site="mlp")(x_BLD, _keys(0, [0], 2)) is x_BLD


def test_odd_width_is_refused() -> None:
    with pytest.raises(ValueError, match="dim=5 is odd"):
        LayoutFreeDropout(0.5, dim=5, site="mlp")
