"""``everstep train``: what it hands to which launcher, its exit codes, its sentences."""

import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from everstep.checkpoint.errors import EverstepError
from everstep.checkpoint.torch_version import require_torch
from everstep.cli import main
from everstep.trainer.config import RunConfig
from everstep.trainer.config_load import load_config
from tests.support.cli import exit_code as run

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_ID", "CUDA_VISIBLE_DEVICES")


class FakeLaunchers:
    """Stands in for all launchers and notes what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.code = 0
        self.error: Exception | None = None
        self.gpus = 0
        self.again: list[str] = []

    def run_local(
        self, *run: *tuple[RunConfig, Path, str, int, object], launch: Sequence[str]
    ) -> int:
        self.again = list(launch)
        return self._called("local", *run[:-1])

    def run_on_own_ray(
        self,
        *run: *tuple[RunConfig, Path, str, int, object],
        gpus: Sequence[str],
        launch: Sequence[str],
    ) -> int:
        self.again = list(launch)
        return self._called("ray", *run[:-1])

    def run_in_cluster(
        self,
        *run: *tuple[RunConfig, Path, str, str, object],
        plan: Callable[[int], tuple[int, str]],
        launch: Sequence[str],
    ) -> int:
        self.again = list(launch)
        return self._called("cluster", *run[:-1], plan(self.gpus))

    def run_external(self, *run: *tuple[RunConfig, Path, str, object]) -> int:
        return self._called("external", *run[:-1])

    def _called(self, *call: Any) -> int:
        self.calls.append(call)
        if self.error is not None:
            raise self.error
        return self.code


@pytest.fixture
def launchers(monkeypatch: pytest.MonkeyPatch) -> FakeLaunchers:
    fake = FakeLaunchers()
    functions = {
        "run": ["run_local"],
        "external": ["run_external"],
        "ray_run": ["run_on_own_ray", "run_in_cluster"],
    }
    for module, names in functions.items():
        stand_in = types.ModuleType(f"everstep.cluster.{module}")
        for name in names:
            setattr(stand_in, name, getattr(fake, name))
        monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    for name in (*RANK_VARIABLES, "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    install_ray(monkeypatch, False)
    return fake


def install_ray(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    """Make it seem that ray is installed, or not."""
    monkeypatch.setattr("everstep.cluster.ray_address.ray_installed", lambda: installed)


def test_train_starts_the_local_launcher(launchers: FakeLaunchers) -> None:
    assert run("train", "demo", "train.steps=7", "optim.lr=1e-2") == 0
    config = load_config("demo", ["train.steps=7", "optim.lr=1e-2"])
    assert launchers.calls == [("local", config, Path("runs/demo"), "auto", 4)]


def test_several_ranks_go_to_ray_where_it_is_installed(
    launchers: FakeLaunchers, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_ray(monkeypatch, True)
    assert run("train", "demo") == 0
    assert launchers.calls[-1] == ("ray", load_config("demo"), Path("runs/demo"), "auto", 4)
    assert launchers.again == []
    assert run("train", "debug_single") == 0
    assert launchers.calls[-1][0] == "local"
    assert run("train", "debug_single", "--launcher", "ray") == 0
    assert launchers.calls[-1][0] == "ray"
    assert launchers.again == ["--launcher", "ray"]
    assert run("train", "demo", "--launcher", "local") == 0
    assert launchers.calls[-1][0] == "local"
    assert launchers.again == ["--launcher", "local"]


def test_a_cluster_is_joined_by_address(
    launchers: FakeLaunchers, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_ray(monkeypatch, True)
    assert run("train", "debug_single", "--address", "head:6379") == 0
    config = load_config("debug_single", ["launch.address=head:6379"])
    directory = Path("runs/debug_single")
    one = (1, "cpu")
    assert launchers.calls[-1] == ("cluster", config, directory, "auto", "head:6379", one)
    assert run("train", "debug_single", "launch.address=auto") == 0
    assert launchers.calls[-1][4] == "auto"
    monkeypatch.setenv("RAY_ADDRESS", "other:1234")
    assert run("train", "debug_single") == 0
    assert launchers.calls[-1][4] == "other:1234"
    assert run("train", "debug_single", "--launcher", "local") == 0
    assert launchers.calls[-1][0] == "local"


def test_auto_shards_fill_the_gpus_of_the_cluster(
    launchers: FakeLaunchers, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_ray(monkeypatch, True)
    launchers.gpus = 17
    auto = ("demo", "mesh.dp_shard=auto", "--address", "auto")
    assert run("train", *auto) == 0
    assert launchers.calls[-1][5] == (16, "cuda")
    assert run("train", *auto, "parallel.device=cpu", "--nproc", "4") == 0
    assert launchers.calls[-1][5] == (4, "cpu")
    launchers.gpus = 0
    assert run("train", *auto) == 0
    assert launchers.calls[-1][5] == (2, "cpu")


def test_train_passes_options_on(launchers: FakeLaunchers, tmp_path: Path) -> None:
    options = ("--nproc", "2", "--resume", "40", "--run-dir", str(tmp_path))
    assert run("train", "demo", *options, "mesh.dp_shard=auto", "name=other") == 0
    ((_, config, run_dir, resume, world_size),) = launchers.calls
    assert (run_dir, resume, world_size) == (tmp_path, "40", 2)
    assert (config.name, config.mesh.dp_shard) == ("other", "auto")


def test_the_run_directory_is_named_after_the_run(launchers: FakeLaunchers) -> None:
    assert run("train", "demo", "name=mine") == 0
    assert launchers.calls[0][2] == Path("runs/mine")


@pytest.mark.parametrize("code", [0, 1, 75, 130])
def test_the_exit_code_is_that_of_the_run(launchers: FakeLaunchers, code: int) -> None:
    launchers.code = code
    assert run("train", "debug_single") == code


def test_train_under_torchrun(launchers: FakeLaunchers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert run("train", "demo") == 0
    assert launchers.calls == [("external", load_config("demo"), Path("runs/demo"), "auto")]
    assert run("train", "demo", "--launcher", "local") == 0
    assert launchers.calls[1][0] == "local"


def test_a_mesh_that_does_not_fit_torchrun(
    launchers: FakeLaunchers,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert run("train", "demo") == 2
    assert "needs 4 ranks, but there are 3" in capsys.readouterr().err
    assert run("train", "demo", "--nproc", "4") == 2
    assert "--nproc=4 is for the local launcher" in capsys.readouterr().err
    assert launchers.calls == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["demo", "train.stps=1"], "unknown key train.stps; did you mean train.steps?"),
        (["demo", "--nproc", "3"], "needs 4 ranks, but there are 3: start 4 (--nproc 4)"),
        (["demo", "--resume", "latest"], "--resume: got 'latest', expected 'auto' (newest "),
        (["demo", "data.seq_len=255"], "data.seq_len=255 cannot be divided over mesh.tp=2"),
        (["nowhere.yaml"], "no config 'nowhere.yaml': neither a file nor a packaged config"),
        (["demo", "parallel.device=cuda"], "needs a GPU for each, but this host has "),
        (["demo", "--launcher", "ray"], "which is not installed: pip install 'everstep[ray]'"),
        (["demo", "--address", "head:6379"], "which is not installed: pip install "),
        (["demo", "--launcher", "local", "--address", "a:1"], "and --launcher local uses none"),
    ],
)
def test_what_cannot_run_is_one_sentence_and_exit_code_2(
    launchers: FakeLaunchers,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: Sequence[str],
    sentence: str,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run("train", *arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert sentence in output.err
    assert output.err.count("\n") == 1
    assert launchers.calls == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--address", "ray://head:10001"],
            "use everstep submit CONFIG --address http://HEAD:8265",
        ),
        (
            ["--address", "http://head:8265"],
            "use everstep submit CONFIG --address http://HEAD:8265",
        ),
        (["--address", "head"], "launch.address: got 'head', expected 'host:port'"),
        (["--address", "head:0"], "launch.address: got 'head:0', expected 'host:port'"),
        (
            ["parallel.device=cuda", "--launcher", "ray"],
            "needs a GPU for each, but this host has 0",
        ),
        (["--nproc", "3", "--launcher", "ray"], "needs 4 ranks, but there are 3"),
        (["parallel.device=cuda", "--address", "auto"], "but the Ray cluster has 0"),
    ],
)
def test_what_ray_cannot_run_is_one_sentence_and_exit_code_2(
    launchers: FakeLaunchers,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: Sequence[str],
    sentence: str,
) -> None:
    install_ray(monkeypatch, True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run("train", "demo", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert sentence in error
    assert error.count("\n") == 1
    assert launchers.calls == []


def test_an_old_torch_is_told_before_anything_starts(
    launchers: FakeLaunchers,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    require_torch.cache_clear()
    monkeypatch.setattr("everstep.checkpoint.torch_version.torch_version", lambda: "2.4.1")
    assert run("train", "debug_single") == 1
    assert "error: torch 2.4.1 is too old" in capsys.readouterr().err
    assert launchers.calls == []


def test_deliberate_errors_of_a_run_are_one_sentence(
    launchers: FakeLaunchers, capsys: pytest.CaptureFixture[str]
) -> None:
    launchers.error = EverstepError("the disk is full:\nmake room")
    assert run("train", "debug_single") == 1
    assert capsys.readouterr().err == "error: the disk is full: make room\n"


def test_defects_keep_their_traceback(launchers: FakeLaunchers) -> None:
    launchers.error = ZeroDivisionError("a defect")
    with pytest.raises(ZeroDivisionError, match="a defect"):
        main(["train", "debug_single"])
