"""The device of a rank: what its process has to settle before the first kernel."""

import os

import torch

from everstep.trainer.config import ParallelConfig


def prepare_device(parallel: ParallelConfig, device: torch.device) -> None:
    """Make ``device`` the current one, computing as ``parallel`` says; nothing to do on a CPU.

    It comes before anything else that touches CUDA, because some of it is read only once. What
    the environment already says of ``PYTORCH_ALLOC_CONF`` and ``CUBLAS_WORKSPACE_CONFIG`` stays.
    """
    if device.type != "cuda":
        return
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # Training, evaluation and sampling differ in sizes: segments that grow leave no holes.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if parallel.deterministic:
        # With streams, cuBLAS is deterministic only with workspaces of a fixed size (NVIDIA, cuBLAS
        # Library, "Results Reproducibility").
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    tf32 = parallel.matmul_precision == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.cuda.set_device(device)
