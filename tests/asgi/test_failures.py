"""Failures: of the handler, the client, the process and the store."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from support.asgi import Client, Gate, Site, body_of, refuse_calls, respond
from support.backends import Bench

from squidstep_redis import (
    CorruptRunError,
    NotSentError,
    PermanentError,
    RefusedError,
    RetryLater,
    StepRun,
    StepRunStore,
)
from squidstep_redis.asgi.messages import fingerprint_of

RUN = "idempotency::key-1"
DISCONNECTED = {"type": "http.disconnect"}


class BrokenError(Exception):
    """An error of the handler."""


def raising(site: Site, error: BaseException) -> None:
    async def handler(body: bytes) -> tuple[int, bytes]:
        raise error

    site.handler = handler


class TestHandler:
    def test_after_an_exception_a_retry_of_the_same_request_executes(self, site: Site) -> None:
        raising(site, BrokenError("no bank"))
        with pytest.raises(BrokenError):
            site.request()
        error = site.step_run().last_error
        assert error is not None
        assert (error["type"].rpartition(".")[2], error["message"]) == ("BrokenError", "no bank")
        assert site.request(b"another body").status == 422
        site.handler = site.count
        assert [site.request().is_replay for _ in range(2)] == [False, True]
        assert site.step_run().attempt == 2

    def test_the_input_of_a_failed_request_stays_after_a_422(self, site: Site) -> None:
        raising(site, BrokenError())
        with pytest.raises(BrokenError):
            site.request(b"first")
        before = site.step_run()
        assert [site.request(b"other").status for _ in range(2)] == [422, 422]
        assert site.step_run() == before

    def test_a_permanent_error_is_not_retried(self, site: Site) -> None:
        raising(site, PermanentError("no such card"))
        with pytest.raises(PermanentError):
            site.request()
        again = site.request()
        assert (again.status, again.title) == (500, "The request failed permanently")
        assert site.request(b"another body").status == 422
        assert len(site.effects) == 1
        site.driven.retry_step(RUN, "request")
        site.handler = site.count
        assert site.request().status == 201

    def test_retry_later_delays_the_next_attempt(self, site: Site) -> None:
        raising(site, RetryLater(60))
        with pytest.raises(RetryLater):
            site.request()
        again = site.request()
        assert (again.status, again.title) == (503, "The request failed")
        assert 58 <= int(again.headers["retry-after"]) <= 60
        assert len(site.effects) == 1

    def test_exception_after_part_of_the_response_discards_the_part(self, site: Site) -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await body_of(receive)
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
            await send({"type": "http.response.body", "body": b"part", "more_body": True})
            raise BrokenError

        client = Client(site.behind_middleware(app))
        with pytest.raises(BrokenError):
            site.run(client.request())
        assert client.messages == []
        assert site.step_run().status == "failed"

    @pytest.mark.parametrize("starts", [True, False])
    def test_a_handler_without_a_whole_response_has_failed(self, site: Site, starts: bool) -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            if starts:
                await send({"type": "http.response.start", "status": 200, "headers": []})

        with pytest.raises(RuntimeError, match="without a whole response"):
            site.run(Client(site.behind_middleware(app)).request())
        assert site.step_run().status == "failed"

    def test_store_error_in_the_handler_counts_as_the_handlers_error(self, site: Site) -> None:
        raising(site, NotSentError("begin_step", "other", "step", "down", True))
        with pytest.raises(NotSentError):
            site.request()
        assert site.step_run().status == "failed"

    def test_a_cancelled_handler_has_failed_and_may_be_retried(self, site: Site) -> None:
        async def main() -> None:
            gate = site.handler = Gate()
            first = asyncio.create_task(site.client.request())
            await gate.entered.wait()
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first

        site.run(main())
        error = site.step_run().last_error
        assert error is not None
        assert error["type"].endswith("CancelledError")
        site.handler = site.count
        assert [site.request().is_replay for _ in range(2)] == [False, True]

    def test_a_response_is_stored_whenever_its_request_is_cancelled(self, site: Site) -> None:
        async def main(key: str, turns: int) -> None:
            responding = asyncio.Event()

            async def handler(body: bytes) -> tuple[int, bytes]:
                responding.set()
                return 200, b"done"

            site.handler = handler
            first = asyncio.create_task(site.client.request(key=key))
            await responding.wait()
            for _ in range(turns):  # of the event loop
                await asyncio.sleep(0)
            first.cancel()
            await asyncio.wait([first])
            again = await site.client.request(key=key)
            assert again is not None
            assert again.is_replay

        for turns in range(20):
            site.run(main(f"key-{turns}", turns))
        assert len(site.effects) == 20


class TestClient:
    def test_a_client_that_leaves_before_its_body_ends_executes_nothing(self, site: Site) -> None:
        async def main() -> None:
            scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"idempotency-key", b"key-1")]}
            messages = [{"type": "http.request", "body": b"{", "more_body": True}, DISCONNECTED]

            async def receive() -> Any:
                return messages.pop(0)

            async def send(message: Any) -> None:
                pytest.fail("nothing can be sent")

            await site.middleware(scope, receive, send)

        site.run(main())
        assert site.effects == []
        assert site.driven.get_run(RUN) == []

    def test_retry_of_a_disconnected_client_finds_the_response(self, site: Site) -> None:
        async def main() -> None:
            entered, gone = asyncio.Event(), asyncio.Event()

            async def app(scope: Any, receive: Any, send: Any) -> None:
                await body_of(receive)
                listener = asyncio.ensure_future(receive())  # as frameworks do, to stop work for a client that has left
                entered.set()
                await gone.wait()
                await asyncio.sleep(0)
                assert not listener.done()
                await respond(send, 200, b"done", [])
                assert await listener == DISCONNECTED

            client = Client(site.behind_middleware(app))
            first = asyncio.create_task(client.request(disconnect=gone))
            await entered.wait()
            gone.set()
            await first
            again = await client.request()
            assert again is not None
            assert (again.body, again.is_replay) == (b"done", True)

        site.run(main())


class TestLostClaims:
    def lose_claim(self, site: Site, bench: Bench, winner_completes: bool) -> Any:
        async def handler(body: bytes) -> tuple[int, bytes]:
            winner = await asyncio.get_running_loop().run_in_executor(None, self.take_over_from, bench)
            if winner_completes:
                output = {"status": 202, "headers": [[b"x-winner", b"yes"]], "body": b"of the winner"}
                await site.store.complete_step(winner, output)
            return 200, b"late"

        site.handler = handler
        return site.request()

    def take_over_from(self, bench: Bench) -> StepRun:
        client = bench.backend.connect()
        try:
            other = StepRunStore(client, prefix=bench.prefix)
            step_run = other.get_step_run(RUN, "request")
            assert step_run is not None
            other.expire_claim(step_run.id)
            winner = other.begin_step(RUN, "request", step_run.input, lease=60)
            assert winner.takeover
            return winner.step_run
        finally:
            client.close()

    def test_the_late_request_receives_the_response_of_the_winner(self, site: Site, bench: Bench) -> None:
        reply = self.lose_claim(site, bench, winner_completes=True)
        assert (reply.status, reply.body, reply.is_replay) == (202, b"of the winner", True)
        assert reply.headers["x-winner"] == "yes"

    def test_the_late_request_receives_409_while_the_winner_executes(self, site: Site, bench: Bench) -> None:
        reply = self.lose_claim(site, bench, winner_completes=False)
        assert (reply.status, reply.headers["retry-after"]) == (409, "1")
        assert site.request().status == 409
        assert len(site.effects) == 1

    def test_the_rest_of_a_late_response_is_dropped(self, site: Site, bench: Bench) -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await asyncio.get_running_loop().run_in_executor(None, self.take_over_from, bench)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"late", "more_body": True})
            await send({"type": "http.response.body", "body": b"later"})

        reply = site.run(Client(site.behind_middleware(app, unstorable="pass")).request())
        assert (reply.status, reply.title) == (409, "A request is outstanding for this idempotency key")


class TestProcess:
    def begin(self, site: Site) -> StepRun:
        """Leaves the state of a server that is killed between execution and completion."""
        scope = {"method": "POST", "path": "/charges"}
        fingerprint = fingerprint_of(scope, b"{}")
        return site.driven.begin_step(RUN, "request", scope, lease=0.05, fingerprint=fingerprint).step_run

    def test_retry_executes_again_after_the_lease_of_a_dead_server(self, site: Site, bench: Bench) -> None:
        bench.lapse(self.begin(site))
        assert site.request(b"another body").status == 422
        assert [site.request().is_replay for _ in range(2)] == [False, True]
        assert site.step_run().attempt == 2

    def test_the_lease_is_extended_while_the_handler_runs(self, bench: Bench) -> None:
        site = Site(bench, lease=0.3)

        async def main() -> None:
            extended = asyncio.Event()
            gate = site.handler = Gate()
            first = asyncio.create_task(site.client.request())
            await gate.entered.wait()
            site.store.on_event(lambda event: extended.set() if event.kind == "extend" else None)
            await extended.wait()
            gate.opened.set()
            reply = await first
            assert reply is not None
            assert reply.body == b"attempt 1"

        site.run(main())


class TestStore:
    @pytest.mark.parametrize("error", [NotSentError, RefusedError])
    def test_an_unreachable_store_refuses_requests(self, site: Site, error: Any) -> None:
        refuse_calls(site.store, "begin_step", 1, error)
        reply = site.request()
        assert (reply.status, reply.title) == (503, "Idempotency keys are unavailable")
        assert reply.headers["retry-after"] == "1"
        assert site.effects == []
        assert site.request().status == 201

    def test_an_unreachable_store_can_be_passed(self, bench: Bench) -> None:
        site = Site(bench, unreachable="pass")
        refuse_calls(site.store, "begin_step", 2)
        assert [site.request(b"whole").is_replay for _ in range(4)] == [False, False, False, True]
        assert site.effects == [b"whole"] * 3

    def test_corrupt_data_does_not_count_as_unreachable(self, bench: Bench) -> None:
        site = Site(bench, unreachable="pass")
        site.request()
        bench.backend.raw.hset(bench.keys(RUN)[0], "srequest", "nonsense")
        with pytest.raises(CorruptRunError):
            site.request()
        assert len(site.effects) == 1

    def test_response_that_cannot_be_stored_yet_is_sent_then_stored(
        self, site: Site, caplog: pytest.LogCaptureFixture
    ) -> None:
        refuse_calls(site.store, "complete_step", 1)
        with caplog.at_level(logging.ERROR, "squidstep_redis.asgi"):
            first = site.request()
        assert (first.status, first.is_replay) == (201, False)
        assert "the response is sent although it is not stored" in caplog.text
        assert site.request().is_replay

    def test_a_response_that_is_never_stored_is_sent(self, site: Site) -> None:
        refuse_calls(site.store, "complete_step", 2)
        assert site.request().status == 201
        assert site.step_run().status == "failed"  # an operator sees it; a retry executes again
        assert [site.request().is_replay for _ in range(2)] == [False, True]

    def test_a_failure_that_is_not_recorded_reaches_the_client(self, site: Site) -> None:
        async def handler(body: bytes) -> tuple[int, bytes]:
            refuse_calls(site.store, "fail_step", 10)
            return 502, b"upstream"

        site.handler = handler
        assert site.request().body == b"upstream"
        assert site.step_run().status == "running"  # until its lease expires

    def test_the_response_of_a_deleted_run_is_sent(self, site: Site) -> None:
        async def handler(body: bytes) -> tuple[int, bytes]:
            await site.store.delete_run(RUN)
            return 200, b"done"

        site.handler = handler
        assert site.request().body == b"done"
        again = site.request()
        assert (again.status, again.title) == (500, "The request failed permanently")
        assert len(site.effects) == 1

    @pytest.mark.parametrize("completed", [True, False])
    def test_a_cancelled_run_executes_nothing_until_it_is_resumed(self, site: Site, completed: bool) -> None:
        if not completed:
            raising(site, BrokenError())
            with pytest.raises(BrokenError):
                site.request()
            site.handler = site.count
        else:
            site.request()
        site.driven.cancel_run(RUN)
        reply = site.request()
        assert (reply.status, reply.is_replay) == ((201, True) if completed else (500, False))
        site.driven.resume_run(RUN)
        assert site.request().status == 201
