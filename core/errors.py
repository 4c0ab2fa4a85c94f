"""What can go wrong in a training, by what a caller can do about it."""


class CoreError(Exception):
    """The base of every error that `core` raises on purpose."""


class UserError(CoreError):
    """Something a person can mend: a path, a file, a value. Its text is one line: what, where, what to do."""


class ConfigError(UserError):
    """A configuration that is valid field by field, but cannot be trained: an image too small for its network, say."""


class CheckpointError(UserError):
    """A checkpoint that cannot be gone on from: torn, of another format, or of another configuration."""


class DivergedError(CoreError):
    """A loss left the finite numbers, or stayed far above a guess's."""
