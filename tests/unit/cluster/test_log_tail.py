from pathlib import Path

from everstep.cluster.log_tail import BEFORE_RANKS, MOST_LINES, LogTail

LATER_S = 100.0


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_only_new_lines_are_shown_and_only_whole_ones(tmp_path: Path) -> None:
    log = tmp_path / "rank-00000.log"
    append(log, "of an earlier run\n")
    tail = LogTail({0: log}, world_size=1)
    assert tail.take(0.0) == []
    append(log, "one\ntw")
    assert tail.take(1.0) == ["one"]
    append(log, "o\nthr")
    assert tail.take(2.0) == ["two"]
    assert tail.take(3.0, rest=True) == ["thr"]


def test_logs_may_appear_later_and_hold_anything(tmp_path: Path) -> None:
    log = tmp_path / "rank-00000.log"
    tail = LogTail({0: log}, world_size=1)
    assert tail.take(0.0) == []
    log.write_bytes(b"caf\xe9 \xff\n")
    assert tail.take(1.0) == ["caf\ufffd \ufffd"]


def test_the_same_from_several_ranks_is_one_line(tmp_path: Path) -> None:
    logs = {rank: tmp_path / f"{rank}.log" for rank in range(2)}
    tail = LogTail(logs, world_size=2)
    for path in logs.values():
        append(path, "hello\n")
    append(logs[1], "mine\n")
    assert tail.take(0.0) == ["[all ranks] hello"]
    assert tail.take(LATER_S) == ["[rank 1] mine"]


def test_what_comes_before_ranks_has_no_label(tmp_path: Path) -> None:
    start = tmp_path / "start.log"
    tail = LogTail({BEFORE_RANKS: start, 0: tmp_path / "0.log", 1: tmp_path / "1.log"}, 2)
    append(start, "importing\n")
    assert tail.take(0.0, rest=True) == ["importing"]


def test_a_flood_is_cut(tmp_path: Path) -> None:
    log = tmp_path / "0.log"
    tail = LogTail({0: log}, world_size=1)
    append(log, "".join(f"line {number}\n" for number in range(MOST_LINES + 50)))
    lines = tail.take(0.0)
    assert lines[-1] == f"... and 50 more lines in {tmp_path}"
    assert len(lines) == MOST_LINES + 1
