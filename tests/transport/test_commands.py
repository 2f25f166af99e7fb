"""What is written to the server: every word of every command is bytes."""

from __future__ import annotations

import operator
import subprocess
import sys
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.backends import Bench
from support.operations import CALLS, EXAMPLES, OPERATIONS, mixed, prepare
from support.proxy import Proxy

from squidstep_redis import StepRunStore, WaitTimeoutError
from squidstep_redis.operations.calls import Calls
from squidstep_redis.protocol.call import Call
from squidstep_redis.protocol.workflow import BlockOnStream, Broadcast, Send, SendBatch
from squidstep_redis.transport import aio_connection, batch, stream
from squidstep_redis.transport.batch import Durability
from transport.conftest import Connect

DURABILITIES = [None, Durability(1, False, 100), Durability(0, True, 100), Durability(2, True, 100)]

numbers = st.one_of(st.integers(1, 10**6), st.floats(0.001, 1e6))
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
payloads = st.dictionaries(
    st.text(max_size=5), st.one_of(st.integers(-5, 5), st.text(max_size=5), st.binary(max_size=5))
)


def commands_of(call: Call[Any]) -> list[tuple[Any, ...]]:
    sent: list[tuple[Any, ...]] = [call.evalsha(), call.eval()]
    for durability in DURABILITIES:
        sent += batch.commands([call, call], durability, [call.script])
    return sent


def check(commands: list[tuple[Any, ...]]) -> None:
    """Checks that each word is exactly bytes: hiredis crashes if a handler raises while it formats another type."""
    for command in commands:
        assert type(command) is tuple
        assert {type(word) for word in command} == {bytes}, command[:3]


@pytest.mark.servers("valkey")
@pytest.mark.parametrize("bench", ["blocking"], indirect=True)
@pytest.mark.parametrize("operation", sorted(OPERATIONS))
def test_every_word_of_every_operation_is_bytes(bench: Bench, operation: str) -> None:
    if operation == "batch":
        check([command for call in mixed(bench.store(), 7) for command in commands_of(call)])
        return
    store = bench.store(run_ttl=3_600)
    arguments = EXAMPLES[operation](store, prepare(bench, store))
    made: Any = getattr(store.calls, operation)(*arguments)
    if isinstance(made, Call):
        check(commands_of(made))
    else:
        assert operation not in CALLS or isinstance(made, Generator)
        check(effects_of(store, made))


def effects_of(store: StepRunStore, workflow: Any) -> list[tuple[Any, ...]]:
    """Returns the commands of all effects of a workflow."""
    sent: list[tuple[Any, ...]] = []
    result: Any = None
    try:
        while True:
            effect = workflow.send(result)
            result = None
            match effect:
                case Send(call):
                    sent += commands_of(call)
                    result = store.send(call)
                case SendBatch(calls):
                    sent += [command for call in calls for command in commands_of(call)]
                    result = store.batch(calls)
                case Broadcast(commands):
                    sent += commands
                    result = {"": [None] * len(commands)}
                case BlockOnStream():
                    sent += [effect.command(1.5), effect.command(0.000_1)]
                    result = True
                case _:
                    pass
    except StopIteration:
        return sent


@given(run=names, step=names, payload=payloads, lease=numbers, attempts=st.integers(1, 100), ttl=numbers)
def test_every_word_is_bytes_whatever_the_arguments(
    run: str, step: str, payload: dict[str, Any], lease: float, attempts: int, ttl: float
) -> None:
    calls = Calls("squidstep", None, 1_000_000, ttl)
    for call in (
        calls.begin_step(run, step, payload, lease=lease, max_attempts=attempts, owner="host:1"),
        calls.schedule_step(run, step, payload),
        calls.get_step_run(run, step),
        calls.expire_run(run, ttl),
        calls.scan_steps(run),
        calls.delete_run(run),
    ):
        check(commands_of(call))


@pytest.mark.servers("valkey")
def test_doctor_and_waiting_send_bytes_only(
    bench: Bench, connect_to: Connect, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the transports are given, in the end."""
    store = connect_to("own", proxy.port)
    sent: list[tuple[Any, ...]] = []
    pack = stream.pack_command

    def record(command: Any) -> bytes:
        sent.append(command)
        return pack(command)

    monkeypatch.setattr(stream, "pack_command", record)
    monkeypatch.setattr(aio_connection, "pack_command", record)
    store.doctor()
    store.schedule_step("run", "pay", {})
    with pytest.raises(WaitTimeoutError):
        store.wait_for_step("run", "pay", 0.1)
    store.runs()
    store.purge(60)
    assert len(sent) > 20
    check(sent)


SIGNAL_WHILE_PACKING = """
import ctypes, functools, operator, signal
from squidstep_redis.operations.calls import Calls
from squidstep_redis.protocol.call import Call
from squidstep_redis.transport import aio_connection, batch, stream
from squidstep_redis.transport.batch import Durability
from squidstep_redis.transport.stream import pack_command

class Interruption(Exception): ...

def handler(number, frame):
    raise Interruption

signal.signal(signal.SIGUSR1, handler)
arrive = functools.partial(ctypes.CDLL(None)["raise"], int(signal.SIGUSR1))  # pending until Python looks for it
calls = Calls("squidstep", None, 1_000, 60)
raised = 0
made = [calls.begin_step("run", "pay", {}, lease=60, max_attempts=3), calls.scan_steps("run")]
for call in made:
    for command in [call.evalsha(), call.eval(), *batch.commands([call], Durability(1, True, 1_000), [call.script])]:
        try:
            list(map(operator.call, [arrive, functools.partial(pack_command, command)]))
        except Interruption:
            raised += 1
print("raised", raised)
"""


@pytest.mark.servers("valkey")
@pytest.mark.skipif(not hasattr(operator, "call"), reason="operator.call is new in Python 3.11")
def test_process_survives_an_exception_while_a_command_is_packed() -> None:
    child = subprocess.run([sys.executable, "-c", SIGNAL_WHILE_PACKING], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert int(child.stdout.split()[1]) > 10
