"""Whatever is asked of it, in whatever order: a prefetched stream is the stream."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.trainer.data import TrainStream
from everstep.trainer.data.prefetch import BatchStream, prefetched
from tests.support.corpora import counting_corpus, data_config

ACTIONS = st.lists(
    st.one_of(
        st.just("next"),
        st.just("next"),
        st.just("save"),
        st.just("restart"),
        st.integers(0, 5),  # restore: which of the saved states
    ),
    max_size=25,
)


def _assert_alike(plain: BatchStream, ahead: BatchStream) -> None:
    for mine, other in zip(plain.next_step(), ahead.next_step(), strict=True):
        np.testing.assert_array_equal(mine.tokens_BL, other.tokens_BL)
        np.testing.assert_array_equal(mine.targets_BL, other.targets_BL)
        np.testing.assert_array_equal(mine.sample_B, other.sample_B)


@settings(max_examples=80, deadline=None)
@given(
    actions=ACTIONS,
    steps=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    micro_batch=st.sampled_from([1, 2, 4]),
    dp_rank=st.integers(0, 1),
)
def test_any_use_gives_the_sequence_of_the_stream(
    actions: list[str | int], steps: list[int], micro_batch: int, dp_rank: int
) -> None:
    corpus = counting_corpus(30 * 8 + 1)
    config = data_config(global_batch=8, micro_batch=micro_batch)

    def stream() -> TrainStream:
        return TrainStream(corpus, config, 5, dp_rank, 2)

    plain = stream()
    saved = [plain.state_dict()]
    attempt = 0
    context = prefetched(stream(), steps[0])
    ahead = context.__enter__()
    try:
        for action in actions:
            if action == "next":
                _assert_alike(plain, ahead)
            elif action == "save":
                assert ahead.state_dict() == plain.state_dict()
                saved.append(ahead.state_dict())
            elif action == "restart":  # another process, with another setting
                state = ahead.state_dict()
                context.__exit__(None, None, None)
                attempt += 1
                context = prefetched(stream(), steps[attempt % len(steps)])
                ahead = context.__enter__()
                ahead.load_state_dict(state)
            else:
                assert isinstance(action, int)
                state = saved[action % len(saved)]
                plain.load_state_dict(state)
                ahead.load_state_dict(state)
            assert ahead.position == plain.position
        _assert_alike(plain, ahead)
        assert ahead.state_dict() == plain.state_dict()
    finally:
        context.__exit__(None, None, None)
