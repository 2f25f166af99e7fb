"""Templates and static files, and what every page has in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Any, Final
from urllib.parse import quote, urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from starlette.requests import Request
from starlette.responses import HTMLResponse

from squidstep_redis import RunSummary, StepRun, StepStatus
from squidstep_redis.durations import format_duration
from squidstep_redis.escaping import escaped
from squidstep_redis.formatting import cut, error_line, format_command, format_headline, format_time, last_error_line
from squidstep_redis.web.guard import form_token, root_of, set_form_cookie
from squidstep_redis.web.settings import WebSettings

_PACKAGE: Final = "squidstep_redis.web"
STATIC_TYPES: Final = {"style.css": "text/css", "live.js": "text/javascript", "icon.svg": "image/svg+xml"}
_TEMPLATES: Final = ("overview", "runs", "run", "step", "failed", "problem")
_SHOWN_ERROR: Final = 240  # characters
_SHOWN_NAME: Final = 120
# The order in which counts are listed.
_ORDER: Final = (StepStatus.FAILED, StepStatus.RUNNING, StepStatus.PENDING, StepStatus.COMPLETED)


@cache
def static_files() -> dict[str, tuple[bytes, str]]:
    """Returns the content and a version of each static file."""
    folder = files(_PACKAGE) / "static"
    contents = {name: (folder / name).read_bytes() for name in STATIC_TYPES}
    return {name: (content, sha256(content).hexdigest()[:12]) for name, content in contents.items()}


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader(_PACKAGE, "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Jinja escapes what HTML reads. This escapes what a terminal, or a person who copies the text, would misread.
        finalize=_finalize,
    )
    filters: dict[str, Any] = environment.filters
    filters |= {
        "age": _age,
        "clock": format_time,
        "code": _code,
        "counts": _counts,
        "cut": _cut,
        "duration": format_duration,
        "error": _error,
        "error_text": _error_text,
        "headline": format_headline,
        "number": _number,
        "words": _words,
    }
    variables: dict[str, Any] = environment.globals
    variables["command_of"] = format_command
    return environment


def check_templates() -> None:
    """Compiles every template and reads every static file, so that a missing one is found at once."""
    for name in _TEMPLATES:
        _environment().get_template(f"{name}.html")
    static_files()


class Links:
    """The addresses of the pages. Names of runs and steps are parameters, so that they may be any text."""

    def __init__(self, root: str) -> None:
        self._root = quote(root)

    def __call__(self, page: str, /, **parameters: object) -> str:
        """Returns the path of a page; parameters that are None or empty are left out, and a list is repeated."""
        given = {name: value for name, value in parameters.items() if value not in (None, "", [])}
        query = f"?{urlencode(given, doseq=True)}" if given else ""
        return f"{self._root}/{page}{query}"

    def static(self, name: str) -> str:
        """Returns the path of a static file, which changes with its content."""
        return self(f"static/{name}", v=static_files()[name][1])


async def render(
    request: Request, settings: WebSettings, name: str, context: dict[str, Any], status: int = 200
) -> HTMLResponse:
    """Renders a page; only its live region if the request asks for that.

    Args:
        request: the request.
        settings: the application's settings.
        name: the name of the template.
        context: its variables.
        status: the status code.
    """
    may_act = name != "problem" and await settings.allows(request, "act")
    token, cookie = form_token(request, settings) if may_act else ("", "")
    text = (
        _environment()
        .get_template(f"{name}.html")
        .render(
            {
                "frame": "fragment.html" if request.query_params.get("part") == "live" else "base.html",
                "link": Links(root_of(request)),
                "page": name,
                "title": settings.title,
                "may_act": may_act,
                "token": token,
                "notice": None,
                **context,
            }
        )
    )
    response = HTMLResponse(text, status)
    if may_act:
        set_form_cookie(request, response, cookie)
    return response


def _finalize(value: object) -> object:
    return escaped(value) if type(value) is str else value


def _age(moment: datetime | None, now: datetime) -> Markup:
    """Returns a moment as its distance from now; the moment itself is its title."""
    if moment is None:
        return Markup("<span>unknown</span>")
    seconds = (moment - now).total_seconds()
    text = f"in {format_duration(seconds)}" if seconds > 0 else f"{format_duration(-seconds)} ago"
    full = f"{format_time(moment)} UTC"
    return Markup('<time datetime="{}" title="{}">{}</time>').format(moment.isoformat(), full, text)


def _code(lines: Iterable[str]) -> Markup:
    """Returns the lines of a payload: each is escaped, and the line breaks between them are kept."""
    return Markup("\n").join(escape(escaped(line)) for line in lines)


def _counts(summary: RunSummary) -> list[tuple[str, int]]:
    """Returns the statuses that steps of the run have, and the number of steps with each."""
    return [(str(status), summary.counts[status]) for status in _ORDER if summary.counts[status]]


def _cut(text: str, length: int = _SHOWN_NAME) -> str:
    return cut(escaped(text), length)


def _error(step_run: StepRun) -> str:
    return cut(last_error_line(step_run), _SHOWN_ERROR)


def _error_text(error: Mapping[str, Any], length: int = _SHOWN_ERROR) -> str:
    return cut(error_line(error), length)


def _number(number: int) -> str:
    return f"{number:,}"


def _words(text: str) -> str:
    return text.replace("_", " ")
