"""Any sequence of layouts reads exactly the samples that one rank would have read."""

import itertools
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.trainer.data import SampleStream, TrainStream, held_out_batches
from tests.support.corpora import counting_corpus, data_config

# (ranks, micro batches per rank, samples per micro batch) of one attempt to run a job.
LAYOUTS = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=60, deadline=None)
@given(
    seq_len=st.integers(2, 9),
    left_over=st.integers(0, 8),
    spare_samples=st.integers(0, 40),
    seed=st.integers(0, 2**63 - 1),
    attempts=st.lists(st.tuples(LAYOUTS, st.integers(0, 5)), min_size=1, max_size=4),
)
def test_restarts_on_other_layouts_read_the_same_samples(
    seq_len: int,
    left_over: int,
    spare_samples: int,
    seed: int,
    attempts: list[tuple[tuple[int, int, int], int]],
) -> None:
    largest_batch = max(dp * n_micro * micro for (dp, n_micro, micro), _ in attempts)
    per_epoch = largest_batch + spare_samples
    corpus = counting_corpus(per_epoch * seq_len + 1 + left_over % seq_len)
    state = None
    seen: list[int] = []
    rows: list[list[int]] = []
    for (dp_size, n_micro, micro), steps in attempts:
        config = data_config(
            seq_len=seq_len, global_batch=dp_size * n_micro * micro, micro_batch=micro
        )
        streams = [TrainStream(corpus, config, seed, rank, dp_size) for rank in range(dp_size)]
        for stream in streams:
            if state is not None:
                stream.load_state_dict(state)
        for _ in range(steps):
            for batch in itertools.chain.from_iterable(stream.next_step() for stream in streams):
                np.testing.assert_array_equal(batch.targets_BL, batch.tokens_BL + 1)
                seen += batch.sample_B.tolist()
                rows += batch.tokens_BL.tolist()
        states = [stream.state_dict() for stream in streams]
        assert states == [states[0]] * dp_size
        state = states[0]
    assert seen == list(range(len(seen)))
    reference = SampleStream(corpus.tokens_train, seq_len, seed)
    assert reference.samples_per_epoch == per_epoch
    if seen:
        np.testing.assert_array_equal(rows, reference.batch(np.array(seen))[:, :-1])
    for epoch in range(len(seen) // per_epoch):
        starts = Counter(row[0] for row in rows[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert starts == Counter(range(0, per_epoch * seq_len, seq_len))


@settings(max_examples=60, deadline=None)
@given(
    seq_len=st.integers(2, 9),
    held_out=st.integers(0, 300),
    layout=LAYOUTS,
    n_batches=st.integers(0, 6),
)
def test_evaluation_is_even_and_the_same_on_every_layout(
    seq_len: int, held_out: int, layout: tuple[int, int, int], n_batches: int
) -> None:
    dp_size, n_micro, micro = layout
    corpus = counting_corpus(1000, held_out=held_out + seq_len + 1)
    config = data_config(seq_len=seq_len, global_batch=dp_size * n_micro * micro, micro_batch=micro)
    on_ranks = [
        list(held_out_batches(corpus, config, n_batches, rank, dp_size)) for rank in range(dp_size)
    ]
    alone = data_config(seq_len=seq_len, global_batch=config.global_batch)
    on_one = list(held_out_batches(corpus, alone, n_batches, 0, 1))
    assert {len(batches) for batches in on_ranks} == {len(on_one) * n_micro}
    got = {
        int(sample): row.tolist()
        for batch in itertools.chain.from_iterable(on_ranks)
        for sample, row in zip(batch.sample_B, batch.tokens_BL, strict=True)
    }
    expected = [row.tolist() for batch in on_one for row in batch.tokens_BL]
    assert [got[sample] for sample in sorted(got)] == expected
    times = Counter(row[0] for row in expected)
    assert not times or max(times.values()) - min(times.values()) <= 1
    available = (held_out + seq_len) // seq_len
    assert available < config.global_batch or set(times.values()) <= {1}
