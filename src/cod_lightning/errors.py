"""The one exception for input that a person can correct."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: the message names the field or file, what was wrong, and what would be right.

    The command line prints it as one error and exits with status 2.
    """


class Diverged(UserError):
    """A run left the finite numbers: what it was asked to do cannot be done as it stands."""


class Stopped(Exception):
    """A run did not come to its end, for a reason outside of it: the same command goes on with it.

    The command line prints it and exits with status `TRY_AGAIN`.
    """


TRY_AGAIN = 75
"""EX_TEMPFAIL of sysexits.h: what a scheduler may take as a reason to queue the job again."""

DAMAGED = (OSError, ValueError, RecursionError)
"""What reading a JSON file can raise: it is missing, is not UTF-8 or not JSON, or lists lie in lists without end."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type if it has no message."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "did you mean X? " for the closest of `known`, followed by all of them."""
    known = sorted(known)
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {match[0]!r}? " if match else ""
    return f"{hint}known: {', '.join(known)}"
