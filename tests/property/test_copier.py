"""Whatever is copied in the background, it is what a gather of each fragment would have copied."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.checkpoint.copier import Copier
from tests.support.copy_sources import random_sources


@given(
    seed=st.integers(0, 1 << 32),
    fragments=st.integers(0, 12),
    items=st.integers(2, 3000),
    block_bytes=st.sampled_from([1, 64, 1000, 4096, 40_000]),
    threads=st.integers(1, 3),
    helps=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_random_boxes_are_copied_as_they_are_gathered(
    seed: int, fragments: int, items: int, block_bytes: int, threads: int, helps: bool
) -> None:
    sources = random_sources(
        seed,
        fragments=fragments,
        items=items if block_bytes > 1 else 20,
        block_bytes=block_bytes,
    )
    data, crcs = sources.empty_target()
    with Copier(threads) as pool:
        job = pool.start(sources.plan(), sources.addresses, data, crcs)
        if helps:
            job.help()
        else:
            assert job.wait(60)
    assert job.done
    assert job.copied_bytes == sources.data_bytes
    expected_data, expected_crcs = sources.expected()
    np.testing.assert_array_equal(data, expected_data)
    np.testing.assert_array_equal(crcs, expected_crcs)
