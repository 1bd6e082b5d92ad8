"""Errors of conversions; see ``everstep.checkpoint.errors`` for the rules that they follow."""

from collections.abc import Sequence

from everstep.checkpoint.errors import CheckpointError, DamagedError

_SHOWN = 5


class SpecError(CheckpointError):
    """A conversion spec cannot be read, or contradicts itself."""


class ConversionError(CheckpointError):
    """What a spec makes of the source is not what is wanted; nothing was written."""

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        super().__init__(where, list(problems))
        self.where, self.problems = where, list(problems)

    def __str__(self) -> str:
        more = len(self.problems) - _SHOWN
        rest = f"; and {more} more" if more > 0 else ""
        problems = "; ".join(self.problems[:_SHOWN])
        return (
            f"{self.where} cannot be converted: {problems}{rest}: add what is missing, and let the "
            "conversion spec drop what is too much; nothing was written"
        )


class TargetExistsError(CheckpointError):
    """The place to write to is taken."""

    def __init__(self, target: str) -> None:
        super().__init__(target)
        self.target = target

    def __str__(self) -> str:
        return (
            f"{self.target} exists and is never overwritten: choose another name, or remove it "
            "first"
        )


class TargetFailedError(CheckpointError):
    """The place to write to is full, or cannot be written to; nothing was kept."""

    def __init__(self, target: str, cause: str) -> None:
        super().__init__(target, cause)
        self.target, self.cause = target, cause

    def __str__(self) -> str:
        return (
            f"{self.target} cannot be written: {self.cause}; nothing of it was kept: make room, or "
            "choose another place"
        )


class MissingPackageError(CheckpointError):
    """A format needs a package that is not installed."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(what, package, extra)
        self.what, self.package, self.extra = what, package, extra

    def __str__(self) -> str:
        return (
            f"{self.what} needs the package {self.package!r}, which is not installed: "
            f"pip install 'everstep[{self.extra}]'"
        )


class ArchitectureError(CheckpointError):
    """Two descriptions of a model do not say the same."""

    def __init__(self, where: str, differences: Sequence[str]) -> None:
        super().__init__(where, list(differences))
        self.where, self.differences = where, list(differences)

    def __str__(self) -> str:
        return (
            f"{self.where} describes another model: {'; '.join(self.differences)}: only "
            "model.factory can train such a model"
        )


class SafetensorsError(DamagedError):
    """A file is not valid safetensors, or not what the index beside it says."""
