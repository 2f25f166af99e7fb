"""The changes that the page's forms make. Each request is checked, changes the store, and is redirected to a page."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final
from urllib.parse import parse_qs

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from squidstep_redis import (
    InvalidArgumentError,
    ServerError,
    SquidstepError,
    StaleStepRunError,
    StepRun,
    StepRunNotFoundError,
    StepStatus,
)
from squidstep_redis.web.guard import check_form, root_of
from squidstep_redis.web.reads import Reader, group_by_type
from squidstep_redis.web.rendering import Links
from squidstep_redis.web.settings import WebSettings

_MAX_FORM: Final = 65_536  # bytes
_OWNER: Final = "retry by the web page"  # owner of the attempt that a retry adds to the history


class Actions:
    """The handlers of POST requests."""

    def __init__(self, settings: WebSettings) -> None:
        self._settings = settings
        self._store = settings.store
        self._reader = Reader(settings.store)

    async def retry(self, request: Request) -> Response:
        """Makes a failed step pending."""
        form = await self._form(request)
        run_id, step = _required(form, "run"), _required(form, "step")
        current = await self._reader.step_run(run_id, step)
        if current is not None and current.status is StepStatus.FAILED and not _is_shown(form, current):
            problem = f"it has failed again, in attempt {current.attempt}, since the page showed it"
            raise StaleStepRunError(current, f"the step was not retried, because {problem}. Nothing was written")
        await self._store.retry_step(run_id, step, owner=_OWNER)
        return _see(request, "step", run=run_id, step=step, done="retried")

    async def retry_run(self, request: Request) -> Response:
        """Makes the failed steps of a run pending."""
        form = await self._form(request)
        run_id = _required(form, "run")
        await self._store.retry_run(run_id, owner=_OWNER)
        return _see(request, "run", id=run_id, done="retried-run")

    async def retry_group(self, request: Request) -> Response:
        """Makes the failed steps of a group pending: the steps that the page showed, and no newer or older ones."""
        form = await self._form(request)
        prefix, step, type_ = form.get("q", ""), form.get("step") or None, _required(form, "type")
        since, until = _moment(form, "since"), _moment(form, "until")
        failures = await self._reader.failures(prefix, step, form.get("cursor") or None)
        chosen = [
            each
            for group in group_by_type(failures)
            if group.type == type_
            for each in group.step_runs
            if each.ended_at is not None and since <= each.ended_at <= until
        ]
        calls = [self._store.calls.retry_step(each.run_id, each.step, owner=_OWNER) for each in chosen]
        results = await self._store.batch(calls) if calls else []
        for result in results:
            if isinstance(result, ServerError):
                raise result
        refused = sum(isinstance(result, SquidstepError) for result in results)
        return _see(request, "failed", q=prefix, step=step, retried=len(results) - refused, refused=refused or None)

    async def release(self, request: Request) -> Response:
        """Makes a running step pending, if it still has the claim that the page showed."""
        form = await self._form(request)
        run_id, step, attempt = _required(form, "run"), _required(form, "step"), _required(form, "attempt")
        current = await self._reader.step_run(run_id, step)
        if current is None:
            raise StepRunNotFoundError(run_id, step, "there is no such step run; nothing was written")
        if current.status is not StepStatus.RUNNING or not _is_shown(form, current):
            problem = f"it is {current.status} in attempt {current.attempt}, not running in attempt {attempt}"
            if current.status is StepStatus.RUNNING and str(current.attempt) == attempt:
                problem = f"it is running in a different attempt {attempt}, which began at {_began(current)}"
            raise StaleStepRunError(current, f"the step was not released, because {problem}. Nothing was written")
        # Its id would also stand for a worker that has taken over since it was read.
        await self._store.release_step(current.with_claim())
        return _see(request, "step", run=run_id, step=step, done="released")

    async def cancel(self, request: Request) -> Response:
        """Cancels a run."""
        form = await self._form(request)
        run_id = _required(form, "run")
        if not await self._store.cancel_run(run_id, form.get("reason", "").strip() or None):
            raise StepRunNotFoundError(run_id, None, "there is no such run; nothing was written")
        return _see(request, "run", id=run_id, done="cancelled")

    async def resume(self, request: Request) -> Response:
        """Resumes a cancelled run."""
        form = await self._form(request)
        run_id = _required(form, "run")
        if not await self._store.resume_run(run_id):
            raise StepRunNotFoundError(run_id, None, "there is no such run; nothing was written")
        return _see(request, "run", id=run_id, done="resumed")

    async def _form(self, request: Request) -> dict[str, str]:
        """Returns the fields of the form, and of its address, after checking that it comes from the page."""
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > _MAX_FORM:
                raise HTTPException(413, "The form is too large. Nothing was changed.")
        try:
            fields = parse_qs(body.decode("ascii"), keep_blank_values=True, max_num_fields=20)
        except ValueError:
            raise HTTPException(400, "The form is malformed. Nothing was changed.") from None
        form = {name: values[-1] for name, values in fields.items()}
        check_form(request, self._settings, form.get("token", ""))
        return {**form, **request.query_params}


def _is_shown(form: dict[str, str], current: StepRun) -> bool:
    """Returns whether the page showed this attempt. Those of a run that was created again have the same numbers."""
    return (str(current.attempt), _began(current)) == (form.get("attempt"), form.get("began", ""))


def _began(current: StepRun) -> str:
    return "" if current.started_at is None else current.started_at.isoformat()


def _required(form: dict[str, str], name: str) -> str:
    value = form.get(name)
    if not value:
        raise InvalidArgumentError(name, "is missing from the form")
    return value


def _moment(form: dict[str, str], name: str) -> datetime:
    try:
        moment = datetime.fromisoformat(_required(form, name))
    except ValueError:
        raise InvalidArgumentError(name, "must be a time") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _see(request: Request, page: str, **parameters: object) -> Response:
    """Redirects to a page, so that loading it again does not repeat the action."""
    return RedirectResponse(Links(root_of(request))(page, **parameters), 303)
