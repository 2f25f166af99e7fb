"""The pages: the parameters of each, and what its template receives."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Final
from urllib.parse import quote

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from squidstep_redis import InvalidArgumentError, StepExplanation, StepRunNotFoundError, StepStatus
from squidstep_redis.web.guard import root_of
from squidstep_redis.web.live import Hub, Latest, TooManyViewersError, version_of_overview, version_of_run
from squidstep_redis.web.looks import format_look, last_look, parse_look, set_look
from squidstep_redis.web.payloads import NAMES, SHOWN_CHARACTERS, shown_payloads, shown_traceback, whole_payload
from squidstep_redis.web.reads import FAILURES_PER_PAGE, STEPS_PER_PAGE, FailureGroup, Reader, RunSearch, group_by_type
from squidstep_redis.web.rendering import STATIC_TYPES, Links, render, static_files
from squidstep_redis.web.settings import WebSettings

_ROWS_PER_GROUP: Final = 10
_SPANS: Final = {
    "hour": timedelta(hours=1),
    "day": timedelta(days=1),
    "week": timedelta(weeks=1),
    "month": timedelta(days=30),
}
_TICKS: Final = 4  # at most one more is drawn
_STATIC_SECONDS: Final = 86_400  # their addresses change with their content
_NO_RUN: Final = "it was never begun, has expired, or was deleted; or it is in a store with another prefix"
_NO_STEP: Final = "it has neither been scheduled nor begun"
# What an action reports after the redirect to the page.
NOTICES: Final = {
    "retried": "The step is pending. The store itself delivers nothing: deliver the step again from your queue.",
    "retried-run": "The failed steps of the run are pending. Deliver them again from your queue.",
    "released": "The step is pending. Deliver it again from your queue.",
    "cancelled": "The run is cancelled: no step of it begins until it is resumed.",
    "resumed": "The run is resumed: its steps can begin again. Deliver them from your queue.",
}


class Pages:
    """The handlers of GET requests."""

    def __init__(self, settings: WebSettings, hub: Hub) -> None:
        self._settings = settings
        self._reader = Reader(settings.store)
        self._overview = Latest(self._reader.overview)
        self._hub = hub

    async def overview(self, request: Request) -> Response:
        """Shows the state of the whole store."""
        is_update = "part" in request.query_params
        seen = await (self._overview.recent() if is_update else self._overview.fresh())
        text = last_look(request)
        look = parse_look(self._settings, text)
        version = version_of_overview(seen)
        links = Links(root_of(request))
        context = {
            "seen": seen,
            "look": look,
            "changes": look.changes(seen.counts) if look is not None else None,
            "created": await self._reader.created_since(look.at) if look is not None else None,
            "now": datetime.now(UTC),
            "events": links("events", known=version),
            "fragment": links("", part="live", look=text if look is not None else None),
        }
        response = await render(request, self._settings, "overview", context)
        if not is_update:
            set_look(request, response, format_look(self._settings, seen.counts, seen.read_at))
        return response

    async def runs(self, request: Request) -> Response:
        """Lists runs, and searches them."""
        query = request.query_params
        now = datetime.now(UTC)
        within = query.get("within") or None
        if within not in (None, *_SPANS):
            raise InvalidArgumentError("within", f"must be one of {', '.join(_SPANS)}")
        since = now - _SPANS[within] if within else None
        labels = [text for text in map(str.strip, query.getlist("label")) if text]
        search = RunSearch(_labels(labels), query.get("q", "").strip(), query.get("status") or None, since)
        found = await self._reader.runs(search, query.get("cursor") or None)
        context = {
            "search": search,
            "labels": labels,
            "within": within,
            "spans": list(_SPANS),
            "statuses": list(map(str, StepStatus)),
            "found": found.page,
            "exact": found.exact,
            "total": found.total,
            "is_first": "cursor" not in query,
            "now": now,
        }
        return await render(request, self._settings, "runs", context)

    async def run(self, request: Request) -> Response:
        """Shows one run."""
        run_id = _named(request, "id")
        after = _count(request, "after")
        view = await self._reader.run(run_id, after)
        if view is None:
            raise StepRunNotFoundError(run_id, None, _NO_RUN)
        links = Links(root_of(request))
        summary = view.explained.summary
        shown = view.after + view.completed
        total = summary.counts[StepStatus.COMPLETED]
        is_cancelled = summary.cancel_reason is not None
        is_so = {
            "cancelled": is_cancelled,
            "resumed": not is_cancelled,
            "retried-run": not summary.counts[StepStatus.FAILED],
        }
        context = {
            "run_id": run_id,
            "view": view,
            "summary": summary,
            "now": view.explained.read_at,
            "groups": _by_reason(view.explained.steps),
            "ticks": view.timeline.ticks(_TICKS),
            "has_earlier": after > 0,
            "has_later": view.completed == STEPS_PER_PAGE and shown < total,
            "earlier": max(after - STEPS_PER_PAGE, 0),
            "later": shown,
            "total": total,
            "notice": _notice(request, is_so),
            "events": links("events", run=run_id, known=version_of_run(view.explained)),
            "fragment": links("run", id=run_id, after=after or None, part="live"),
        }
        return await render(request, self._settings, "run", context)

    async def step(self, request: Request) -> Response:
        """Shows one step, and its payloads if the viewer may see them."""
        run_id, step = _named(request, "run"), _named(request, "step")
        may_see = await self._settings.allows(request, "payloads")
        view = await self._reader.step(run_id, step, payloads=may_see)
        if view is None:
            raise StepRunNotFoundError(run_id, step, _NO_STEP)
        is_pending = view.explained.status is StepStatus.PENDING
        # Decoding and rendering a large payload takes a while.
        payloads = [] if view.step_run is None else await asyncio.to_thread(shown_payloads, view.step_run)
        context = {
            "run_id": run_id,
            "step": step,
            "view": view,
            "payloads": payloads,
            "traceback": [] if view.step_run is None else shown_traceback(view.step_run),
            "may_see_payloads": may_see,
            "limit": SHOWN_CHARACTERS,
            "now": view.read_at,
            "notice": _notice(request, dict.fromkeys(("retried", "released"), is_pending)),
        }
        return await render(request, self._settings, "step", context)

    async def payload(self, request: Request) -> Response:
        """Sends a whole payload as a file."""
        run_id, step, name = _named(request, "run"), _named(request, "step"), _named(request, "name")
        if name not in NAMES:
            raise HTTPException(404, f"A payload is one of {', '.join(NAMES)}.")
        step_run = await self._reader.step_run(run_id, step)
        content = None if step_run is None else await asyncio.to_thread(whole_payload, step_run, name)
        if content is None:
            raise StepRunNotFoundError(run_id, step, f"it has no {name}")
        # Some characters cannot be in a header, and others would be folders.
        file = re.sub(r"[^\w.-]", "_", f"{run_id}.{step}.{name}")[-120:].lstrip(".") + ".json"
        headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(file)}"}
        return Response(content, media_type="application/json", headers=headers)

    async def failed(self, request: Request) -> Response:
        """Lists failed steps, grouped by the types of their errors."""
        query = request.query_params
        prefix, step, type_ = query.get("q", "").strip(), query.get("step") or None, query.get("type") or None
        cursor = query.get("cursor") or None
        failures = await self._reader.failures(prefix, step, cursor)
        groups = [group for group in group_by_type(failures) if type_ in (None, group.type)]
        context = {
            "groups": groups,
            "rows": _ROWS_PER_GROUP if type_ is None else FAILURES_PER_PAGE,
            "prefix": prefix,
            "step": step,
            "type": type_,
            "cursor": cursor,
            "spans": _spans(groups),
            "shown": len(failures),
            "next": failures.cursor,
            "retried": _count(request, "retried") if "retried" in query else None,
            "refused": _count(request, "refused"),
            "now": datetime.now(UTC),
        }
        return await render(request, self._settings, "failed", context)

    async def events(self, request: Request) -> Response:
        """Streams the changes of a run, or of the overview, as server-sent events."""
        run_id = request.query_params.get("run")
        known = request.headers.get("last-event-id") or request.query_params.get("known", "")

        async def version() -> str:
            if run_id:
                return version_of_run(await self._reader.explanation(run_id))
            return version_of_overview(await self._overview.fresh())

        try:
            stream: AsyncIterator[str] = self._hub.stream(f"run {run_id}" if run_id else "", known, version)
        except TooManyViewersError:
            raise HTTPException(503, "Too many pages are being updated. Reload the page by hand.") from None
        headers = {"X-Accel-Buffering": "no"}  # nginx would buffer the events
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)

    async def static(self, request: Request) -> Response:
        """Sends a static file."""
        name = request.path_params["name"]
        if name not in STATIC_TYPES:
            raise HTTPException(404, "There is no such file.")
        headers = {"Cache-Control": f"public, max-age={_STATIC_SECONDS}"}
        return Response(static_files()[name][0], media_type=STATIC_TYPES[name], headers=headers)


def _labels(texts: list[str]) -> dict[str, str]:
    """Returns labels of texts such as `tenant=acme`."""
    labels: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or labels.get(name, value) != value:
            raise InvalidArgumentError("label", f"must be NAME=VALUE, each name once, not {text!r}")
        labels[name] = value
    return labels


def _named(request: Request, name: str) -> str:
    """Returns a parameter that must be there."""
    value = request.query_params.get(name)
    if not value:
        raise InvalidArgumentError(name, "is missing from the address of the page")
    return value


def _count(request: Request, name: str) -> int:
    """Returns a parameter that is a count; 0 if it is not there."""
    text = request.query_params.get(name, "0")
    if not (text.isascii() and text.isdigit() and len(text) <= 7):
        raise InvalidArgumentError(name, "must be a number of at most seven digits")
    return int(text)


def _notice(request: Request, is_so: Mapping[str, bool]) -> str | None:
    """Returns what an action reports, while it is so: the page may be loaded again later, as by the back button."""
    done = request.query_params.get("done", "")
    return NOTICES[done] if is_so.get(done) else None


def _by_reason(explained: list[StepExplanation]) -> list[tuple[str, list[StepExplanation]]]:
    """Groups explained steps by their reasons, in the order in which they are given."""
    groups: dict[str, list[StepExplanation]] = {}
    for each in explained:
        groups.setdefault(each.reason, []).append(each)
    return list(groups.items())


def _spans(groups: list[FailureGroup]) -> dict[str, tuple[str, str]]:
    """Returns when the oldest and the newest failure of each group happened: a retry leaves out those beyond."""
    found: dict[str, tuple[str, str]] = {}
    for group in groups:
        ended = [each.ended_at for each in group.step_runs if each.ended_at is not None]
        found[group.type] = (min(ended).isoformat(), max(ended).isoformat()) if ended else ("", "")
    return found
