"""Command-line options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import wraps
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click
import redis

from squidstep_redis import Codec, InvalidArgumentError, PlacedCodec
from squidstep_redis.escaping import escaped
from squidstep_redis.protocol.labels import labels_data

_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class Age(click.ParamType[timedelta] if TYPE_CHECKING else click.ParamType):
    """A time span such as 90d, 12h, or 3600 (seconds)."""

    name = "age"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        """Converts the text of an option."""
        match = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)([smhdw]?)", str(value))
        try:
            if match is None:
                raise ValueError
            return timedelta(**{_UNITS[match[2] or "s"]: float(match[1])})
        except (ValueError, OverflowError):  # the latter for more weeks than a timedelta can have
            self.fail(f"{value!r} is not an age: use 90d, 12h, or 3600 (seconds)", param, ctx)


class Since(click.ParamType[datetime] if TYPE_CHECKING else click.ParamType):
    """A moment: an age such as 2h, by this machine's clock, or a time such as 2026-11-27T08:00, in UTC by default."""

    name = "since"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """Converts the text of an option."""
        if isinstance(value, datetime):
            return value
        try:
            moment = datetime.fromisoformat(str(value)) if "-" in str(value) else None
            moment = moment or datetime.now(UTC) - Age().convert(value, param, ctx)
        except (ValueError, OverflowError, click.BadParameter):
            self.fail(f"{value!r} is neither an age such as 2h nor a time such as 2026-11-27T08:00", param, ctx)
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


class StoreOptions(NamedTuple):
    """The server, the key prefix and the codec of the store that a command works on."""

    url: str
    prefix: str
    codec: Codec | PlacedCodec | None = None

    @property
    def server(self) -> str:
        """The server's address and database. Nothing else of the URL is ever shown: it may contain the password."""
        redis_py: Any = redis  # parts of its types are unknown
        options = redis_py.connection.parse_url(self.url)
        if "path" in options:
            address = str(options["path"])
        else:
            address = f"{options.get('host', 'localhost')}:{options.get('port', 6379)}"
        return f"{address}, database {options.get('db', 0)}"


def _load_codec(context: click.Context, param: click.Parameter, name: str | None) -> Any:
    """Imports the codec that `--codec` names."""
    del context
    if name is None:
        return None
    module, _, attribute = name.partition(":")
    try:
        codec = getattr(import_module(module), attribute)
        return codec() if callable(codec) else codec
    except Exception as error:  # the module may raise anything
        problem = f"{name!r} is not MODULE:NAME of a codec: {type(error).__name__}: {error}"
        raise click.BadParameter(escaped(problem), param=param) from error


def store_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds `--url`, `--prefix` and `--codec`. The command receives them as one `StoreOptions`, its first argument."""

    @click.option(
        "-u",
        "--url",
        envvar=["SQUIDSTEP_REDIS_URL", "RQ_REDIS_URL"],
        default="redis://localhost:6379",
        show_default=True,
        show_envvar=True,
        help="The server, or any node of a cluster: redis://, rediss:// or unix://.",
    )
    @click.option(
        "--prefix",
        envvar="SQUIDSTEP_PREFIX",
        default="squidstep",
        show_default=True,
        show_envvar=True,
        help="The prefix of the store's keys.",
    )
    @click.option(
        "--codec",
        envvar="SQUIDSTEP_CODEC",
        callback=_load_codec,
        metavar="MODULE:NAME",
        show_envvar=True,
        help="The store's codec, or a function that returns it, in a module that Python can import.",
    )
    @wraps(command)
    def with_store_options(url: str, prefix: str, codec: Any, **rest: object) -> None:
        command(StoreOptions(url, prefix, codec), **rest)

    return with_store_options


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Print what would change, and change nothing.")
yes_option = click.option("-y", "--yes", is_flag=True, help="Do not ask for confirmation.")
run_prefix_option = click.option("--run-prefix", default="", help="Only runs whose id starts with this.")


def _parse_labels(context: click.Context, param: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    """Returns the labels of `--label NAME=VALUE`."""
    del context
    labels: dict[str, str] = {}
    for text in given:
        name, _, value = text.partition("=")
        if not (name and value):
            raise click.BadParameter(escaped(f"{text!r} is not NAME=VALUE, such as tenant=acme"), param=param)
        if name in labels:
            raise click.BadParameter(
                escaped(f"{name!r} is given twice; a run has one value of each label"), param=param
            )
        labels[name] = value
    try:
        labels_data(labels)
    except InvalidArgumentError as error:
        raise click.BadParameter(escaped(error.problem), param=param) from None
    return labels


label_option = click.option(
    "--label",
    "labels",
    multiple=True,
    metavar="NAME=VALUE",
    callback=_parse_labels,
    help="Only runs with this label. Several: only runs with all of them.",
)


def since_option(what: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds `--since`.

    Args:
        what: What happened since then, such as `steps that failed`.
    """
    text = f"Only {what} since then: 2h or 90d ago, or 2026-11-27T08:00 (UTC)."
    return click.option("--since", type=Since(), metavar="TIME", help=text)
