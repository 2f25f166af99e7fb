"""What `import_run` accepts as a payload: what `export_run` writes, within the store's limits, and nothing else."""

from __future__ import annotations

import base64
import contextlib
import copy
import functools
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.backends import Bench, offline_store, running
from support.commands import empty_store as opened_store
from support.commands import invoke, options_of
from support.records import begun
from support.servers import find_binary

from squidstep_redis import InvalidArgumentError, MsgpackCodec, NotSentError, PayloadTooLargeError
from squidstep_redis.embedded import EmbeddedServer

PLACES = [("input",), ("output",), ("history", 0, "error")]
PATHS = ["input", "output", "history'][0]['error"]
TAGS = ["$bytes", "$dict", "$float", "$datetime", "$encoded", "$decimal", "$time", "a"]
paths = pytest.mark.parametrize(("place", "path"), [*zip(PLACES, PATHS, strict=True)], ids=PATHS)


def encoded(data: bytes) -> dict[str, str]:
    return {"$encoded": base64.b64encode(data).decode()}


@functools.cache
def exported() -> str:
    """Returns the document of a run with one completed step that has failed before, as JSON."""
    with running("fakeredis") as backend:
        store = Bench(backend, None, "squidstep").store()
        store.fail_step(begun(store.begin_step("run", "pay", {})), {})
        store.complete_step(begun(store.begin_step("run", "pay", {})), {})
        return json.dumps(store.export_run("run"))


def document_with(place: tuple[Any, ...], payload: Any) -> dict[str, Any]:
    document = json.loads(exported())
    part = document["steps"][0]
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = payload
    return document


def nested(depth: int, wrap: Any = lambda inner: {"a": inner}) -> Any:
    payload: Any = {}
    for _ in range(depth):
        payload = wrap(payload)
    return payload


INVALID: dict[str, Any] = {
    "empty $encoded": encoded(b""),
    "$encoded that is no base64": {"$encoded": "#"},
    "$encoded with spaces": {"$encoded": "gA= ="},
    "$encoded of no ASCII": {"$encoded": "é"},
    "$encoded of a number": {"$encoded": 7},
    "$encoded of a list": {"$encoded": ["gA=="]},
    "$encoded inside": {"a": encoded(b"\x80")},
    "a key that is no str": {"a": {1: 2}},
    "keys that are no str": {"a": 1, 2: 3},
    "$bytes of a number": {"a": {"$bytes": 7}},
    "$bytes that is no base64": {"a": {"$bytes": "gA"}},
    "$float of a huge int": {"a": {"$float": 10**400}},
    "$float of a number": {"a": {"$float": 1.5}},
    "$float of a list": {"a": {"$float": []}},
    "$float of digits": {"a": {"$float": "1e400"}},
    "$float of NaN": {"a": {"$float": "nan"}},
    "$datetime of a number": {"a": {"$datetime": 1}},
    "$datetime without a zone": {"a": {"$datetime": "2024-01-01T00:00:00"}},
    "$datetime beyond the calendar": {"a": {"$datetime": "0001-01-01T00:00:00+01:00"}},
    "$dict of a number": {"a": {"$dict": 5}},
    "$dict of triples": {"a": {"$dict": [[1, 2, 3]]}},
    "$dict with equal keys": {"a": {"$dict": [[1, 2], [1, 3]]}},
    "$dict with a list as key": {"a": {"$dict": [[[], 2]]}},
    "unknown tag": {"a": {"$set": [1]}},
    "huge int": {"a": 10**30},
    "lone surrogate": {"a": "\ud800"},
    "a list": [],
}


TOO_DEEP: dict[str, Callable[[], Any]] = {
    "dict": lambda: nested(2_000),
    "deeper dict": lambda: nested(100_000),
    "$dict": lambda: nested(50_000, lambda inner: {"$dict": [[1, inner]]}),
    "list": lambda: {"a": nested(100_000, lambda inner: [inner])},
}


