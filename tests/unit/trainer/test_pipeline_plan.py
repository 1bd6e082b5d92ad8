"""How layers and micro-batches divide over pipeline stages."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.trainer.config import ModelConfig, ParallelConfig, PipelineSchedule
from everstep.trainer.errors import ConfigError
from everstep.trainer.model_shape import resolve_model
from everstep.trainer.pipeline_plan import (
    check_micro_batches,
    count_stages,
    head_in_layers,
    pick_micro_batch,
    split_layers,
    split_stages,
)

SCHEDULES: list[PipelineSchedule] = ["1f1b", "interleaved", "zero_bubble"]


def _slowest(sizes: list[int], head: float) -> float:
    return max([*sizes[:-1], sizes[-1] + head])


@settings(deadline=None, max_examples=200)
@given(stages=st.integers(1, 5), spare=st.integers(0, 6), head=st.floats(0, 5))
def test_no_other_split_is_faster(stages: int, spare: int, head: float) -> None:
    layers = stages + spare
    parts = split_layers(layers, stages, head)
    assert [layer for part in parts for layer in part] == list(range(layers))
    sizes = [len(part) for part in parts]
    assert min(sizes) >= 1
    cuts = itertools.combinations(range(1, layers), stages - 1)
    others = [[end - start for start, end in itertools.pairwise((0, *cut, layers))] for cut in cuts]
    assert _slowest(sizes, head) == min(_slowest(other, head) for other in others)


@pytest.mark.parametrize(
    ("layers", "stages", "head", "sizes"),
    [
        (8, 4, 0.2, [2, 2, 2, 2]),
        (7, 4, 0.2, [2, 2, 2, 1]),
        (6, 4, 0.2, [1, 2, 2, 1]),
        (32, 4, 2.4, [8, 9, 9, 6]),
        (4, 4, 9.0, [1, 1, 1, 1]),
        (3, 1, 1.0, [3]),
    ],
)
def test_the_last_stage_makes_room_for_the_head_and_later_ones_take_more(
    layers: int, stages: int, head: float, sizes: list[int]
) -> None:
    assert [len(part) for part in split_layers(layers, stages, head)] == sizes


def test_a_large_vocabulary_weighs_as_much_as_layers() -> None:
    llama_8b = ModelConfig(
        dim=4096, layers=32, heads=32, kv_heads=8, ffn_dim=14336, vocab_size=128256
    )
    assert head_in_layers(resolve_model(llama_8b, 128256), 8192) == pytest.approx(2.1, abs=0.1)
    spans = split_stages(resolve_model(llama_8b, 128256), 8192, 4)
    assert [len(span.layers) for span in spans] == [8, 9, 9, 6]
    assert [(span.index, span.first, span.last) for span in spans] == [
        (0, True, False),
        (1, False, False),
        (2, False, False),
        (3, False, True),
    ]


def test_stages_per_rank() -> None:
    def stages(pp: int, **parallel: object) -> int:
        return count_stages(ParallelConfig.model_validate(parallel), pp)

    assert [stages(4, pipeline_schedule=name) for name in SCHEDULES] == [4, 8, 8]
    assert stages(2, pipeline_schedule="interleaved", stages_per_rank=3) == 6
    assert stages(1, pipeline_schedule="interleaved") == 1


@pytest.mark.parametrize(
    ("schedule", "per_rank", "pp", "size"),
    [
        ("1f1b", 16, 2, 4),
        ("1f1b", 16, 4, 2),
        ("1f1b", 6, 4, 1),  # not twice as many as ranks, but the most there can be
        ("1f1b", 15, 2, 3),
        ("interleaved", 15, 2, 5),  # 5 or 15 make no equal rounds of 2 or 3
        ("zero_bubble", 12, 2, 3),
    ],
)
def test_automatic_micro_batches_keep_every_rank_busy(
    schedule: PipelineSchedule, per_rank: int, pp: int, size: int
) -> None:
    assert pick_micro_batch(schedule, per_rank, pp) == size
    check_micro_batches(schedule, per_rank // size, pp)


def test_too_few_samples_for_a_pipeline() -> None:
    with pytest.raises(ConfigError, match=r"mesh\.pp=4 needs at least 4 .* but the 3 samples"):
        pick_micro_batch("1f1b", 3, 4)
