"""Exceptions as payloads: any exception becomes a bounded map of type, message and traceback."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest
from support.payloads import at_stack_depth
from support.records import begun, stored

from squidstep_redis import (
    MsgpackCodec,
    StepRunStore,
    StepStatus,
)
from squidstep_redis.protocol.codec import error_payload


class MuteError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no message")


class ExitingError(Exception):
    def __str__(self) -> str:
        raise SystemExit(1)

    @property
    def __notes__(self) -> list[str]:
        raise SystemExit(1)


class NumericError(Exception):
    def __str__(self) -> Any:
        return 5  # noqa: PLE0307 -- wrong on purpose


class ProxyError(Exception):
    """Delegates unknown attributes, as exceptions of some database drivers do; here that fails."""

    def __getattr__(self, name: str) -> Any:
        raise KeyError(name)


class NotedError(Exception):
    @property
    def __notes__(self) -> list[str]:
        raise RuntimeError("no notes")


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    """The exception as it is caught, with a traceback."""
    try:
        raise error from cause
    except BaseException as caught:
        return caught


def chained(links: int) -> BaseException:
    error = ValueError("link 0")
    for number in range(1, links):
        error = raised(ValueError(f"link {number}"), error)
    return error


def recursed(frames: int) -> BaseException:
    try:
        at_stack_depth(frames, lambda: 1 / 0)
    except ZeroDivisionError as error:
        return error
    raise AssertionError


EXCEPTIONS: dict[str, Callable[[], BaseException]] = {
    "plain": lambda: raised(ValueError("declined")),
    "never raised": lambda: ValueError("declined"),
    "without arguments": lambda: raised(ValueError()),
    "KeyboardInterrupt": lambda: raised(KeyboardInterrupt()),
    "SystemExit": lambda: raised(SystemExit(1)),
    "huge message": lambda: raised(ValueError("x" * 5_000_000)),
    "huge traceback": lambda: recursed(700),
    "chain": lambda: chained(3),
    "long chain": lambda: chained(500),
    "group": lambda: raised(ExceptionGroup("many", [ValueError(number) for number in range(1_000)])),
    "surrogates": lambda: raised(ValueError("caf\udce9")),
    "surrogate in its name": lambda: raised(type("Odd", (Exception,), {"__module__": "caf\udce9"})()),
    "__str__ raises": lambda: raised(MuteError()),
    "__str__ exits": lambda: raised(ExitingError()),
    "__str__ outputs no str": lambda: raised(NumericError()),
    "__getattr__ raises": lambda: raised(ProxyError()),
    "__notes__ raises": lambda: raised(NotedError()),
    "SyntaxError of bytes": lambda: raised(SyntaxError("bad", ("file", 1, 1, b"source"))),
}


class TestErrorPayload:
    @pytest.mark.parametrize("make", EXCEPTIONS.values(), ids=EXCEPTIONS)
    def test_any_exception_becomes_a_bounded_payload(self, make: Callable[[], BaseException]) -> None:
        payload = error_payload(make())

        assert {key: type(value) for key, value in payload.items()} == {"type": str, "message": str, "traceback": str}
        assert len(payload["message"]) <= 2_000
        assert len(payload["traceback"]) <= 8_000
        MsgpackCodec().encode(payload)

    def test_payload_names_the_exception_and_its_origin(self) -> None:
        payload = error_payload(raised(MuteError(), ZeroDivisionError("the cause")))

        assert payload["type"] == f"{__name__}.MuteError"
        assert payload["message"] == "(str() of this MuteError raised)"
        assert 'test_error_payloads.py", line' in payload["traceback"]
        assert "in raised" in payload["traceback"]
        assert "ZeroDivisionError: the cause" in payload["traceback"]
        assert error_payload(ValueError())["type"] == "ValueError"

    def test_long_traceback_keeps_its_end(self) -> None:
        assert "1 / 0" in error_payload(recursed(700))["traceback"]
        assert "link 499" in error_payload(chained(500))["traceback"]

    def test_unencodable_characters_are_replaced(self) -> None:
        assert error_payload(ValueError("caf\udce9"))["message"] == "caf\ufffd"

    @pytest.mark.parametrize("error", [SystemExit(143), KeyboardInterrupt()], ids=repr)
    def test_error_of_a_signal_handler_is_not_hidden(self, error: BaseException) -> None:
        def stop(*_: object) -> None:
            raise error

        class SlowError(Exception):
            def __str__(self) -> str:
                signal.raise_signal(signal.SIGUSR1)
                return "interrupted"

        before = signal.signal(signal.SIGUSR1, stop)
        try:
            with pytest.raises(type(error)):
                error_payload(SlowError())
        finally:
            signal.signal(signal.SIGUSR1, before)

    @pytest.mark.servers("fakeredis")  # test_codec.py stores arbitrary payloads on every server
    @pytest.mark.parametrize("make", EXCEPTIONS.values(), ids=EXCEPTIONS)
    def test_step_can_be_failed_with_any_exception(
        self, store: StepRunStore, make: Callable[[], BaseException]
    ) -> None:
        error = make()

        failed = store.fail_step(begun(store.begin_step("run", "pay", {})), error)

        assert failed.status is StepStatus.FAILED
        assert stored(store).last_error == error_payload(error)
