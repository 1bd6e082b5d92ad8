import pytest

from everstep.cluster.slurm import (
    expand_nodelist,
    port_of_job,
    tasks_per_node,
    torch_environment,
)

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[01-02]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("node7", ["node7"]),
        ("node[01-03,07]", ["node01", "node02", "node03", "node07"]),
        ("a1,b[2-3],c", ["a1", "b2", "b3", "c"]),
        ("r[1-2]n[01,03]", ["r1n01", "r1n03", "r2n01", "r2n03"]),
        ("n[098-101]-ib", ["n098-ib", "n099-ib", "n100-ib", "n101-ib"]),
        ("n[9-11].site.org", ["n9.site.org", "n10.site.org", "n11.site.org"]),
        ("", []),
    ],
)
def test_nodelists(nodelist: str, hosts: list[str]) -> None:
    assert expand_nodelist(nodelist) == hosts


def test_tasks_per_node() -> None:
    assert tasks_per_node("4(x2),3") == [4, 4, 3]
    assert tasks_per_node("8") == [8]
    assert tasks_per_node("") == []


def test_a_step_becomes_the_environment_that_torch_knows() -> None:
    assert torch_environment(STEP) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu01",
        "MASTER_PORT": str(port_of_job(STEP)),
    }


def test_all_ranks_of_a_step_agree_and_steps_differ() -> None:
    other_rank = {**STEP, "SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}
    names = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")
    for name in names:
        assert torch_environment(STEP)[name] == torch_environment(other_rank)[name]
    ports = {
        port_of_job({"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
        for job in range(4711, 4721)
        for step in range(5)
    }
    assert len(ports) == 50
    assert all(1024 < port < 32768 for port in ports)


def test_what_is_set_stays() -> None:
    found = torch_environment({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.1", "1234")


def test_the_job_stands_in_for_the_step() -> None:
    job = {
        "SLURM_JOB_ID": "1",
        "SLURM_PROCID": "0",
        "SLURM_NTASKS": "3",
        "SLURM_JOB_NODELIST": "b,a",
        "SLURM_TASKS_PER_NODE": "2,1",
    }
    found = torch_environment(job)
    assert (found["MASTER_ADDR"], found["LOCAL_WORLD_SIZE"]) == ("b", "2")
    assert "LOCAL_RANK" not in found


def test_without_slurm_there_is_nothing() -> None:
    assert torch_environment({"RANK": "3"}) == {}
