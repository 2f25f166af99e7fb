"""The entry point of `squidstep`, and the group of its commands.

This module imports neither click nor rich, so that it can name the missing extra. Each command's module is imported
when it is needed.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn

if TYPE_CHECKING:
    from types import FrameType

    import click


class _Source(NamedTuple):
    """The module and attribute that define a command, and the extra that installs its dependencies."""

    module: str
    attribute: str
    extra: str


_COMMANDS: Final = {
    "demo": _Source("squidstep_redis.demo.plain", "command", "demo"),
    "demo rq": _Source("squidstep_redis.demo.rq", "command", "demo"),
    **{
        name: _Source(f"squidstep_redis.cli.{module}", f"{name}_command", "cli")
        for module, names in {
            "listing": ("runs", "stuck", "failed", "stats"),
            "show": ("show",),
            "explain": ("explain",),
            "timeline": ("timeline",),
            "watch": ("watch",),
            "changes": ("retry", "release", "complete", "delete", "purge"),
            "cancel": ("cancel", "resume"),
            "transfer": ("export", "import", "fork"),
            "doctor": ("doctor",),
            "dashboard": ("dashboard",),
        }.items()
        for name in names
    },
    "web": _Source("squidstep_redis.cli.web", "web_command", "web"),
}
_FROM_EXTRAS: Final = ("click", "jinja2", "markupsafe", "rich", "rq", "starlette", "uvicorn")
_RECURSION_LIMIT: Final = 10_000  # payloads of 500 levels are stored; json and rich use several frames for each
_OUTPUT_FAILURES: Final = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_EXIT_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_EXIT_AGAIN_SECONDS: Final = (0.001, 0.25)  # first, and then again and again


class _SignalExit(SystemExit):
    """A signal terminated the program. It is not a KeyboardInterrupt: click would turn that into exit code 1."""


def main() -> None:
    """Runs the command line. The console script `squidstep` calls this."""
    for number in _EXIT_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, _exit_on_signal)
    sys.unraisablehook = _exit_later
    _prepare_streams()
    sys.setrecursionlimit(max(sys.getrecursionlimit(), _RECURSION_LIMIT))
    try:
        _run()
    except OSError as error:
        if error.errno not in _OUTPUT_FAILURES:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter would try to write again, and fail
        # A reader such as `head` may have closed the pipe.
        sys.exit(1 if error.errno == errno.EPIPE else f"squidstep: cannot write the output: {error.strerror}")
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        source = _COMMANDS.get(sys.argv[1] if len(sys.argv) > 1 else "", _COMMANDS["doctor"])
        sys.exit(f"squidstep: {_missing_extra(error, source)}")
    except _SignalExit as exit_:
        signal.setitimer(signal.ITIMER_REAL, 0)
        name = signal.Signals(int(str(exit_)) - 128).name
        print(f"squidstep: terminated by {name}", file=sys.stderr)  # noqa: T201 -- click may not be installed
        raise


def _run() -> None:
    """Runs the command, and writes the rest of its output while a failure can still be reported."""
    try:
        build_group()()
    finally:
        sys.stdout.flush()


def _prepare_streams() -> None:
    """Makes any text printable, even if the output's encoding lacks a character, or the caller closed a stream."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 -- for the whole process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def build_group() -> click.Group:
    """Builds the group of all commands.

    Raises:
        ModuleNotFoundError: click is not installed.
    """
    import click  # noqa: PLC0415 -- `main` reports it when it is missing

    class Group(click.Group):
        """Supports command names of two words, and imports a command when it is used."""

        def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 -- click's signature
            return list(_COMMANDS)

        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 -- click's signature
            if (source := _COMMANDS.get(cmd_name)) is None:
                return None
            try:
                return getattr(import_module(source.module), source.attribute)
            except ImportError as error:
                if (problem := _missing_extra(error, source)) is None:
                    raise
                return unavailable(cmd_name, problem)

        def resolve_command(
            self, ctx: click.Context, args: list[str]
        ) -> tuple[str | None, click.Command | None, list[str]]:
            words = " ".join(args[:2])
            return super().resolve_command(ctx, [words, *args[2:]] if words in _COMMANDS else args)

    def unavailable(name: str, problem: str) -> click.Command:
        """Builds a command that only reports its missing extra. The other commands stay usable."""
        return click.Command(
            name,
            callback=lambda: sys.exit(f"squidstep: {problem}"),
            params=[click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED, expose_value=False)],
            context_settings={"ignore_unknown_options": True},
            add_help_option=False,
            short_help=f"({problem})",
        )

    group = Group("squidstep", help="Command-line tools for squidstep_redis.")
    return click.version_option(package_name="squidstep-redis", prog_name="squidstep")(group)


def _missing_extra(error: ImportError, source: _Source) -> str | None:
    """Returns the message for a failed import, or None if installing an extra would not help."""
    if error.name is None:  # raised by squidstep_redis itself, such as for an RQ version that is too old
        return str(error)
    name = error.name.partition(".")[0]
    if name not in _FROM_EXTRAS or not isinstance(error, ModuleNotFoundError):
        return None
    return f"{name} is not installed: pip install 'squidstep_redis[{source.extra}]'"


def _exit_on_signal(number: int, _frame: object) -> NoReturn:
    """Unwinds the stack so that context managers clean up. Later signals are ignored."""
    for each in _EXIT_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise _SignalExit(128 + number)


def _exit_later(unraisable: sys.UnraisableHookArgs) -> None:
    """Raises the exception of a signal again if it came during a `__del__`, which discards exceptions."""
    error = unraisable.exc_value
    if not isinstance(error, _SignalExit):
        sys.__unraisablehook__(unraisable)
        return

    def exit_again(_number: int, frame: FrameType | None) -> None:
        while frame is not None and frame.f_code is not _exit_later.__code__:
            frame = frame.f_back
        # In this hook, the exception would be discarded, too. While an earlier one is handled, the program is ending.
        if frame is None and not isinstance(sys.exc_info()[1], _SignalExit):
            raise _SignalExit(*error.args)

    signal.signal(signal.SIGALRM, exit_again)
    signal.setitimer(signal.ITIMER_REAL, *_EXIT_AGAIN_SECONDS)
