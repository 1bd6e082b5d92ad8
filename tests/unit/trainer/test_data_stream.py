"""Batches as a function of the global sample index: layouts, epochs, resume, evaluation."""

import json
import pickle
from collections import Counter
from typing import Any

import numpy as np
import pytest

from everstep.trainer.data import SampleStream, TrainStream, held_out_batches
from everstep.trainer.errors import ConfigError, DataError
from tests.support.corpora import counting_corpus, data_config

SEQ_LEN = 8


def global_batches(
    steps: int, dp_size: int, position: int = 0, tokens: int = 250, **fields: Any
) -> list[np.ndarray]:
    """Per step (global_batch, 1 + 2 * seq_len): sample index, tokens, targets, of all ranks."""
    config = data_config(seq_len=SEQ_LEN, **fields)
    streams = [TrainStream(counting_corpus(tokens), config, 5, r, dp_size) for r in range(dp_size)]
    for stream in streams:
        stream.position = position
    result = []
    for _ in range(steps):
        rows = [
            np.concatenate([batch.sample_B[:, None], batch.tokens_BL, batch.targets_BL], axis=1)
            for stream in streams
            for batch in stream.next_step()
        ]
        result.append(np.concatenate(rows))
    return result


def test_batches_are_the_samples_that_the_index_says() -> None:
    stream = SampleStream(counting_corpus(250).tokens_train, SEQ_LEN, seed=5)
    for step, rows in enumerate(global_batches(20, 1, global_batch=4)):
        assert rows[:, 0].tolist() == list(range(4 * step, 4 * step + 4))
        for row in rows:
            start = stream.window(int(row[0])) * SEQ_LEN
            assert row[1 : 1 + SEQ_LEN].tolist() == list(range(start, start + SEQ_LEN))
            assert row[1 + SEQ_LEN :].tolist() == list(range(start + 1, start + SEQ_LEN + 1))


@pytest.mark.parametrize(("dp_size", "micro"), [(1, 1), (1, 4), (2, 3), (3, "auto"), (12, 1)])
def test_every_layout_sees_the_same_global_batches(dp_size: int, micro: int | str) -> None:
    expected = global_batches(10, 1, global_batch=12)
    got = global_batches(10, dp_size, global_batch=12, micro_batch=micro)
    np.testing.assert_array_equal(got, expected)


def test_micro_batches_have_the_asked_size_and_type() -> None:
    config = data_config(global_batch=12, micro_batch=2)
    batches = TrainStream(counting_corpus(250), config, 0, 1, 2).next_step()
    assert [b.sample_B.tolist() for b in batches] == [[6, 7], [8, 9], [10, 11]]
    for batch in batches:
        assert batch.tokens_BL.shape == batch.targets_BL.shape == (2, SEQ_LEN)
        for array in (batch.tokens_BL, batch.targets_BL, batch.sample_B):
            assert array.dtype == np.int64
            assert array.flags.c_contiguous
            assert array.flags.writeable


def test_every_epoch_reads_everything_once_also_across_a_boundary_in_a_batch() -> None:
    per_epoch = (250 - 1) // SEQ_LEN
    assert per_epoch == 31
    assert per_epoch % 4
    rows = np.concatenate(global_batches(40, 2, global_batch=4))
    starts = rows[:, 1]
    epochs = [starts[e * per_epoch : (e + 1) * per_epoch] for e in range(5)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == [i * SEQ_LEN for i in range(per_epoch)]
    orders = {tuple(epoch.tolist()) for epoch in epochs}
    assert len(orders) == 5


def test_epoch_and_position_count_what_was_handed_out() -> None:
    stream = TrainStream(counting_corpus(250), data_config(global_batch=10), 0, 0, 2)
    seen = []
    for _ in range(7):
        seen.append((stream.position, stream.epoch))
        next(iter(stream))
    assert seen == [(0, 0), (10, 0), (20, 0), (30, 0), (40, 1), (50, 1), (60, 1)]
    assert stream.state_dict()["position"] == 70
    assert stream.state_dict()["epoch"] == 2


@pytest.mark.parametrize(
    ("dp_size", "fields"),
    [(2, {}), (4, {}), (1, {"micro_batch": 2}), (4, {"micro_batch": 1})],
)
def test_resume_is_exact_for_another_layout(dp_size: int, fields: dict[str, Any]) -> None:
    straight = global_batches(20, 2, global_batch=12)
    first = TrainStream(counting_corpus(250), data_config(global_batch=12), 5, 1, 2)
    for _ in range(7):
        first.next_step()
    state = json.loads(json.dumps(first.state_dict()))
    second = TrainStream(
        counting_corpus(250), data_config(global_batch=12, **fields), 5, 0, dp_size
    )
    second.load_state_dict(state)
    resumed = global_batches(13, dp_size, second.position, global_batch=12, **fields)
    np.testing.assert_array_equal(resumed, straight[7:])


def test_another_global_batch_goes_on_with_the_next_sample() -> None:
    before = np.concatenate(global_batches(10, 1, global_batch=6))
    after = np.concatenate(global_batches(10, 1, position=24, global_batch=4))
    np.testing.assert_array_equal(after[:36], before[24:])


def stream_with(state_changes: dict[str, Any] | None = None, **origin: Any) -> tuple[Any, Any]:
    """A stream, and the state of another one that differs in what is given."""
    stream = TrainStream(counting_corpus(250, 30), data_config(), 5, 0, 1)
    state = stream.state_dict() | {"position": 40} | (state_changes or {}) | origin
    return stream, state


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 6}, "seed=6, and this run has seed=5"),
        ({"seq_len": 16}, "data.seq_len=16, and this run has data.seq_len=8"),
        (
            {"digest": "x", "text_digest": "abc", "text": "Python 3.10.1 standard library"},
            "Python 3.10.1 standard library then .digest abc., counting now .digest text.; "
            "restore the original text",
        ),
        ({"digest": "x", "tokenizer_digest": "abc"}, "restore the original tokenizer"),
        ({"digest": "x", "held_out": 0.3}, r"set data\.held_out=0\.3"),
        ({"digest": "x"}, "another version of the tokenizers package"),
        ({"position": -1}, "position is -1, not a number of samples"),
        ({"position": 2.5}, "position is 2.5, not"),
        ({"position": None}, "position is None"),
    ],
)
def test_a_position_in_something_else_is_refused(change: dict[str, Any], says: str) -> None:
    stream, state = stream_with(change)
    with pytest.raises(DataError, match=says) as caught:
        stream.load_state_dict(state)
    assert stream.position == 0
    assert "\n" not in str(caught.value)
    assert "new run" in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_state_of_something_else_is_refused() -> None:
    stream, _ = stream_with()
    with pytest.raises(DataError, match="position is None"):
        stream.load_state_dict({})
    with pytest.raises(DataError, match="seed=None"):
        stream.load_state_dict({"position": 4})


