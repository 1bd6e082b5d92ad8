"""A model in stages is the same model: its names, its weights, its logits."""

import pytest
import torch
from torch import nn

from everstep.checkpoint.torch_state import named_tensors
from everstep.trainer.config import ModelConfig
from everstep.trainer.init import materialise
from everstep.trainer.model import Llama, build_model
from everstep.trainer.pipeline_plan import split_stages
from everstep.trainer.stage import split_model

SEQ_LEN = 12
CONFIG = ModelConfig(dim=16, layers=5, heads=2, dropout=0.2, vocab_size=64)
TOKENS_BL = torch.arange(2 * SEQ_LEN).reshape(2, SEQ_LEN)
SAMPLE_B = torch.tensor([4, 9])


def _part(tied: bool, rank: int | None, pp: int = 2) -> Llama:
    config = CONFIG.model_copy(update={"tie_embeddings": tied})
    model = build_model(config, vocab_size=64, seq_len=SEQ_LEN, seed=7, document_end=10)
    assert isinstance(model, Llama)
    if rank is not None:
        split_model(model, split_stages(model.shape, SEQ_LEN, 4)[rank::pp])
    materialise(model, torch.device("cpu"), 7)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_ranks_hold_the_tensors_of_the_whole_model_under_its_names(tied: bool) -> None:
    whole = named_tensors(_part(tied, None))
    parts = [named_tensors(_part(tied, rank)) for rank in range(2)]
    assert parts[0].keys() | parts[1].keys() == whole.keys()
    shared = {"model.embed_tokens.weight"} if tied else set()
    assert parts[0].keys() & parts[1].keys() == shared
    for part in parts:
        for name, tensor in part.items():
            assert torch.equal(tensor, whole[name]), name


@pytest.mark.parametrize("tied", [False, True])
def test_stages_one_after_the_other_compute_the_logits(tied: bool) -> None:
    parts = [_part(tied, rank) for rank in range(2)]
    x = TOKENS_BL
    for index in range(4):
        stage: nn.Module = parts[index % 2].stages[index // 2]
        x = stage(x, TOKENS_BL, SAMPLE_B)
    assert torch.equal(x, _part(tied, None)(TOKENS_BL, SAMPLE_B))


def test_a_part_evaluates_as_it_is_told() -> None:
    part = _part(False, 0)
    stage = part.stages[0]
    first = stage(TOKENS_BL, TOKENS_BL, SAMPLE_B)
    assert not torch.equal(first, stage(TOKENS_BL, TOKENS_BL, SAMPLE_B + 1))
    part.eval()
    assert torch.equal(stage(TOKENS_BL, TOKENS_BL), stage(TOKENS_BL, TOKENS_BL, SAMPLE_B))
