"""Mixtures: the fast choice against counting one by one, shares that never drift, exact resume."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.trainer.data import Corpus, CorpusPart, TrainStream, held_out_batches
from everstep.trainer.data.mixture import SHARE_BITS, Mixture, cumulative_shares, seed_of_source
from everstep.trainer.data.permutation import permute
from everstep.trainer.data.tokenizer import BytesTokenizer
from everstep.trainer.errors import DataError
from tests.support.corpora import data_config

WEIGHTS = st.lists(
    st.one_of(st.floats(0.01, 100.0), st.integers(1, 50).map(float)), min_size=1, max_size=6
)


def choose_slowly(
    weights: list[float], seed: int, samples: int, block: int
) -> list[tuple[int, int]]:
    """(source, how many of it came before) of the first samples, counted one after the other."""
    bounds = [Fraction(int(bound), 2**SHARE_BITS) for bound in cumulative_shares(weights)]
    taken = [0] * len(weights)
    chosen: list[tuple[int, int]] = []
    for number in range(-(-samples // block)):
        slots = []
        for source in range(len(weights)):
            counts = [
                (end * block * b // 1) - (start * block * b // 1)
                for b in (number, number + 1)
                for start, end in [(bounds[source], bounds[source + 1])]
            ]
            for _ in range(counts[1] - counts[0]):
                slots.append((source, taken[source]))
                taken[source] += 1
        assert len(slots) == block
        order = permute(
            np.arange(block), np.full(block, number), block, (seed ^ 0x6D69787475726531) % 2**63
        )
        chosen += [slots[slot] for slot in order.tolist()]
    return chosen[:samples]


@settings(max_examples=40, deadline=None)
@given(weights=WEIGHTS, seed=st.integers(0, 2**63 - 1), samples=st.integers(1, 5000))
def test_the_fast_choice_is_the_slow_one(weights: list[float], seed: int, samples: int) -> None:
    mixture = Mixture(weights, seed)
    sources, indices = mixture.choose(np.arange(samples))
    expected = choose_slowly(weights, seed, samples, mixture.block)
    assert list(zip(sources.tolist(), indices.tolist(), strict=True)) == expected


@settings(max_examples=60, deadline=None)
@given(weights=WEIGHTS, seed=st.integers(0, 2**63 - 1), first_block=st.integers(0, 2**40))
def test_shares_never_drift(weights: list[float], seed: int, first_block: int) -> None:
    """Also far into a run, where only the indices tell how often each source was drawn."""
    mixture = Mixture(weights, seed)
    start = first_block * mixture.block
    sources, indices = mixture.choose(np.arange(start, start + 4 * mixture.block))
    total = sum(map(Fraction, weights))
    for source, weight in enumerate(weights):
        own = sorted(indices[sources == source].tolist())
        share = Fraction(weight) / total
        assert own
        assert own == list(range(own[0], own[0] + len(own)))
        # Exact for the share as it is stored; that differs from the weight by 2**-SHARE_BITS.
        assert abs(own[0] - share * start) <= 1 + start * Fraction(1, 2**SHARE_BITS)
        assert abs(len(own) - share * 4 * mixture.block) <= 2


@given(weights=WEIGHTS, samples=st.integers(0, 10_000))
def test_quotas_add_up(weights: list[float], samples: int) -> None:
    quotas = Mixture(weights, 0).quotas(samples)
    assert sum(quotas) == samples
    for quota, weight in zip(quotas, weights, strict=True):
        assert abs(quota - samples * weight / sum(weights)) <= 1.001


def test_only_ratios_matter() -> None:
    samples = np.arange(3000)
    for one, other in zip(
        Mixture([1, 2], 5).choose(samples), Mixture([50, 100], 5).choose(samples), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert Mixture([3, 1], 0).shares == [0.75, 0.25]
    assert Mixture([7], 0).shares == [1.0]


def test_small_weights() -> None:
    mixture = Mixture([1e-5, 1], 3)
    assert mixture.block * 1e-5 > 1
    sources, _ = mixture.choose(np.arange(10 * mixture.block))
    assert abs(int((sources == 0).sum()) - 10 * mixture.block * 1e-5) < 1.01
    for weights in ([1e-7, 1], [1, 1e-30, 1]):
        with pytest.raises(DataError, match=r"the weights .* less than a millionth .*; raise its"):
            Mixture(weights, 0)


def test_sources_have_shuffles_of_their_own() -> None:
    seeds = [seed_of_source(seed, source) for seed in (0, 1) for source in range(5)]
    assert len(set(seeds)) == 10
    assert seed_of_source(2**63 - 1, 0) == 2**63 - 1
    assert all(0 <= seed_of_source(2**63 - 1, source) < 2**63 for source in range(9))


def mixed_corpus(sizes: list[int], weights: list[float], held_out: int = 0) -> Corpus:
    """Part p has the tokens p * 10**6, p * 10**6 + 1, ...: a batch tells where it was cut."""
    parts = []
    for number, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        row = np.arange(size + held_out, dtype=np.uint32) + number * 10**6
        parts.append(
            CorpusPart(
                name=f"part {number}",
                weight=weight,
                tokens_train=row[:size],
                tokens_held_out=row[size:],
                digest=f"{number} {size}",
                text_digest=f"text {number}",
                documents=1,
                text_bytes=size,
            )
        )
    return Corpus(parts=tuple(parts), tokenizer_digest="t", tokenizer=BytesTokenizer())


@settings(max_examples=40, deadline=None)
@given(
    per_epoch=st.lists(st.integers(1, 60), min_size=2, max_size=4),
    seed=st.integers(0, 2**63 - 1),
    data=st.data(),
    attempts=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 20)), min_size=1, max_size=4),
)
def test_restarts_on_other_layouts_read_the_same_mixture(
    per_epoch: list[int], seed: int, data: st.DataObject, attempts: list[tuple[int, int]]
) -> None:
    weights = data.draw(
        st.lists(st.floats(0.1, 9), min_size=len(per_epoch), max_size=len(per_epoch))
    )
    seq_len = 4
    corpus = mixed_corpus([4 * n + 1 for n in per_epoch], weights)
    largest = sum(per_epoch)
    state = None
    rows: list[list[int]] = []
    for dp_size, steps in attempts:
        if dp_size > largest:
            continue
        config = data_config(seq_len=seq_len, global_batch=dp_size)
        streams = [TrainStream(corpus, config, seed, rank, dp_size) for rank in range(dp_size)]
        for stream in streams:
            if state is not None:
                stream.load_state_dict(state)
        for _ in range(steps):
            for stream in streams:
                (batch,) = stream.next_step()
                np.testing.assert_array_equal(batch.targets_BL, batch.tokens_BL + 1)
                rows += batch.tokens_BL.tolist()
        state = streams[0].state_dict()
    alone = TrainStream(corpus, data_config(seq_len=seq_len, global_batch=1), seed, 0, 1)
    expected = [alone.next_step()[0].tokens_BL[0].tolist() for _ in rows]
    assert rows == expected
    for number, count in enumerate(per_epoch):
        starts = [row[0] % 10**6 for row in rows if row[0] // 10**6 == number]
        times = Counter(starts)
        # Inside of a block of samples the order is shuffled, so an epoch may overlap the next.
        assert set(times) <= set(range(0, 4 * count, 4))


def test_each_part_runs_through_epochs_of_its_own() -> None:
    corpus = mixed_corpus([4 * 100 + 1, 4 * 300 + 1], [1, 1])
    stream = TrainStream(corpus, data_config(seq_len=4, global_batch=64), 9, 0, 1)
    assert stream.samples_per_epoch == 400
    rows = np.concatenate([stream.next_step()[0].tokens_BL for _ in range(4 * 16 * 300 // 64)])
    first = rows[rows[:, 0] < 10**6, 0]
    second = rows[rows[:, 0] >= 10**6, 0]
    # 19,200 samples: 18.75 blocks of 1,024; in whole blocks the shares are exact
    assert abs(first.size - 9600) <= 32
    counts = Counter(first.tolist())
    assert set(counts) == set(range(0, 400, 4))
    assert set(Counter((second - 10**6).tolist())) == set(range(0, 1200, 4))
    assert max(counts.values()) - min(counts.values()) <= 11


@settings(max_examples=40, deadline=None)
@given(
    available=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    data=st.data(),
    dp_size=st.integers(1, 3),
    n_batches=st.integers(1, 6),
)
def test_evaluation_follows_the_weights(
    available: list[int], data: st.DataObject, dp_size: int, n_batches: int
) -> None:
    weights = data.draw(
        st.lists(st.floats(0.1, 9), min_size=len(available), max_size=len(available))
    )
    parts = [
        mixed_corpus([9], [w], held_out=4 * n + 1).parts[0]
        for n, w in zip(available, weights, strict=True)
    ]
    corpus = Corpus(parts=tuple(parts), tokenizer_digest="t", tokenizer=BytesTokenizer())
    config = data_config(seq_len=4, global_batch=6)
    got: dict[int, list[int]] = {}
    for rank in range(dp_size):
        for batch in held_out_batches(corpus, config, n_batches, rank, dp_size):
            got |= dict(zip(batch.sample_B.tolist(), batch.tokens_BL.tolist(), strict=True))
    alone = held_out_batches(corpus, config, n_batches, 0, 1)
    expected = [row for batch in alone for row in batch.tokens_BL.tolist()]
    assert [got[sample] for sample in sorted(got)] == expected
    assert len(expected) % 6 == 0
    assert 1 <= len(expected) // 6 <= n_batches


def test_what_resuming_another_mixture_says() -> None:
    config = data_config(seq_len=4, global_batch=4)

    def stream(sizes: list[int], weights: list[float]) -> TrainStream:
        return TrainStream(mixed_corpus(sizes, weights), config, 0, 0, 1)

    saved = stream([101, 201], [1, 2]).state_dict()
    stream([101, 201], [10, 20]).load_state_dict(saved)
    for other, says in [
        (stream([101, 201], [1, 3]), r"weights of data.source were 1, 2 when .* are 1, 3 now"),
        (
            stream([101, 201, 301], [1, 2, 1]),
            "a mixture of 2 sources .* a mixture of 3 sources",
        ),
        (stream([101], [1]), r"a mixture of 2 sources in data.source and has one source now"),
    ]:
        with pytest.raises(DataError, match=says) as caught:
            other.load_state_dict(saved)
        assert "new run directory" in str(caught.value)
        assert other.position == 0
    moved = saved | {"digest": "x"}
    moved["sources"] = [dict(saved["sources"][0], text_digest="abc"), saved["sources"][1]]
    with pytest.raises(DataError, match=r"data.source\[0\] \(part 0\) is not the source that"):
        stream([101, 201], [1, 2]).load_state_dict(moved)
