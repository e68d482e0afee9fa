"""Exceptions, and helpers for their messages."""

import difflib
import signal
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """Bad input: the message names the field or file, says what is wrong and what to do.

    The command line prints the message and exits with status 2.
    """


class Diverged(UserError):
    """Training diverged: the loss or a parameter is NaN or Inf."""


class Stopped(BaseException):
    """A command was interrupted from outside; the same command resumes it.

    Signal handlers raise it anywhere, so `except Exception` must not catch it, as with KeyboardInterrupt. The command
    line prints the reason and exits with `status`.

    Args:
        reason: the message.
        number: the signal that stopped a run; after SIGINT a scheduler must not requeue it.
    """

    def __init__(self, reason: str, number: int | None = None):
        super().__init__(reason)
        self.status = CTRL_C if number == signal.SIGINT else TRY_AGAIN


TRY_AGAIN = 75
"""Exit status EX_TEMPFAIL of sysexits.h: a scheduler may requeue the job."""
CTRL_C = 130
"""Exit status of a shell for a command that SIGINT ended."""
CLOSED_PIPE = 141
"""Exit status of a shell for a command that wrote into a pipe without a reader."""

DAMAGED = (OSError, ValueError, RecursionError)
"""Exceptions of reading a JSON file that is missing, not UTF-8, not JSON, or nested too deeply."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if the message is empty."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def root_cause(error: BaseException) -> BaseException:
    """The error at the bottom of a chain of causes."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python or torch says that memory could not be allocated."""
    texts = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


def short_repr(value: object) -> str:
    """The repr of a value of the user; a long one is cut, and a value without a repr gives its type."""
    try:
        text = repr(value)
    except Exception:  # also that of an object of the user
        return f"<{type(value).__name__}>"
    return shorten(text)


def shorten(text: str) -> str:
    """A text of the user, cut to 40 characters if it has more than 80."""
    return text if len(text) <= 80 else f"{text[:40]}... ({len(text)} characters)"


def without_breaks(text: str) -> str:
    """A text in one line, with single spaces."""
    return " ".join(text.split())


def one_line(error: BaseException) -> str:
    """The whole message of an exception in one line, or its type if the message is empty; a KeyError has only a key."""
    text = without_breaks(str(error)) or type(error).__name__
    return f"KeyError: {text}" if isinstance(error, KeyError) else text


def os_message(error: OSError, path: object = None) -> str:
    """The file that `error` names, or else `path`, and the system's reason."""
    name, reason = error.filename or path, error.strerror or str(error)
    if isinstance(error, PermissionError):
        reason = "permission denied: change its permissions (chmod) or ask its owner"
    return f"{name}: {reason}" if name else str(error)


def no_permission(error: PermissionError, path: object) -> UserError:
    return UserError(os_message(error, path))


def plural(amount: int, noun: str) -> str:
    """Such as "1 run" or "1,200 runs"."""
    return f"{amount:,} {noun}" + ("" if amount == 1 else "s")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the closest of `known` if one is similar, then all of `known`."""
    known = sorted(known)
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {match[0]!r}? " if match else ""
    return f"{hint}known: {', '.join(known)}"


def first_of(names: Sequence[str]) -> str:
    """The first of some weights, and how many others there are."""
    others = len(names) - 1
    return names[0] if not others else f"{names[0]} and {others} other weight{'s' * (others > 1)}"
