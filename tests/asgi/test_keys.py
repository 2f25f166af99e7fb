"""Idempotency keys: which values are valid, and which requests share a key."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from squidstep_redis.asgi.messages import MAX_KEY_CHARS, MAX_RUN_ID_BYTES, fingerprint_of, parse_key, run_id_of

PRINTABLE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=40)


def quoted(key: str) -> bytes:
    return b'"%s"' % key.replace("\\", "\\\\").replace('"', '\\"').encode()


@given(PRINTABLE)
def test_every_printable_string_in_quotes_is_a_key(key: str) -> None:
    assert parse_key([quoted(key)]) == key


@given(st.binary(max_size=40))
def test_every_value_is_a_key_or_rejected(value: bytes) -> None:
    try:
        key = parse_key([value])
    except ValueError:
        return
    assert key
    assert parse_key([quoted(key)]) == key


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (b'"8e03978e-40d5-43e8-bc93-6894a57f9324"', "8e03978e-40d5-43e8-bc93-6894a57f9324"),
        (b"8e03978e-40d5-43e8-bc93-6894a57f9324", "8e03978e-40d5-43e8-bc93-6894a57f9324"),
        (b' "with spaces" \t', "with spaces"),
        (rb'"a \"quote\" and a \\ backslash"', 'a "quote" and a \\ backslash'),
        (b"msg_2Lf+/=:~", "msg_2Lf+/=:~"),
        (b"x" * MAX_KEY_CHARS, "x" * MAX_KEY_CHARS),
    ],
)
def test_quoted_and_bare_keys_are_read(value: bytes, key: str) -> None:
    assert parse_key([value]) == key


@pytest.mark.parametrize(
    "value",
    [
        *(b"", b'""', b'"', b'"open', b'open"', b"two words", b"a,b", b'"a", "b"', b"a;b=1", b'"a";b=1'),
        *(b'"tab\t"', b'"\x7f"', "schlüssel".encode(), '"schlüssel"'.encode(), rb'"\n"', b"a\x00b", b":Ynl0ZXM=:,"),
        b"x" * (MAX_KEY_CHARS + 1),
        b'"' + b"x" * (MAX_KEY_CHARS + 1) + b'"',
    ],
)
def test_other_values_are_not_keys(value: bytes) -> None:
    with pytest.raises(ValueError, match="key"):
        parse_key([value])


def test_a_request_has_one_key_or_none() -> None:
    assert parse_key([]) is None
    with pytest.raises(ValueError, match="more than one"):
        parse_key([b'"a"', b'"a"'])


@given(st.text(), PRINTABLE, st.text(), PRINTABLE)
def test_each_tenant_and_key_have_their_own_run(tenant: str, key: str, other: str, other_key: str) -> None:
    run_id, other_id = run_id_of(tenant, key), run_id_of(other, other_key)
    assert (run_id == other_id) is ((tenant, key) == (other, other_key))
    assert len(run_id.encode()) <= MAX_RUN_ID_BYTES


def test_a_run_id_is_readable_if_it_fits() -> None:
    assert run_id_of("", "k") == "idempotency::k"
    assert run_id_of("a:b c", "k:1") == "idempotency:a%3Ab%20c:k:1"
    long = run_id_of("x" * 600, "k")
    assert long.startswith("idempotency#")
    assert long != run_id_of("x" * 601, "k")


def test_method_path_query_and_body_make_the_fingerprint() -> None:
    def fingerprint(method: str = "POST", path: str = "/a", query: bytes = b"", body: bytes = b"") -> str:
        return fingerprint_of({"method": method, "path": path, "query_string": query}, body)

    found = [
        fingerprint(),
        fingerprint(method="PATCH"),
        fingerprint(path="/b"),
        fingerprint(query=b"q"),
        fingerprint(body=b"q"),
        fingerprint(path="/aq"),
    ]
    assert len(set(found)) == len(found)
    assert fingerprint() == fingerprint_of({"method": "POST", "path": "/a"}, b"")


def test_fingerprint_depends_on_the_path_before_and_after_decoding() -> None:
    """A router in front of the middleware may rewrite `path` alone."""

    def fingerprint(path: str, raw_path: bytes | None) -> str:
        return fingerprint_of({"method": "POST", "path": path, "raw_path": raw_path}, b"")

    found = [
        fingerprint("/a/b", b"/a/b"),
        fingerprint("/a/b", b"/a%2Fb"),
        fingerprint("/ann/a/b", b"/a/b"),
        fingerprint("/ben/a/b", b"/a/b"),
    ]
    assert len(set(found)) == len(found)
    assert fingerprint("/a/b", b"/a/b") == fingerprint("/a/b", None)  # not every server sends it
