"""How ranks agree, and how all of them learn of a failure."""

import pickle
from pathlib import Path
from typing import Any

import pytest

from everstep.checkpoint import errors
from everstep.checkpoint.collective import SingleProcess, agree, describe, on_rank0
from everstep.checkpoint.errors import (
    CheckpointError,
    CollectiveError,
    DirectoryInUseError,
    EverstepError,
    SaveFailedError,
    StepNotFoundError,
)
from tests.support.checkpoints import ThreadCollective, run_threads


def _fail(error: Exception) -> Any:
    raise error


def test_all_ranks_get_all_results() -> None:
    outcomes = run_threads(lambda c: agree(c, "t", lambda: {"rank": c.rank}), 3)
    for outcome in outcomes:
        assert outcome.results == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert (outcome.error, outcome.causes, outcome.rank0_error) == (None, {}, None)


def test_all_ranks_learn_who_failed_and_why() -> None:
    def run(c: ThreadCollective) -> Any:
        return agree(c, "t", lambda: _fail(OSError(28, "No space", "/d")) if c.rank == 1 else None)

    outcomes = run_threads(run, 3)
    assert [o.causes for o in outcomes] == [{1: "No space (/d)"}] * 3
    assert [type(o.error) for o in outcomes] == [type(None), OSError, type(None)]


def test_a_result_that_is_not_json_is_a_failure_of_that_rank() -> None:
    outcomes = run_threads(lambda c: agree(c, "t", lambda: {1, 2} if c.rank else 0), 2)
    assert [list(o.causes) for o in outcomes] == [[1], [1]]


def test_what_means_stop_now_passes_through() -> None:
    with pytest.raises(KeyboardInterrupt):
        agree(SingleProcess(), "t", lambda: _fail(KeyboardInterrupt()))  # type: ignore[arg-type]


def test_rank_0_acts_for_all() -> None:
    called: list[int] = []

    def act(rank: int) -> list[int]:
        called.append(rank)
        return [7]

    assert run_threads(lambda c: on_rank0(c, "t", lambda: act(c.rank)), 3) == [[7]] * 3
    assert called == [0]
    assert on_rank0(SingleProcess(), "t", lambda: None) is None


@pytest.mark.parametrize(
    "error",
    [
        StepNotFoundError("/d", 3, [1, 2]),
        DirectoryInUseError("/d", "process 5"),
        CheckpointError("two words"),
    ],
)
def test_our_errors_are_the_same_on_every_rank(error: Exception) -> None:
    found = run_threads(lambda c: on_rank0(c, "t", lambda: _fail(error)), 2)
    assert [type(e) for e in found] == [type(error)] * 2
    assert [e.args for e in found] == [error.args] * 2
    assert found[0] is error


def test_other_errors_are_described_to_the_other_ranks() -> None:
    found = run_threads(lambda c: on_rank0(c, "t", lambda: _fail(ZeroDivisionError("why"))), 2)
    assert isinstance(found[0], ZeroDivisionError)
    assert type(found[1]) is CheckpointError
    assert str(found[1]) == "ZeroDivisionError: why"


def test_errors_with_facts_that_json_would_change_are_described() -> None:
    error = SaveFailedError(3, {0: "full"})
    found = run_threads(lambda c: on_rank0(c, "t", lambda: _fail(error)), 2)
    assert type(found[1]) is CheckpointError
    assert str(found[1]) == str(error)


def test_ranks_out_of_step() -> None:
    found = run_threads(lambda c: c.exchange(f"tag {c.rank}", b""), 2)
    assert all(isinstance(e, CollectiveError) for e in found)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(28, "No space left on device", "/a/b"), "No space left on device (/a/b)"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (OSError("odd"), "OSError: odd"),
        (ValueError("two\n  lines"), "ValueError: two lines"),
        (KeyError(), "KeyError: "),
        (EverstepError("a clear sentence"), "a clear sentence"),
        (EverstepError(), "EverstepError: "),
    ],
)
def test_one_line_about_an_error(error: Exception, text: str) -> None:
    assert describe(error) == text


ALL_ERRORS: list[EverstepError] = [
    errors.EverstepError("text"),
    errors.CheckpointError("text"),
    errors.DirectoryInUseError("/d", "process 1"),
    errors.LayoutError("text"),
    errors.StateError("text"),
    errors.StateMismatchError("/d", [f"difference {i}" for i in range(9)]),
    errors.DamagedError(Path("/d/f"), "odd"),
    errors.PackHeaderError("/d/f", "odd"),
    errors.PackTruncatedError("/d/f", "short"),
    errors.BlockChecksumError("/d/f", 3, 0x12, 0x34),
    errors.ManifestError("/d/f", "odd"),
    errors.ManifestChecksumError("/d/f", "odd"),
    errors.ManifestVersionError("/d/f", "new"),
    errors.CoverageError("/d/f", "hole"),
    errors.StepNotFoundError("/d", 3, [1, 2]),
    errors.StepExistsError("/d/step"),
    errors.RankFailures(3, {0: "a"}),
    errors.SaveFailedError(3, {0: "full", 2: "full", 1: "broken"}),
    errors.LoadFailedError(3, {0: "odd"}, [1, 2]),
    errors.CollectiveError("text"),
    errors.SlotMemoryError("text"),
    errors.KeeperError("text"),
    errors.SnapshotSkipped(3, "no slot is free"),
    errors.NotRequested("text"),
]


@pytest.mark.parametrize("error", ALL_ERRORS, ids=lambda e: type(e).__name__)
def test_errors_survive_pickling_with_their_facts(error: EverstepError) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert (str(back), vars(back)) == (str(error), vars(error))
    assert "\n" not in str(error)


def test_every_error_is_in_the_list() -> None:
    known = {v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, Exception)}
    assert known == {type(e) for e in ALL_ERRORS}


def test_ranks_with_the_same_cause_are_named_together() -> None:
    text = str(errors.SaveFailedError(3, {0: "full", 2: "full", 1: "broken"}))
    assert text.startswith("saving step 3 failed: ranks 0, 2: full; rank 1: broken. Nothing of it")
    text = str(errors.LoadFailedError(3, {1: "a.pack is damaged: odd"}, [1, 2]))
    assert text.endswith(
        "rank 1: a.pack is damaged: odd. Other checkpoints of this run: 1, 2; resume from one with "
        "--resume STEP"
    )
    assert "--resume" not in str(errors.LoadFailedError(3, {1: "other data"}, [1, 2]))
