import signal
from typing import Any

import pytest

from everstep.cluster.causes import Cause, first_cause, one_line
from everstep.cluster.driver import RankExit

GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]"


def error(
    rank: int, time_s: float, type_name: str = "ValueError", message: str = "boom", **more: Any
) -> dict[str, Any]:
    return {
        "kind": "error",
        "rank": rank,
        "type": type_name,
        "message": message,
        "deliberate": False,
        "traceback_file": f"logs/rank-{rank:05d}.log",
        "time": time_s,
        **more,
    }


def ended(rank: int, time_s: float, code: int) -> RankExit:
    return RankExit(rank=rank, code=code, time_s=time_s)


def cause(errors: list[dict[str, Any]], exits: list[RankExit]) -> Cause:
    found = first_cause(errors, exits)
    assert found is not None
    return found


def test_no_failure_has_no_cause() -> None:
    assert first_cause([], [ended(0, 1, 0), ended(1, 1, 75)]) is None


def test_the_earliest_error_is_first_however_they_arrive() -> None:
    found = cause([error(1, 20.0, message="late"), error(0, 10.0, message="early")], [])
    assert (found.rank, found.others) == (0, (1,))
    assert found.sentence == "rank 0 failed with ValueError: early"
    assert found.traceback_file == "logs/rank-00000.log"


@pytest.mark.parametrize(
    ("type_name", "message"),
    [
        ("RuntimeError", GLOO),
        ("DistBackendError", "NCCL error in: somewhere, remote process exited"),
        ("DistNetworkError", "The client socket has timed out"),
        ("RuntimeError", "Timed out waiting 1800000ms for recv operation to complete"),
        ("ConnectionResetError", "[Errno 104] Connection reset by peer"),
    ],
)
def test_a_lost_peer_is_never_first_if_another_rank_has_a_reason(
    type_name: str, message: str
) -> None:
    lost = error(0, 10.0, type_name, message)
    killed = cause([lost], [ended(0, 10.1, 1), ended(2, 12.0, -signal.SIGKILL)])
    assert (killed.rank, killed.others) == (2, ())
    raised = cause([lost, error(1, 11.0)], [])
    assert raised.rank == 1


def test_only_lost_peers_name_the_first_of_them() -> None:
    found = cause([error(1, 2.0, "RuntimeError", GLOO), error(0, 1.0, "RuntimeError", GLOO)], [])
    assert found.rank == 0
    assert "Connection closed by peer" in found.sentence


def test_an_abort_may_follow_from_a_lost_peer() -> None:
    found = cause([], [ended(0, 1.0, -signal.SIGABRT), ended(1, 2.0, -signal.SIGSEGV)])
    assert found.rank == 1
    assert "SIGSEGV" in found.sentence
    alone = cause([], [ended(0, 1.0, -signal.SIGABRT)])
    assert "rank 0 was killed by signal 6 (SIGABRT), native code gave up" in alone.sentence


def test_an_error_of_ones_own_is_not_taken_for_a_lost_peer() -> None:
    found = cause([error(0, 1.0, message="a peer review"), error(1, 2.0)], [])
    assert found.rank == 0


def test_a_killed_rank_gets_advice() -> None:
    found = cause([], [ended(2, 1.0, -signal.SIGKILL)])
    assert found.sentence.startswith(
        "rank 2 was killed by signal 9 (SIGKILL), often the out-of-memory killer: use a smaller "
    )
    assert found.traceback_file is None


def test_what_the_driver_knows_comes_before_the_code() -> None:
    ends = [RankExit(rank=r, code=-9, time_s=r, why="went down with node x") for r in (2, 3)]
    found = cause([error(0, 0.5, "RuntimeError", GLOO)], ends)
    assert (found.rank, found.alike) == (2, (3,))
    assert found.sentence == "rank 2 went down with node x"


def test_signals_without_a_name_have_a_number() -> None:
    assert "signal 34" in cause([], [ended(0, 1.0, -34)]).sentence


def test_running_out_of_memory_gets_advice() -> None:
    found = cause([error(0, 1.0, "OutOfMemoryError", "CUDA out of memory. Tried 2 GiB.")], [])
    assert "CUDA out of memory. Tried 2 GiB; use a smaller data.micro_batch" in found.sentence


def test_a_full_disk_gets_advice() -> None:
    found = cause([error(0, 1.0, "OSError", "[Errno 28] No space left on device: 'x'")], [])
    assert found.sentence.endswith("on device: 'x'; make room on that disk, and start again")


def test_deliberate_errors_speak_for_themselves() -> None:
    text = "data.source=x: no such file:\n  give one that exists"
    found = cause([error(1, 1.0, "DataError", text, deliberate=True)], [])
    assert found.sentence == "data.source=x: no such file: give one that exists"
    assert found.exit_code == 1


def test_a_wrong_configuration_has_its_exit_code() -> None:
    found = cause([error(0, 1.0, "ConfigError", "bad key", deliberate=True)], [])
    assert found.exit_code == 2


def test_ranks_that_fail_alike_are_one_failure() -> None:
    errors = [error(rank, 5.0 - rank) for rank in range(3)]
    found = cause([*errors, error(3, 9.0, "KeyError", "'x'")], [])
    assert (found.rank, found.alike, found.others) == (2, (0, 1), (3,))


def test_the_exit_after_an_error_adds_nothing() -> None:
    found = cause([error(0, 1.0)], [ended(0, 1.1, 1)])
    assert (found.rank, found.alike, found.others) == (0, (), ())


def test_messages_become_one_line() -> None:
    assert one_line("\n  first  \nsecond") == "first"
    assert one_line("") == ""
    assert len(one_line("x" * 1000)) == 400
    assert cause([error(0, 1.0, "KeyboardInterrupt", "")], []).sentence.endswith("Interrupt")
