"""What ranks on other nodes see of a run directory."""

import os
import threading
import time
from pathlib import Path

import pytest

from everstep.checkpoint.errors import DirectoryInUseError
from everstep.cluster import run_dir as run_dir_module
from everstep.cluster.errors import LaunchError
from everstep.cluster.run_dir import prepare_run_dir
from everstep.cluster.shared_dir import (
    check_token,
    hold_for_rank,
    remove_token,
    wait_for_ranks,
    write_token,
)


def test_a_node_that_sees_the_token_sees_the_directory(tmp_path: Path) -> None:
    check_token(tmp_path, write_token(tmp_path), "n", within_s=0)


def test_a_node_that_sees_another_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"node n does not see .* choose a --run-dir on"):
        check_token(tmp_path, "x", "n", within_s=0)


def test_a_rank_of_an_earlier_job_does_not_begin(tmp_path: Path) -> None:
    earlier = write_token(tmp_path)
    write_token(tmp_path)
    with pytest.raises(LaunchError):
        check_token(tmp_path, earlier, "n", within_s=0)
    remove_token(tmp_path)
    remove_token(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_system_may_show_the_token_late(tmp_path: Path) -> None:
    def later() -> None:
        time.sleep(0.3)
        (tmp_path / ".token").write_text("t")

    thread = threading.Thread(target=later)
    thread.start()
    check_token(tmp_path, "t", "n")
    thread.join()


def test_the_next_job_waits_for_all_ranks(tmp_path: Path) -> None:
    assert wait_for_ranks(tmp_path, 0)
    first, second = hold_for_rank(tmp_path), hold_for_rank(tmp_path)
    assert not wait_for_ranks(tmp_path, 0.1)
    os.close(first)
    assert not wait_for_ranks(tmp_path, 0)
    os.close(second)
    assert wait_for_ranks(tmp_path, 0)


def test_a_directory_whose_ranks_never_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_dir_module, "ENDING_S", 0.2)
    held = hold_for_rank(tmp_path)
    with pytest.raises(DirectoryInUseError, match="ranks of it are still there"):
        prepare_run_dir(tmp_path, "")
    os.close(held)
    prepare_run_dir(tmp_path, "").lock.release()
