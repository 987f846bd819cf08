"""Errors that end a run, each with the exit code a scheduler can act on.

Raise these for what the user, the disk or a peer did; use `assert` for what we did. The message is one
line that says what is wrong, where, and what to do about it: commands print it without a traceback.
"""


class EvenkeelError(Exception):
    """Base of all errors reported as one line; `exit_code` is what the process ends with."""

    exit_code = 1
    is_everywhere = False
    """Every rank raises this same error, so one of each node is enough to say it."""


class ConfigError(EvenkeelError):
    """The configuration or the command line asks for something impossible."""

    exit_code = 2
    is_everywhere = True

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class CheckpointError(EvenkeelError):
    """A checkpoint (or the data it was made with) is missing, damaged or belongs to something else."""

    exit_code = 3


class NumericError(EvenkeelError):
    """Losses or gradients stayed non-finite, or ranks that must agree bit for bit did not."""

    exit_code = 4


class PeerLostError(EvenkeelError):
    """Another rank died, hung, or never arrived."""

    exit_code = 5


class StorageError(EvenkeelError):
    """The disk is full, read-only or gone."""

    exit_code = 6


class OutOfMemoryError(EvenkeelError):
    """A rank needs more memory than its device, or its process, may have: another configuration is needed."""

    exit_code = 2


PREEMPTED_EXIT_CODE = 75
"""The run was asked to stop, saved a checkpoint, and can be started again (EX_TEMPFAIL)."""
