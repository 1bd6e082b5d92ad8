"""What ``srun`` tells a process about its rank, in the names that torch knows: pure functions."""

import re
from collections.abc import Mapping

_FIRST_PORT = 15000
_PORTS = 15000
_TASKS = re.compile(r"(\d+)(?:\(x(\d+)\))?")
_BRACKETS = re.compile(r"\[([^\]]*)\]")


def torch_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK and its kin for a process started by srun; empty for one that was not.

    MASTER_ADDR is the first host of the step, and MASTER_PORT follows from the ids of job and
    step, so that all ranks know both without talking; where they are set already they stay.
    """
    if "SLURM_PROCID" not in environment:
        return {}
    found = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": _first_of(environment, ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")),
        "LOCAL_RANK": environment.get("SLURM_LOCALID"),
        "LOCAL_WORLD_SIZE": _local_tasks(environment),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or _first_host(environment),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(port_of_job(environment)),
    }
    return {name: value for name, value in found.items() if value is not None}


def expand_nodelist(nodelist: str) -> list[str]:
    """Host names of Slurm's short form: 'node[01-03,07],login' -> node01, node02, node03, node07,
    login. Widths with leading zeros are kept; several brackets in a name multiply.
    """
    hosts = []
    for pattern in _split_outside_brackets(nodelist):
        names = [""]
        position = 0
        for bracket in _BRACKETS.finditer(pattern):
            literal = pattern[position : bracket.start()]
            numbers = _expand_ranges(bracket[1])
            names = [f"{name}{literal}{number}" for name in names for number in numbers]
            position = bracket.end()
        hosts += [f"{name}{pattern[position:]}" for name in names]
    return hosts


def port_of_job(environment: Mapping[str, str]) -> int:
    """A port below the ephemeral ones, another one for each step of each job on a host."""
    job = _number(environment.get("SLURM_JOB_ID") or environment.get("SLURM_JOBID"))
    step = _number(environment.get("SLURM_STEP_ID") or environment.get("SLURM_STEPID"))
    return _FIRST_PORT + (job * 7 + step) % _PORTS


def tasks_per_node(counts: str) -> list[int]:
    """Tasks on each node from Slurm's short form: '4(x2),3' -> [4, 4, 3]."""
    tasks: list[int] = []
    for count, times in _TASKS.findall(counts):
        tasks += [int(count)] * int(times or 1)
    return tasks


def _local_tasks(environment: Mapping[str, str]) -> str | None:
    counts = _first_of(environment, ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"))
    tasks = tasks_per_node(counts or "")
    node = _number(environment.get("SLURM_NODEID"))
    return str(tasks[node]) if node < len(tasks) else None


def _first_host(environment: Mapping[str, str]) -> str | None:
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    hosts = expand_nodelist(_first_of(environment, names) or "")
    return hosts[0] if hosts else None


def _first_of(environment: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    return next((environment[name] for name in names if environment.get(name)), None)


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdigit() else 0


def _split_outside_brackets(nodelist: str) -> list[str]:
    parts = re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    return [part.strip() for part in parts if part.strip()]


def _expand_ranges(ranges: str) -> list[str]:
    numbers = []
    for part in ranges.split(","):
        first, _, last = part.strip().partition("-")
        if not last:
            numbers.append(first)
            continue
        width = len(first)
        numbers += [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    return numbers
