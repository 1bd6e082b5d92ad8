"""A committed step of ours as the source of a conversion (no torch)."""

from collections.abc import Mapping

from everstep.checkpoint.layout import Box, TensorSpec
from everstep.checkpoint.pack import StridedBytes
from everstep.checkpoint.step_reader import StepReader


class StepSource:
    """The tensors that a ``StepReader`` reads; the reader stays the caller's to close."""

    def __init__(self, reader: StepReader) -> None:
        self._reader = reader
        self.tensors: Mapping[str, TensorSpec] = {
            name: stored.spec for name, stored in reader.manifest.tensors.items()
        }

    @property
    def where(self) -> str:
        """See ``StepReader.where``."""
        return self._reader.where

    def fill(self, name: str, wanted: Box, target: StridedBytes) -> None:
        """See ``Source``."""
        self._reader.fill(name, wanted, target)