def test_held_out_batches_are_the_same_each_time_on_any_layout() -> None:
    corpus = counting_corpus(250, held_out=400)

    def samples(dp_size: int, **fields: Any) -> list[list[int]]:
        config = data_config(global_batch=4, **fields)
        per_rank = [
            list(held_out_batches(corpus, config, 3, rank, dp_size)) for rank in range(dp_size)
        ]
        rows = {
            int(sample): [*tokens.tolist(), int(targets[-1])]
            for batches in per_rank
            for batch in batches
            for sample, tokens, targets in zip(
                batch.sample_B, batch.tokens_BL, batch.targets_BL, strict=True
            )
        }
        return [rows[sample] for sample in sorted(rows)]

    expected = samples(1)
    assert len(expected) == 12
    starts = [row[0] for row in expected]
    assert len(set(starts)) == 12
    assert starts == sorted(starts)
    assert min(starts) >= 250
    assert max(starts) > 250 + 350, "spread over the whole split"
    assert all(row == list(range(row[0], row[0] + SEQ_LEN + 1)) for row in expected)
    assert samples(1) == samples(2) == samples(4) == samples(1, micro_batch=2) == expected


def test_few_held_out_tokens_make_fewer_batches_or_repeat() -> None:
    config = data_config(global_batch=4)
    ten_samples = counting_corpus(250, held_out=10 * SEQ_LEN + 1)
    assert len(list(held_out_batches(ten_samples, config, 8, 0, 1))) == 2
    three_samples = counting_corpus(250, held_out=3 * SEQ_LEN + 1)
    (batch,) = held_out_batches(three_samples, config, 8, 0, 1)
    assert Counter(batch.tokens_BL[:, 0].tolist()).keys() == {250, 258, 266}
    assert batch.tokens_BL.shape == (4, SEQ_LEN)
    assert list(held_out_batches(three_samples, config, 0, 0, 1)) == []


def test_evaluation_without_held_out_text_names_the_setting() -> None:
    config = data_config(held_out=0.0)
    with pytest.raises(DataError, match=r"data\.held_out=0 keeps 0 tokens of counting"):
        held_out_batches(counting_corpus(250), config, 8, 0, 1)
    with pytest.raises(DataError, match=r"one sample needs data\.seq_len \+ 1 = 9; raise data\.h"):
        held_out_batches(counting_corpus(250, 8), data_config(), 8, 0, 1)


def test_too_little_text_says_how_much_is_needed() -> None:
    config = data_config(global_batch=4)
    TrainStream(counting_corpus(4 * SEQ_LEN + 1), config, 0, 0, 1)
    with pytest.raises(DataError, match=r"has 32 tokens .* data\.seq_len \+ 1 = 33; add text"):
        TrainStream(counting_corpus(4 * SEQ_LEN), config, 0, 0, 1)
    with pytest.raises(DataError, match="8 tokens make no sample"):
        SampleStream(counting_corpus(8).tokens_train, SEQ_LEN, 0)


def test_ranks_that_do_not_fit_are_refused() -> None:
    corpus = counting_corpus(250)
    with pytest.raises(ConfigError, match=r"data\.global_batch=4"):
        TrainStream(corpus, data_config(), 0, 0, 3)
    with pytest.raises(ConfigError, match=r"data\.micro_batch=3"):
        TrainStream(corpus, data_config(micro_batch=3), 0, 0, 1)
    with pytest.raises(DataError, match="no data-parallel rank 2 among 2"):
        TrainStream(corpus, data_config(), 0, 2, 2)
