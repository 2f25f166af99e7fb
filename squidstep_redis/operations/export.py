"""The operations that copy a run from one store to another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from squidstep_redis.errors import RunExistsError, StepRunNotFoundError
from squidstep_redis.operations.context import Context, new_run
from squidstep_redis.operations.documents import Document, Imported, from_document, to_document
from squidstep_redis.operations.reads import pairs
from squidstep_redis.protocol.arguments import RunId
from squidstep_redis.protocol.call import Call, Reply, new_nonce, new_token
from squidstep_redis.protocol.records import step_name
from squidstep_redis.protocol.scripts import script

T = TypeVar("T")


def export_run(context: Context, run_id: RunId) -> Call[Document]:
    """Reads a whole run as a document that `json.dumps` accepts and from which `import_run` makes the same run.

    One round trip; a run of 10,000 steps blocks the server for about 0.05 s. The document contains all that `get_run`
    and `attempts` return, and the claims with their tokens: protect it like the store. Its payloads are decoded, so a
    store with another codec can import them.

    Args:
        run_id: the run: a non-empty str of at most 512 bytes of UTF-8, or a UUID.

    Returns:
        The document, a dict.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent.
        StepRunNotFoundError: there is no such run; RunDeletedError if it was deleted.
        CorruptRunError: the stored data is corrupt.
        ServerError: the server or the connection failed.
    """
    run = context.keys.run(run_id)

    def parse(reply: Reply) -> Document:
        if reply[0] == b"missing":
            raise StepRunNotFoundError(run.text, None, "there is no such run")
        order = [step_name(run.text, step, run.keys.done) for step in reply[3]]
        return to_document(run.text, run.keys.steps, dict(pairs(reply[2])), order, context.payloads)

    return Call(run.text, script("export_run"), run.keys[:2], (new_nonce(),), parse)


def import_run(context: Context, document: Mapping[str, Any]) -> Call[str]:
    """Creates a run from a document that `export_run` returned: on any server, under any prefix, with any codec.

    One round trip, all or nothing; a run of 10,000 steps blocks the server for about 0.15 s. `get_run` and
    `attempts` return the same for the copy and the original. Claims are included: their holders can complete them here,
    in a store with the same prefix, and, while the run exists there, on the old server. The `ttl` restarts.

    Args:
        document: what `export_run` returned, also after `json.dumps` and `json.loads`.

    Returns:
        The id of the run.

    Raises:
        InvalidArgumentError: it is not such a document; PayloadError for a payload that the store rejects. Nothing was
            sent.
        RunExistsError: the run exists; nothing was written.
        RunDeletedError: the run was deleted recently; nothing was written.
        CorruptRunError: the stored data is corrupt.
        ServerError: the server or the connection failed.
    """
    given = from_document(document, context.payloads)
    return write_run(context, given, given.run_id)


def write_run(context: Context, given: Imported, result: T, part_of: str | None = None) -> Call[T]:
    """Creates a run from its fields, completely or not at all; the call returns `result`."""
    run = context.keys.run(given.run_id)

    def parse(reply: Reply) -> T:
        if reply[0] == b"exists":
            raise RunExistsError(run.text)
        return result

    counts = (b"%d" % given.created, b"%d" % len(given.order))
    settings = new_run(given.ttl_ms, given.labels)
    args = (new_token(), run.member, settings, *counts, *given.order, *given.fields)
    return Call(run.text, script("import_run"), run.keys, args, parse, part_of=part_of)
