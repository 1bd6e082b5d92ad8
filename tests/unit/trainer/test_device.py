"""What a process settles before it uses a GPU; the GPU itself is played by its recorder."""

import os
from collections.abc import Iterator

import pytest
import torch

from everstep.trainer.config import ParallelConfig
from everstep.trainer.device import prepare_device

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG")


@pytest.fixture
def current_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.device]]:
    """A clean process: no variables, torch's defaults; collects the devices that were made current.

    When a device is made current, CUDA starts: the environment must be complete by then.
    """
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    made: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    tf32 = torch.backends.cudnn.allow_tf32
    yield made
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = tf32


def test_a_cpu_is_left_alone(current_device: list[torch.device]) -> None:
    tf32 = torch.backends.cudnn.allow_tf32
    parallel = ParallelConfig(deterministic=True, matmul_precision="tf32")
    prepare_device(parallel, torch.device("cpu"))
    assert current_device == []
    assert not any(name in os.environ for name in VARIABLES)
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.backends.cudnn.allow_tf32 == tf32
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("precision", "matmul", "allowed"), [("fp32", "highest", False), ("tf32", "high", True)]
)
def test_a_gpu_multiplies_as_it_is_told(
    current_device: list[torch.device], precision: str, matmul: str, allowed: bool
) -> None:
    parallel = ParallelConfig.model_validate({"matmul_precision": precision})
    prepare_device(parallel, torch.device("cuda", 3))
    assert current_device == [torch.device("cuda", 3)]
    assert torch.get_float32_matmul_precision() == matmul
    assert torch.backends.cudnn.allow_tf32 == allowed
    assert not torch.are_deterministic_algorithms_enabled()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_deterministic_kernels(current_device: list[torch.device]) -> None:
    prepare_device(ParallelConfig(deterministic=True), torch.device("cuda", 0))
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_environment_says_stays(
    current_device: list[torch.device], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:64")
    prepare_device(ParallelConfig(), torch.device("cuda", 0))
    assert {n: os.environ.get(n) for n in VARIABLES if n in os.environ} == {
        name: "max_split_size_mb:64"
    }
