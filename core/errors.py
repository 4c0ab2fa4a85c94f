"""Exceptions of `core`, grouped by how a caller can react."""


class CoreError(Exception):
    """Base class of the errors that `core` raises on purpose."""


class UserError(CoreError):
    """An error caused by user input: a path, a file, a value. Its one-line text names the problem and the fix."""


class ConfigError(UserError):
    """A configuration whose fields are valid but that cannot be trained, such as images too small for the network."""


class CheckpointError(UserError):
    """A checkpoint that cannot be resumed: damaged, of another format, or of another configuration."""


class DivergedError(CoreError):
    """The loss became non-finite, or stayed far above that of uniform predictions."""
