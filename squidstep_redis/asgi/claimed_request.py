"""One request under its claim: the application's response is held back until the claim has stored it and ended."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from squidstep_redis import AsyncClaim, PayloadError, ServerError, SquidstepError, StaleStepRunError
from squidstep_redis.asgi.messages import Message, RequestReader, Response, Send, problem, values_of

_CANCELLED_SECONDS: Final = 1.0  # for the end of the claim, if the request is cancelled
_logger: Final = logging.getLogger("squidstep_redis.asgi")


@dataclass(frozen=True)
class ResponseRules:
    """The settings for responses; see IdempotencyMiddleware."""

    retry_statuses: frozenset[int]
    unstored_headers: frozenset[bytes]
    max_bytes: int
    unstorable: Literal["refuse", "pass"]
    docs_url: str | None


class ClaimedRequest:
    """The `receive` and `send` of the application, for one request whose claim this delivery holds.

    A response is held back, stored, and sent. It is stored as soon as it is whole, because an application may do more
    work in the background after its response.

    Attributes:
        is_refused: whether the client received a response other than the application's, which may still be sending.
        unrecorded: why the claim could not be ended in time; the response was sent nevertheless.
    """

    def __init__(self, claim: AsyncClaim, request: RequestReader, send: Send, rules: ResponseRules) -> None:
        self.is_refused = False
        self.unrecorded: ServerError | None = None
        self._claim = claim
        self._request = request
        self._send = send
        self._rules = rules
        self._start: Message | None = None
        self._body = bytearray()
        self._ending: Callable[[], Awaitable[object]] | None = None
        self._is_replayed = False
        self._decided = asyncio.Event()  # what the client receives

    async def receive(self) -> Message:
        """Returns the request. It hides that the client disconnects, so that a retry finds the response."""
        if not self._is_replayed:
            self._is_replayed = True
            return await self._request.receive()
        await self._decided.wait()
        return {"type": "http.disconnect"} if self.is_refused else await self._request.receive()

    async def send(self, message: Message) -> None:
        """Accepts a message of the application's response."""
        if self.is_refused:
            raise OSError("the client received another response")  # as after a disconnect
        if self._decided.is_set():
            await self._send(message)
        elif message["type"] == "http.response.start":
            # A copy in plain types: headers may be an iterator, a status a member of HTTPStatus, and the application
            # may continue to use its message.
            headers = [(bytes(name), bytes(value)) for name, value in message.get("headers", ())]
            self._start = {**message, "status": int(message["status"]), "headers": headers}
        elif message["type"] == "http.response.body" and self._start is not None:
            await self._take_body(self._start, message)

    async def _take_body(self, start: Message, message: Message) -> None:
        has_more = message.get("more_body", False)
        is_first = not self._body
        self._body += message.get("body", b"")
        status, headers = start["status"], start["headers"]
        is_stream = has_more and is_first and next(values_of(headers, b"content-length"), None) is None
        if status in self._rules.retry_statuses:
            await self._pass_on(await self._end(self._allow_retry(status)), has_more)
        elif is_stream or len(self._body) > self._rules.max_bytes:
            await self._give_up(status, "it is a stream" if is_stream else "its body is too large", has_more)
        elif not has_more:
            output = Response(status, headers, bytes(self._body)).output(self._rules.unstored_headers)
            try:
                other = await self._end(lambda: self._claim.complete(output))
            except PayloadError as error:
                await self._give_up(status, str(error), has_more)
            else:
                await self._pass_on(other, has_more)

    def _allow_retry(self, status: int) -> Callable[[], Awaitable[object]]:
        """Returns how to end the claim if a retry executes again: a refusal by the application is not its failure."""
        if status < 500:
            return self._claim.release
        return lambda: self._claim.fail({"type": "HTTPResponse", "message": f"status {status}"})

    async def _give_up(self, status: int, reason: str, has_more: bool) -> None:
        """Makes the step fail permanently: its response cannot be stored, and its work must not be repeated."""
        _logger.warning("%s: the response with status %d cannot be stored: %s", self._claim.step_run, status, reason)
        error = {"type": "UnstorableResponse", "message": f"status {status}: {reason}"}
        other = await self._end(lambda: self._claim.fail(error, final=True))
        if other is None and self._rules.unstorable == "refuse":
            detail = "The request was executed, but its response cannot be stored. A retry does not execute it again."
            other = problem(500, "The response cannot be stored", detail, self._rules.docs_url)
        await self._pass_on(other, has_more)

    async def _end(self, ending: Callable[[], Awaitable[Any]]) -> Response | None:
        """Ends the claim; if the claim was lost, returns what the client receives instead of the response."""
        try:
            await _uncancelled(ending)
        except PayloadError:
            raise
        except StaleStepRunError:
            return outstanding(None, self._rules.docs_url)
        except SquidstepError as error:
            _logger.error("%s: the response is sent although it is not stored: %s", self._claim.step_run, error)
            if isinstance(error, ServerError):
                self.unrecorded, self._ending = error, ending
            return None
        if self._claim.lost.is_set() and self._claim.output is not None:
            return Response.replay_of(self._claim.output)
        return None

    async def _pass_on(self, other: Response | None, has_more: bool) -> None:
        """Sends the response up to here, or another one."""
        self.is_refused = other is not None and has_more
        if other is not None:
            try:
                await other.send(self._send)
            finally:
                self._decided.set()  # only now: an application that sees a disconnect may cancel this
            return
        self._decided.set()
        if self._start is not None:
            await self._send(self._start)
            await self._send({"type": "http.response.body", "body": bytes(self._body), "more_body": has_more})

    async def finish(self) -> None:
        """Checks that the application has responded; ends the claim if that was not possible before.

        Raises:
            RuntimeError: the application has returned without a whole response.
            ServerError: the claim cannot be ended.
        """
        if not self._decided.is_set():
            raise RuntimeError("the application returned without a whole response")
        if self._ending is not None:
            try:
                await self._ending()
            except ServerError as error:
                self.unrecorded = error
                raise
            except SquidstepError as error:
                _logger.error("%s: the response is not stored: %s", self._claim.step_run, error)


async def _uncancelled(ending: Callable[[], Awaitable[Any]]) -> None:
    """Ends a claim, even if this task is cancelled meanwhile: the work is done, and a retry must not repeat it."""
    task = asyncio.ensure_future(ending())
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task}, timeout=_CANCELLED_SECONDS)
        raise


def outstanding(retry_in: float | None, docs_url: str | None) -> Response:
    """Returns the response for the time while another request with the same key is executing.

    Args:
        retry_in: seconds until its lease expires; None: unknown.
        docs_url: where the use of keys is documented; None: nowhere.
    """
    detail = "Another request with the same key is being processed. Retry later to receive its response."
    return problem(409, "A request is outstanding for this idempotency key", detail, docs_url, retry_in or 0.0)
