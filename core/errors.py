"""Exceptions of `core`, by how a caller can react."""

from core.text import printable_lines


class PrintableError(Exception):
    """An exception whose message may have names and values from outside: its control characters are escaped."""

    def __str__(self) -> str:
        return printable_lines(super().__str__())


class CoreError(PrintableError):
    """Base class."""


class UserError(CoreError):
    """Caused by user input. Its line names the problem and the fix."""


class ConfigError(UserError):
    """A configuration with valid fields that cannot be trained."""


class SizesError(UserError):
    """Images that differ in size, without a size to bring them to."""


class MissingWeightsError(UserError):
    """Pretrained weights that are not on this machine and cannot be downloaded."""


class CheckpointError(UserError):
    """A checkpoint that cannot be resumed."""


class DivergedError(CoreError):
    """The loss is not finite, or stays far above that of uniform predictions."""


class GraphError(CoreError):
    """A failed capture of a CUDA graph has left torch unable to use the GPU in this process."""
