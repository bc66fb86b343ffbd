"""Errors that a person can mend: each says what is wrong and what to do.

`cluster`'s own are `UserError`s. Packages that may not import `cluster` raise exception classes of their own, whose text
names the value and the remedy: any exception class that one of our packages defines counts. `user_error` finds the first
such error in a chain of causes, also behind Ray's wrapper of a remote failure.
"""

from __future__ import annotations

from collections.abc import Iterator


OUR_PACKAGES = ("cluster", "configs", "learner", "reward_service", "rollout", "segmentation_service")


class UserError(Exception):
    """Something that the person who started the command can put right.

    `message` names the value at fault, `remedy` says what to do about it. Both survive pickling, so the error may
    cross a process boundary. `status` is the command's exit status.
    """

    status = 2

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return self.message


class ConfigError(UserError):
    """The configuration is wrong; the message lists every problem found, one a line."""


class MissingFileError(UserError):
    """A file, folder or model that the run needs is not there."""


class RunFolderError(UserError):
    """A run folder cannot be made (name taken, not writable) or is not one."""


class CheckpointError(UserError):
    """A checkpoint is incomplete, altered, or does not belong to this run."""


class DataError(UserError):
    """A file of rollouts or metrics does not hold what it should."""


class RunFailed(UserError):
    """The run went wrong in a way that has a known cause (too many failed scores, mismatch past its limit)."""


class PartLost(RunFailed):
    """A part of the run died or hangs, and the others cannot go on without it; the run can, from its last checkpoint."""


class SomeWithoutMask(UserError):
    """`videoseg segment` has done what it could, but not every query got a mask."""

    status = 3


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, then what it was raised from, each once. What was merely being handled meanwhile is not a cause."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop(0)
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        # Ray's RayTaskError keeps the remote exception in `cause`, not in __cause__.
        waiting += [getattr(current, "cause", None), current.__cause__]


def user_error(error: BaseException) -> tuple[str, str] | None:
    """(message, remedy) of the first error in the chain that a person can mend, or None if there is none."""
    for current in causes(error):
        ours = isinstance(current, Exception) and type(current).__module__.split(".")[0] in OUR_PACKAGES
        if ours or isinstance(getattr(current, "remedy", None), str):
            return str(getattr(current, "message", None) or current), getattr(current, "remedy", "")
    return None
