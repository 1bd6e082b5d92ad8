"""The doctor's judgement, on machines that are described here, and its report on this one."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from everstep import machine
from everstep.doctor import Facts, Finding, Status, diagnose, gather, report
from everstep.doctor_run import diagnose_run
from everstep.machine import UNLIMITED, Cpu, Disk, Gpu, Interface, Limits, Memory
from everstep.trainer.config_load import load_config
from tests.support.cli import exit_code

GIB = 2**30
HEALTHY = Facts(
    system="Linux",
    python=(3, 12, 1),
    everstep="1.0",
    packages={
        "numpy": "2.0",
        "pydantic": "2.9",
        "pyyaml": "6.0",
        "rich": "14.0",
        "typer": "0.15",
        "tokenizers": "0.20",
        "tensorboard": "2.17",
    },
    torch="2.13.0",
    torch_build="CUDA 13.0",
    kernels={"crc32c": "avx512", "streaming_copy": "sse2"},
    cpu=Cpu(name="Some CPU", cores=16, quota=None, flags=frozenset({"avx2", "gfni"})),
    memory=Memory(
        total_bytes=128 * GIB,
        available_bytes=100 * GIB,
        limit_bytes=None,
        shm_bytes=64 * GIB,
        shm_free_bytes=64 * GIB,
    ),
    limits=Limits(open_files=(65536, 65536), locked_bytes=(UNLIMITED, UNLIMITED)),
    gpus=(Gpu("NVIDIA H100", 80 * GIB, "570.1"),) * 8,
    visible_gpus=8,
    infiniband=True,
    numa_bytes=(64 * GIB, 64 * GIB),
    interfaces=(
        Interface("eth0", "10.0.0.7"),
        Interface("ib0", None),
        Interface("lo", "127.0.0.1"),
    ),
    disk=Disk(path="/data", kind="ext4", free_bytes=2000 * GIB, writable=None, direct_io=None),
)
SMALL_MEMORY = replace(HEALTHY.memory, limit_bytes=2 * GIB)
TINY_SHM = replace(HEALTHY.memory, shm_bytes=2**26, shm_free_bytes=2**26)
NO_SHM = replace(HEALTHY.memory, shm_bytes=None, shm_free_bytes=None)
ROOMY = replace(
    HEALTHY, memory=replace(HEALTHY.memory, total_bytes=2**40, available_bytes=900 * GIB)
)
CPU_ONLY = replace(HEALTHY, gpus=(), visible_gpus=0, torch_build=None)


def found(findings: list[Finding], name: str) -> Finding:
    (finding,) = [f for f in findings if f.name == name]
    return finding


def test_a_healthy_machine() -> None:
    findings = diagnose(HEALTHY)
    assert {finding.status for finding in findings} == {Status.OK}
    assert found(findings, "GPUs").found == "8 x NVIDIA H100, 80 GiB each, driver 570.1"
    assert "avx2 gfni" in found(findings, "cores").found


@pytest.mark.parametrize(
    ("facts", "name", "status", "advice"),
    [
        (replace(HEALTHY, system="Darwin"), "software", Status.FAIL, "runs on Linux only"),
        (replace(HEALTHY, python=(3, 10, 9)), "software", Status.FAIL, "Python 3.11 or later"),
        (
            replace(HEALTHY, packages={**HEALTHY.packages, "pydantic": None}),
            "packages",
            Status.FAIL,
            "pip install pydantic",
        ),
        (
            replace(HEALTHY, packages={**HEALTHY.packages, "tokenizers": None}),
            "extras",
            Status.OK,
            "pip install 'everstep[hf]'",
        ),
        (replace(HEALTHY, torch="2.4.1"), "torch", Status.FAIL, "torch 2.4.1 is too old"),
        (replace(HEALTHY, torch=None), "torch", Status.FAIL, "torch is not installed"),
        (replace(HEALTHY, torch_build=None), "torch", Status.WARN, "cannot use the GPUs"),
        (replace(HEALTHY, gpus=()), "GPUs", Status.WARN, "check the driver with nvidia-smi"),
        (CPU_ONLY, "GPUs", Status.OK, ""),
        (replace(HEALTHY, visible_gpus=2), "GPUs", Status.WARN, "only 2 of them can be used"),
        (
            replace(HEALTHY, cpu=replace(HEALTHY.cpu, quota=2.5)),
            "cores",
            Status.WARN,
            "grants 2.5 cores",
        ),
        (replace(HEALTHY, kernels=None), "native kernels", Status.FAIL, "it compiles them"),
        (
            replace(HEALTHY, kernels={"crc32c": "portable"}),
            "native kernels",
            Status.WARN,
            "EVERSTEP_PORTABLE_KERNELS",
        ),
        (replace(HEALTHY, memory=SMALL_MEMORY), "memory", Status.WARN, "lack of memory"),
        (replace(HEALTHY, memory=TINY_SHM), "/dev/shm", Status.WARN, "--shm-size"),
        (replace(CPU_ONLY, memory=TINY_SHM), "/dev/shm", Status.OK, ""),
        (replace(HEALTHY, memory=NO_SHM), "/dev/shm", Status.WARN, "mount a tmpfs"),
        (
            replace(HEALTHY, limits=replace(HEALTHY.limits, open_files=(256, 4096))),
            "open files",
            Status.WARN,
            "ulimit -n 65536",
        ),
        (
            replace(HEALTHY, limits=replace(HEALTHY.limits, locked_bytes=(2**23, 2**23))),
            "locked memory",
            Status.WARN,
            "ulimit -l unlimited",
        ),
        (
            replace(HEALTHY, disk=replace(HEALTHY.disk, kind="tmpfs")),
            "run directory",
            Status.WARN,
            "this is memory",
        ),
        (
            replace(HEALTHY, disk=replace(HEALTHY.disk, writable="Read-only file system")),
            "run directory",
            Status.FAIL,
            "(Read-only file system): choose another place with --run-dir",
        ),
        (
            replace(HEALTHY, disk=replace(HEALTHY.disk, free_bytes=2**20)),
            "run directory",
            Status.WARN,
            "larger disk",
        ),
        (
            replace(HEALTHY, disk=replace(HEALTHY.disk, direct_io="the file system refuses it")),
            "O_DIRECT",
            Status.WARN,
            "saving works",
        ),
    ],
)
def test_what_is_wrong_is_found_and_advised_on(
    facts: Facts, name: str, status: Status, advice: str
) -> None:
    finding = found(diagnose(facts), name)
    assert finding.status is status
    assert advice in finding.advice


def test_a_run_that_fits() -> None:
    findings = diagnose_run(load_config("llama_8b"), ROOMY)
    assert {finding.status for finding in findings} == {Status.OK}
    assert found(findings, "config").found == "llama_8b: 8 ranks, mesh dp_shard 8, on cuda"
    assert found(findings, "training memory").found == (
        "14.96 GiB of state per GPU, and activations"
    )
    assert found(findings, "snapshot memory").found == (
        "269.3 GiB: 3 snapshots of 89.75 GiB, at most 11.22 GiB per rank"
    )
    assert found(findings, "registered memory").status is Status.OK
    assert found(findings, "NUMA").found == "2 nodes: 64 GiB, 64 GiB"
    assert found(findings, "keeper network").status is Status.OK


@pytest.mark.parametrize(
    ("overrides", "facts", "name", "status", "advice"),
    [
        (["mesh.tp=3"], HEALTHY, "config", Status.FAIL, "cannot be divided over"),
        (["data.tokenizer=no.json"], HEALTHY, "tokenizer", Status.FAIL, "no file 'no.json'"),
        (["model.vocab_size=100"], HEALTHY, "config", Status.FAIL, "smaller than the 257 tokens"),
        (
            ["metrics.sinks=[tensorboard]"],
            replace(HEALTHY, packages={**HEALTHY.packages, "tensorboard": None}),
            "metrics",
            Status.FAIL,
            "pip install 'everstep[tensorboard]'",
        ),
        ([], CPU_ONLY, "training memory", Status.FAIL, "there are 100 GiB"),
        (
            [],
            replace(HEALTHY, gpus=(Gpu("small", 8 * GIB, None),) * 8),
            "training memory",
            Status.FAIL,
            "there are 8 GiB",
        ),
        (
            ["checkpoint.keep=30"],
            HEALTHY,
            "checkpoint space",
            Status.FAIL,
            "lower checkpoint.keep",
        ),
        (
            [],
            HEALTHY,
            "snapshot memory",
            Status.FAIL,
            "by default a run may take 80 GiB",
        ),
        (
            ["checkpoint.memory_budget_bytes=1073741824"],
            ROOMY,
            "snapshot memory",
            Status.FAIL,
            "checkpoint.memory_budget_bytes allows 1 GiB: raise it, shard over more nodes",
        ),
        (
            ["checkpoint.memory_budget_bytes=1099511627776"],
            replace(ROOMY, memory=replace(ROOMY.memory, limit_bytes=300 * GIB)),
            "snapshot memory",
            Status.FAIL,
            "the control group allows 300 GiB: shard over more nodes, checkpoint.every_steps=0",
        ),
        (
            ["checkpoint.memory_budget_bytes=1099511627776"],
            replace(ROOMY, gpus=(), visible_gpus=0, memory=replace(ROOMY.memory, limit_bytes=None)),
            "snapshot memory",
            Status.OK,
            "",
        ),
        (
            [],
            replace(ROOMY, limits=replace(ROOMY.limits, locked_bytes=(2**23, 2**23))),
            "registered memory",
            Status.WARN,
            "ulimit -l unlimited",
        ),
        (
            [],
            replace(ROOMY, limits=replace(ROOMY.limits, open_files=(128, 128))),
            "keeper files",
            Status.FAIL,
            "only 128 are allowed: ulimit -n 176",
        ),
        (
            ["checkpoint.keeper_interface=eth1"],
            ROOMY,
            "keeper network",
            Status.FAIL,
            "there are eth0, ib0, lo here",
        ),
        (["checkpoint.keeper_interface=ib0"], ROOMY, "keeper network", Status.FAIL, "bring it up"),
        (["checkpoint.keeper_interface=lo"], ROOMY, "keeper network", Status.WARN, "no other node"),
        (
            [],
            replace(ROOMY, numa_bytes=(64 * GIB, 8 * GIB)),
            "NUMA",
            Status.WARN,
            "some nodes have much less memory",
        ),
        (
            ["mesh.dp_replicate=2", "mesh.dp_shard=8"],
            HEALTHY,
            "config",
            Status.WARN,
            "each rank needs a GPU and there are 8",
        ),
        (
            ["mesh.dp_shard=128", "data.global_batch=128"],
            CPU_ONLY,
            "config",
            Status.WARN,
            "16 cores will be slow for 128 ranks",
        ),
    ],
)
def test_a_run_that_does_not_fit(
    overrides: list[str], facts: Facts, name: str, status: Status, advice: str
) -> None:
    findings = diagnose_run(load_config("llama_8b", overrides), facts)
    finding = found(findings, name)
    assert finding.status is status
    assert advice in finding.advice


@pytest.mark.parametrize(
    ("memory", "names"),
    [
        ("null", set()),
        ("process", {"snapshot memory", "NUMA"}),
        ("keeper", {"snapshot memory", "NUMA", "keeper files", "keeper network"}),
    ],
)
def test_only_what_a_run_uses_is_checked(memory: str, names: set[str]) -> None:
    config = load_config("debug_dp2", [f"checkpoint.memory={memory}"])
    every = {"snapshot memory", "NUMA", "keeper files", "keeper network", "registered memory"}
    findings = diagnose_run(config, CPU_ONLY)
    assert {finding.name for finding in findings} & every == names


def test_a_model_of_ones_own_is_not_estimated() -> None:
    config = load_config("debug_single", ["model.factory=a:b"])
    names = {finding.name for finding in diagnose_run(config, HEALTHY)}
    assert names == {"config", "tokenizer"}


def test_the_command_that_is_suggested_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    name = "name=" + "x" * 90
    exit_code("doctor", "debug_single", "data.source=[my text, b]", name)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f"everstep train debug_single 'data.source=[my text, b]' {name}")


@pytest.mark.parametrize(("status", "code"), [(Status.OK, 0), (Status.WARN, 0), (Status.FAIL, 1)])
def test_the_report(status: Status, code: int) -> None:
    text = io.StringIO()
    console = Console(file=text, width=200)
    finding = Finding("extras", status, "[hf] " + "x " * 80, "pip install 'everstep[hf]'")
    assert report([finding], console, "everstep train demo") == code
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith(f"{status} ")
    assert "[hf]" in lines[0]
    assert any("-> pip install 'everstep[hf]'" in line for line in lines)
    assert lines[-1].endswith("everstep train demo")


def test_this_machine_is_examined_quickly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    facts = gather(Path("runs"))
    assert facts.disk.path == str(tmp_path)
    assert facts.torch is not None
    expected = diagnose(facts) + diagnose_run(load_config("debug_single"), facts)
    assert exit_code("doctor", "debug_single") == int(
        any(f.status is Status.FAIL for f in expected)
    )
    text = capsys.readouterr().out
    assert all(finding.name in text for finding in expected)
    assert max(map(len, text.splitlines())) <= 100
    assert list(tmp_path.iterdir()) == []


def test_without_the_extension_the_doctor_still_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("everstep.doctor.import_module", missing)
    assert gather(Path()).kernels is None
    assert machine.read_limits() == gather(Path()).limits
