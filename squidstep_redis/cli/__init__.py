"""The command line: `squidstep COMMAND`. Each command is the `command` of a module of its own."""

from __future__ import annotations

import signal
import sys
from importlib import import_module
from keyword import iskeyword
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn

if TYPE_CHECKING:
    import click


class _Place(NamedTuple):
    """Where a command is, and the extra that brings what it needs."""

    module: str
    extra: str


_COMMANDS: Final = {
    "demo": _Place("squidstep_redis.demo.plain", "demo"),
    "demo rq": _Place("squidstep_redis.demo.rq", "demo"),
    **{
        name: _Place(f"squidstep_redis.cli.{name}{'_' * iskeyword(name)}", "cli")
        for name in (
            "runs",
            "show",
            "timeline",
            "watch",
            "stuck",
            "failed",
            "retry",
            "release",
            "delete",
            "purge",
            "export",
            "import",
            "doctor",
        )
    },
}
_BROUGHT: Final = ("click", "rich", "rq")  # by extras
_ENDINGS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Ended(SystemExit):
    """A signal ended the program. Not KeyboardInterrupt, of which click would make a plain failure."""


def main() -> None:
    """Runs the command line: the console script `squidstep`."""
    for number in _ENDINGS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it for us
            signal.signal(number, _end)
    try:
        group()()
    except ModuleNotFoundError as error:
        if error.name != "click":  # without which there are no commands
            raise
        place = _COMMANDS.get(sys.argv[1] if len(sys.argv) > 1 else "", _COMMANDS["doctor"])
        sys.exit(f"squidstep: {_missing(error, place)}")
    except _Ended as ended:
        name = signal.Signals(int(str(ended)) - 128).name
        print(f"squidstep: ended by {name}", file=sys.stderr)  # noqa: T201 -- click may not be there yet
        raise


def group() -> click.Group:
    """Makes the group of all commands.

    Raises:
        ModuleNotFoundError: the extra `cli` is not installed; the library works without.
    """
    import click  # noqa: PLC0415 -- `main` says so when it is missing

    class Group(click.Group):
        """Knows commands of two words beside those of one, and loads what is asked for alone."""

        def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 -- click's signature
            return list(_COMMANDS)

        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 -- likewise
            if (place := _COMMANDS.get(cmd_name)) is None:
                return None
            try:
                return import_module(place.module).command
            except ImportError as error:
                if (problem := _missing(error, place)) is None:
                    raise
                return unusable(cmd_name, problem)

        def resolve_command(
            self, ctx: click.Context, args: list[str]
        ) -> tuple[str | None, click.Command | None, list[str]]:
            words = " ".join(args[:2])
            return super().resolve_command(ctx, [words, *args[2:]] if words in _COMMANDS else args)

    def unusable(name: str, problem: str) -> click.Command:
        """Stands for a command whose extra is not installed, so that the others can be listed and used."""
        return click.Command(
            name,
            callback=lambda: sys.exit(f"squidstep: {problem}"),
            params=[click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED, expose_value=False)],
            context_settings={"ignore_unknown_options": True},
            add_help_option=False,
            short_help=f"({problem})",
        )

    made = Group("squidstep", help="Tools for squidstep_redis.")
    return click.version_option(package_name="squidstep-redis", prog_name="squidstep")(made)


def _missing(error: ImportError, place: _Place) -> str | None:
    """What to say of a module that could not be loaded; None if no extra would help."""
    if error.name is None:  # nothing that Python says: an RQ that is too old
        return str(error)
    name = error.name.partition(".")[0]
    if name not in _BROUGHT or not isinstance(error, ModuleNotFoundError):
        return None
    return f"{name} is not installed: pip install 'squidstep_redis[{place.extra}]'"


def _end(number: int, _frame: object) -> NoReturn:
    """Unwinds the program, whose context managers clean up; a second signal does not get in their way."""
    for ending in _ENDINGS:
        signal.signal(ending, signal.SIG_IGN)
    raise _Ended(128 + number)
