"""Sampling on one rank (other layouts: ``tests/multiproc/test_parallel.py``)."""

import pytest
import torch
from torch import Tensor, nn

from everstep.trainer.sample import generate, logits_at


class NextNumber(nn.Module):
    """Expects token t + 1 after t, whatever comes before; logits (B, L, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.lengths: list[int] = []

    def forward(self, tokens_BL: Tensor) -> Tensor:
        self.lengths.append(tokens_BL.shape[1])
        return nn.functional.one_hot((tokens_BL + 1) % 8, 8) * self.scale


def test_the_likeliest_tokens_follow_the_prompt() -> None:
    model = NextNumber()
    assert generate(logits_at(model), [5], 6, 0.0, 0, 4) == [5, 6, 7, 0, 1, 2, 3]
    assert set(model.lengths) == {4}
    assert model.training


def test_the_window_grows_in_steps_up_to_the_sequence_length() -> None:
    model = NextNumber()
    generate(logits_at(model), [0] * 60, 100, 0.0, 0, 150)
    assert sorted(set(model.lengths)) == [64, 128, 150]


def test_the_seed_decides_and_ids_beyond_the_tokenizer_are_never_drawn() -> None:
    drawn = [
        generate(logits_at(NextNumber()), [2], 40, 5.0, seed, 8, vocab_size=5) for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert max(drawn[0]) == 4


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(logits_at(NextNumber()), [], 1, 0.0, 0, 4)
