"""Errors of starting and watching ranks; see ``everstep.checkpoint.errors`` for their rules."""

from everstep.checkpoint.errors import EverstepError


class ClusterError(EverstepError):
    """Base of everything that can go wrong around the ranks of a run."""


class LaunchError(ClusterError):
    """The ranks of a run cannot be started."""


class PortTakenError(LaunchError):
    """The rendezvous port that the configuration asks for cannot be bound."""

    def __init__(self, port: int, why: str) -> None:
        super().__init__(port, why)
        self.port, self.why = port, why

    def __str__(self) -> str:
        return (
            f"launch.port={self.port} cannot be used on this host ({self.why}): choose another "
            "port, or launch.port=0 for any free one"
        )


class RunDirError(ClusterError):
    """The run directory cannot be created, locked or written."""

    def __init__(self, directory: str, why: str) -> None:
        super().__init__(directory, why)
        self.directory, self.why = directory, why

    def __str__(self) -> str:
        return (
            f"the run directory {self.directory} cannot be used ({self.why}): make that right to "
            "go on with its run, or choose another one with --run-dir"
        )


class RankEnvironmentError(LaunchError):
    """An external launcher did not say which rank this process is."""

    def __init__(self, variable: str, found: str | None) -> None:
        super().__init__(variable, found)
        self.variable, self.found = variable, found

    def __str__(self) -> str:
        found = "is not set" if self.found is None else f"is {self.found!r}, not a rank or size"
        return (
            f"--launcher external: {self.variable} {found}; start this command with torchrun or "
            "srun, or use --launcher local"
        )
