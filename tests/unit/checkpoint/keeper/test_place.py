"""Where keepers are found, and who may go there."""

import os
from pathlib import Path

import pytest

from everstep.checkpoint.errors import KeeperError
from everstep.checkpoint.keeper.place import KeeperPlace, check_job, default_place, jobs_in


def test_the_default(tmp_path: Path) -> None:
    assert default_place({"XDG_RUNTIME_DIR": str(tmp_path)}) == tmp_path / "everstep"
    for value in ("", "relative", str(tmp_path / "missing")):
        assert default_place({"XDG_RUNTIME_DIR": value}) == Path(f"/tmp/everstep-{os.geteuid()}")


@pytest.mark.parametrize("job", ["", ".", "..", "a/b", "a b", "x" * 81, "é", "a\n"])
def test_names_that_are_none(job: str) -> None:
    with pytest.raises(KeeperError, match="cannot name a job"):
        check_job(job)


def test_only_its_user_may_enter(tmp_path: Path) -> None:
    place = KeeperPlace.of("run-1.a_b", tmp_path / "place")
    place.make()
    place.make()
    assert [os.stat(p).st_mode & 0o777 for p in (place.root, place.path)] == [0o700, 0o700]
    assert jobs_in(place.root) == ["run-1.a_b"]
    assert jobs_in(tmp_path / "missing") == []
    place.path.chmod(0o750)
    with pytest.raises(KeeperError, match=r"can be entered by others \(mode 750\): chmod 700"):
        place.connect()


def test_what_others_have_put_there_is_refused(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(0o700)
    (tmp_path / "place").symlink_to(elsewhere)
    with pytest.raises(KeeperError, match="is not a directory of user"):
        KeeperPlace.of("job", tmp_path / "place").make()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    place = KeeperPlace.of("job", tmp_path / "place")
    place.make()
    os.chown(place.root, 65534, 65534)
    with pytest.raises(KeeperError, match="is not a directory of user"):
        place.connect()


def test_long_paths_have_sockets_too(tmp_path: Path) -> None:
    place = KeeperPlace.of("j" * 80, tmp_path / ("d" * 100) / "e")
    place.make()
    with place.listen(), place.connect() as connection:
        assert connection.fileno() >= 0
    with place.listen():  # what the other one has left is removed
        place.connect().close()
    with pytest.raises(ConnectionRefusedError):
        place.connect()


def test_one_lock(tmp_path: Path) -> None:
    place = KeeperPlace.of("job", tmp_path / "place")
    assert not place.is_held()
    place.make()
    lock = place.lock()
    assert lock is not None
    assert place.lock() is None
    assert place.is_held()
    os.close(lock)
    assert not place.is_held()


def test_tokens_are_private(tmp_path: Path) -> None:
    place = KeeperPlace.of("job", tmp_path / "place")
    place.make()
    token = place.make_token()
    assert len(token) == 32
    assert place.make_token() == token
    assert sorted(p.name for p in place.path.iterdir()) == ["token"]
    assert (place.path / "token").stat().st_mode & 0o777 == 0o600
    (place.path / "token").chmod(0o640)
    with pytest.raises(KeeperError, match="only its user can read"):
        place.token()
    place.clear()
    place.clear()
    assert place.make_token() != token
    (place.path / "token").write_bytes(b"short")
    with pytest.raises(KeeperError, match="not a token of 32 bytes"):
        place.token()
