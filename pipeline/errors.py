"""The errors that a user can cause or repair, with their exit codes.

UnclipError
  ConfigError   2  the recipe or a flag is wrong; nothing has run
  DataError     3  an input violates its schema or checksum; names shard, row and column
  StepError     4  a step failed after its retries; names step and output
  ResumeError   5  a checkpoint does not match the recipe that resumes from it

The command prints the message without a traceback and exits with the number. Messages say what is wrong, where, and
what to do; a command that they propose has the word RECIPE, in whose place the command puts the recipe as it was typed.
"""

from typing import ClassVar

from pipeline.addresses import without_secrets


def first_line(error: BaseException) -> str:
    """The first line of an error's words, for a message to people; its class if it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class UnclipError(Exception):
    """Base of these errors; it holds only its message, so that it can be pickled between processes.

    Args:
        words: The message: what is wrong, where, and what to do; some kinds have it in parts. Passwords and signatures
            of its addresses are left out.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, *words: str) -> None:
        super().__init__(*map(without_secrets, words))


class ConfigError(UnclipError):
    """The recipe or a flag is wrong; nothing has run."""

    exit_code = 2


class DataError(UnclipError):
    """An input violates its schema or its checksum."""

    exit_code = 3


class StepError(UnclipError):
    """A step failed after its retries, or something outside the project (disk, cluster, tracker) stopped it."""

    exit_code = 4


class ResumeError(UnclipError):
    """A checkpoint does not match the recipe that resumes from it."""

    exit_code = 5
