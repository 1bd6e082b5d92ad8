"""Errors of submitting a run to a cluster and of asking about it there."""

from collections.abc import Sequence

from everstep.cluster.errors import ClusterError, LaunchError


class RayMissingError(LaunchError):
    """Ray, or the part of it that talks to clusters, is not installed here."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why

    def __str__(self) -> str:
        return (
            f"talking to a Ray cluster needs Ray on this machine ({self.why}): "
            "pip install 'everstep[ray]'"
        )


class StagingError(LaunchError):
    """The user's folder cannot be sent along with a job."""


class ClusterUnreachableError(ClusterError):
    """Nothing answers at the address of the cluster."""

    def __init__(self, address: str, why: str) -> None:
        super().__init__(address, why)
        self.address, self.why = address, why

    def __str__(self) -> str:
        return (
            f"no cluster answers at {self.address} ({self.why}): --address is the dashboard of its "
            "head node, such as http://HEAD:8265, which has to be reachable from here (see "
            "docs/clusters.md)"
        )


class NotADashboardError(ClusterError):
    """Something answers at the address, but it is no Ray dashboard with a job server."""

    def __init__(self, address: str, why: str) -> None:
        super().__init__(address, why)
        self.address, self.why = address, why

    def __str__(self) -> str:
        return (
            f"what answers at {self.address} is not a Ray dashboard ({self.why}): --address is "
            "http://HEAD:8265 as `ray start --head` prints it, not the GCS port (6379) nor that of "
            "ray:// (10001); the head node needs ray[default]"
        )


class ClusterAuthError(ClusterError):
    """The cluster wants a token that this machine has not, or another one."""

    def __init__(self, address: str, mode: str | None) -> None:
        super().__init__(address, mode)
        self.address, self.mode = address, mode

    def __str__(self) -> str:
        found = "no token of this machine was accepted"
        if self.mode == "disabled":
            found = "RAY_AUTH_MODE=disabled here, so that no token is sent: unset it"
        return (
            f"the cluster at {self.address} wants an authentication token ({found}): put that of "
            "its head node (`ray get-auth-token` there) into ~/.ray/auth_token, or set "
            "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        )


class ConnectionLostError(ClusterError):
    """The cluster answered before, and does not any more."""

    def __init__(self, address: str, why: str) -> None:
        super().__init__(address, why)
        self.address, self.why = address, why

    def __str__(self) -> str:
        return (
            f"the connection to {self.address} is lost ({self.why}): if the cluster is still up, "
            "its jobs go on; ask again with `everstep status`"
        )


class RequestRefusedError(ClusterError):
    """The job server answered a request with an error."""

    def __init__(self, doing: str, why: str) -> None:
        super().__init__(doing, why)
        self.doing, self.why = doing, why

    def __str__(self) -> str:
        return f"the cluster refused {self.doing}: {self.why}"


class UnknownJobError(ClusterError):
    """The cluster has no such job."""

    def __init__(self, job_id: str, near: Sequence[str]) -> None:
        super().__init__(job_id, list(near))
        self.job_id, self.near = job_id, list(near)

    def __str__(self) -> str:
        hint = f"did you mean {' or '.join(self.near)}?" if self.near else "`everstep status` lists"
        return f"the cluster has no job {self.job_id!r}; {hint}" + (
            "" if self.near else " those that it has"
        )


class ForeignJobError(ClusterError):
    """A job of somebody else's making: it would not know how to stop."""

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id

    def __str__(self) -> str:
        return (
            f"{self.job_id} was not submitted by everstep, and would not save when it is stopped: "
            f"`ray job stop {self.job_id}` ends it"
        )


class JobIdTakenError(LaunchError):
    """A job of this id exists."""

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id

    def __str__(self) -> str:
        return f"--id {self.job_id}: the cluster has a job of this id already; choose another one"


class RunDirTakenError(LaunchError):
    """Another job that has not ended writes to the run directory."""

    def __init__(self, run_dir: str, job_id: str) -> None:
        super().__init__(run_dir, job_id)
        self.run_dir, self.job_id = run_dir, job_id

    def __str__(self) -> str:
        return (
            f"{self.run_dir} is being written by job {self.job_id}: stop that first (everstep stop "
            f"{self.job_id}), or choose another --run-dir"
        )