class TestRejected:
    @pytest.mark.parametrize("payload", INVALID.values(), ids=INVALID)
    @paths
    def test_payload_that_no_export_contains_is_rejected(self, place: Any, path: str, payload: Any) -> None:
        with offline_store() as store, pytest.raises(InvalidArgumentError) as caught:
            store.import_run(document_with(place, payload))
        assert f"document['steps'][0]['{path}']" in caught.value.argument
        assert str(caught.value).isprintable()

    @pytest.mark.parametrize("build", TOO_DEEP.values(), ids=TOO_DEEP)
    @paths
    def test_payload_that_is_too_deep_is_rejected(self, place: Any, path: str, build: Callable[[], Any]) -> None:
        with offline_store() as store, pytest.raises(InvalidArgumentError, match=r"nested (too deeply|more than)"):
            store.import_run(document_with(place, build()))

    @given(
        payload=st.dictionaries(
            st.text(max_size=3),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
                lambda inner: (
                    st.lists(inner, max_size=3)
                    | st.dictionaries(
                        st.sampled_from(
                            ["$bytes", "$dict", "$float", "$datetime", "$encoded", "$decimal", "$time", "a"]
                        ),
                        inner,
                        max_size=2,
                    )
                ),
            ),
            max_size=3,
        )
    )
    @example(payload={"a": {"$float": 10**400}})
    def test_any_json_is_imported_or_rejected(self, payload: Any) -> None:
        with offline_store() as store, contextlib.suppress(InvalidArgumentError):  # any other exception fails
            assert store.calls.import_run(document_with(("input",), payload)).operation == "import_run"

    @paths
    def test_encoded_payload_over_the_limit_is_rejected(self, place: Any, path: str) -> None:
        data = MsgpackCodec().encode({"data": b"x" * 2_000})
        with offline_store(max_payload_bytes=len(data) - 1) as store, pytest.raises(PayloadTooLargeError) as caught:
            store.import_run(document_with(place, encoded(data)))
        assert caught.value.argument == f"document['steps'][0]['{path}']"
        with offline_store(max_payload_bytes=len(data)) as store, pytest.raises(NotSentError):
            store.import_run(document_with(place, encoded(data)))

    def test_nothing_is_changed_in_the_document(self) -> None:
        document = document_with(("input",), {"a": {"$dict": [[1, {"$float": "inf"}]]}})
        before = copy.deepcopy(document)
        with offline_store() as store:
            store.calls.import_run(document)
        assert document == before


class TestCommand:
    """`squidstep import`: a line that is rejected is named, and the others are imported."""

    @pytest.mark.usefixtures("default_environment")
    def test_rejected_line_does_not_end_the_import(self) -> None:
        good = [exported().replace('"run_id": "run"', f'"run_id": "{name}"') for name in ("one", "two")]
        broken = [
            json.dumps(document_with(("input",), {"a": {"$float": 10**400}})).encode(),
            b"[" * 100_000,
            json.dumps(document_with(("input",), {})).replace("{}", '{"a":' * 9_000 + "1" + "}" * 9_000, 1).encode(),
            b'"\xff\xfe"',
            b'{"squidstep_run": ' + b"1" * 5_000 + b"}",
            b'"\\u009b\\u202e',
            b"\xef\xbb\xbf{}",
        ]
        lines = [good[0].encode(), *broken, good[1].encode()]
        with EmbeddedServer(binary=find_binary("valkey"), port=0) as server, opened_store(server) as store:
            for options in (["--dry-run"], []):
                ended = invoke("import", *options, *options_of(server, store), input=b"\n".join(lines))
                assert ended.exit_code == 1
                assert [line.split()[-1] for line in ended.stdout.splitlines()] == ["one", "two"]
                problems = ended.stderr.split("\n")[:-1]
                assert [line.split(":")[1] for line in problems] == [f" line {number}" for number in range(2, 9)]
                assert all(line.isprintable() for line in problems)
                assert "Traceback" not in ended.stderr
