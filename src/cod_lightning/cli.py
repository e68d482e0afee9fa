"""The command line: parser and dispatch. Each command imports its libraries when it runs, so that --help is fast."""

from __future__ import annotations

import argparse
import os
import re
import select
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import TextIOWrapper
from types import ModuleType
from typing import Any

import shtab

from cod_lightning import __version__
from cod_lightning.commands import (
    consolidate,
    convert,
    estimate,
    evaluate,
    experiments,
    export,
    fit,
    generate,
    grow,
    import_,
    launch,
    measure,
    predict,
    prepare,
    report,
    reproduce,
    verify,
)
from cod_lightning.commands.overrides import check_no_repeats
from cod_lightning.errors import (
    CLOSED_PIPE,
    CTRL_C,
    Stopped,
    UserError,
    first_line,
    is_out_of_memory,
    nearest,
    os_message,
)
from cod_lightning.signals import ignore_until_exit, raise_on_stop_signals
from cod_lightning.train.ranks import is_local_rank_zero

COMMANDS: dict[str, ModuleType] = {
    "fit": fit,
    "prepare": prepare,
    "evaluate": evaluate,
    "generate": generate,
    "export": export,
    "consolidate": consolidate,
    "import": import_,
    "convert": convert,
    "grow": grow,
    "measure": measure,
    "verify": verify,
    "estimate": estimate,
    "predict": predict,
    "launch": launch,
    "reproduce": reproduce,
    "report": report,
    "experiments": experiments,
}
"""Modules with `HELP`, `add_arguments(parser)` and optionally `EPILOG` and `details()`; `run(**arguments)` returns an
exit status, or None for 0."""
CUSTOM_NORM = re.compile(r"\+*norm(\.name|\.base)?=.*:")
"""Overrides that name a strategy as module:function."""


class StoreOnce(argparse._StoreAction):
    """Stores the value of an option; a second value is an error, which names both."""

    earlier: Any = None

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if option_string is not None and self.earlier is not None:
            raise argparse.ArgumentError(self, f"{self.earlier} and {values} are both given: keep one")
        self.earlier = values
        super().__call__(parser, namespace, values, option_string)


class Parser(argparse.ArgumentParser):
    """A parser whose help ends with text that is built only when the help is printed; its options are `StoreOnce`."""

    details: Callable[[], str] = staticmethod(str)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for action in (None, "store"):
            self.register("action", action, StoreOnce)

    def format_help(self) -> str:
        return "\n".join(filter(None, [super().format_help(), self.details()]))


def parser() -> argparse.ArgumentParser:
    """The argument parser, with a subparser for each command."""
    top = Parser(
        prog="cod_lightning",
        description="Train, evaluate and compare decoders under the norm strategies of The Curse of Depth.",
    )
    top.add_argument("--version", action="version", version=f"cod_lightning {__version__}")
    shtab.add_argument_to(top, help="print the completion script of a shell")
    subparsers = top.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=command.HELP,
            description=command.HELP,
            epilog=getattr(command, "EPILOG", ""),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        subparser.details = getattr(command, "details", str)
        command.add_arguments(subparser)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The command's status (0 if None; a sweep the largest of its runs), 2 after a `UserError`, an `OSError` or out of
        memory, `TRY_AGAIN` or `CTRL_C` after an interruption, or `CLOSED_PIPE`.

    Raises:
        SystemExit: argparse printed help or rejected an argument.
    """
    # Waiting threads of libgomp spin: on 2 busy cores a step with 2 threads takes 18 times as long. With this bound
    # it takes 2 to 3 times as long, and no longer than before on an idle machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by 2>&-, as by some daemons
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        if isinstance(stream := getattr(sys, name), TextIOWrapper):
            stream.reconfigure(errors="replace")  # an ASCII terminal shows ? instead of ending the command
    try:
        status = run_command(argv)
    except SystemExit as stop:  # of argparse, after --help and after a wrong option
        flushed = flush_output()
        raise SystemExit(stop.code or flushed) from None
    except BrokenPipeError:  # while an error was printed
        if not reader_is_gone():
            raise
        status = CLOSED_PIPE
    flushed = flush_output()
    return status or flushed


def run_command(argv: Sequence[str] | None) -> int:
    """Run a command and print its errors; returns the exit status."""
    words: Sequence[str] = ()
    try:
        arguments = parse(argv)
        words = arguments.get("overrides", ())
        names_code = arguments.get("trust_code") or any(map(CUSTOM_NORM.match, words))
        if names_code and os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # `python -m` has it, the installed command does not
        command = COMMANDS[arguments.pop("command")]
        with raise_on_stop_signals():
            return command.run(**arguments) or 0
    except UserError as error:
        return print_error(str(error))
    except OSError as error:
        if isinstance(error, BrokenPipeError) and reader_is_gone():
            return CLOSED_PIPE
        return print_error(os_message(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return print_error(
            f"out of memory ({first_line(error)}): lower data.micro_batch_size, for `measure` also rows=, or the size "
            "of the model; `estimate` predicts the memory of a run"
        )
    except Stopped as reason:
        if argv is None:
            ignore_until_exit()
        again = "without resume=false, " if "resume=false" in words else ""
        print(f"{reason}\n{again}run the same command again to resume", file=sys.stderr)
        # Lightning kills this process if a rank that it launched fails, so only the first rank reports the status.
        return reason.status if is_local_rank_zero() else 0
    except KeyboardInterrupt:
        print("interrupted: run the same command again", file=sys.stderr)
        return CTRL_C


def reader_is_gone() -> bool:
    """Whether stdout or stderr is a pipe that its reader has closed, as `head` does when it has what it wants."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # not a file
            poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def flush_output() -> int:
    """Flush stdout and stderr; return 0 or an exit status.

    A flush that fails at interpreter exit prints its own message and sets status 120.
    """
    status = 0
    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        try:
            stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            status = CLOSED_PIPE if isinstance(error, BrokenPipeError) else print_error(f"{name}: {error.strerror}")
    return status


def print_error(message: str) -> int:
    """Print every line of an error; returns the exit status."""
    for line in message.splitlines():
        sys.stderr.write(f"error: {line}\n")  # one write, because ranks share stderr
    return 2


def parse(argv: Sequence[str] | None) -> dict[str, Any]:
    """Parse a command line; overrides may follow an option, as in `fit norm=lns -m seed=1,2`.

    Raises:
        UserError: a key is given twice.
    """
    top = parser()
    word = next(iter(sys.argv[1:] if argv is None else argv), "-")
    if not word.startswith("-") and word not in COMMANDS:
        top.error(f"{word!r} is not a command: {nearest(word, COMMANDS)}")
    known, rest = top.parse_known_args(argv)
    arguments = vars(known)
    del arguments["print_completion"]  # it has ended the process
    positional = next((name for name in ("overrides", "words") if name in arguments), None)
    if any(word.startswith("-") for word in rest) or (rest and positional is None):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if positional is not None:
        arguments[positional] = [*arguments[positional], *rest]
        check_no_repeats(arguments[positional])
    return arguments
