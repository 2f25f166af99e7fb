"""Taking runs from one store to another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from squidstep_redis.errors import RunExistsError, StepRunNotFoundError
from squidstep_redis.operations.context import Operations, nonce, token
from squidstep_redis.operations.documents import Document, from_document, to_document
from squidstep_redis.protocol.arguments import RunId
from squidstep_redis.protocol.call import Call, Reply
from squidstep_redis.protocol.scripts import script


class Transfers(Operations):
    """Makes the call for each operation that takes runs out of a store, or in."""

    def export_run(self, run_id: RunId) -> Call[Document]:
        """Reads a run whole, as a document that `json.dumps` takes and `import_run` makes the same run of.

        One round trip; a run of 10,000 steps holds the server up for about 0.05 s. The document has all that `get_run`
        and `attempts` show, and the claims with their tokens: keep it as safe as the store. Payloads are in it decoded,
        so that a store with another codec can import them.

        Args:
            run_id: as for `schedule_step`.

        Raises:
            InvalidArgumentError: refused before anything was sent.
            StepRunNotFoundError: there is no such run; RunDeletedError if it was deleted.
            CorruptRunError: what is stored cannot be trusted.
        """
        run = self._run(run_id)

        def parse(reply: Reply) -> Document:
            if reply[0] == b"missing":
                raise StepRunNotFoundError(run.text, None, "there is no such run")
            fields = dict(zip(reply[2][::2], reply[2][1::2], strict=True))
            return to_document(run.text, run.keys.steps.decode(), fields, reply[3], self.payloads)

        return Call(run.text, script("export_run"), run.keys[:2], (nonce(),), parse)

    def import_run(self, document: Mapping[str, Any]) -> Call[str]:
        """Makes a run of what `export_run` answered: on any server, under any prefix, with any codec.

        One round trip, all or nothing; a run of 10,000 steps holds the server up for about 0.15 s. The run is the same
        in all that `get_run` and `attempts` show. Its claims go with it: whoever holds one can complete it here, and
        on the old server too, as long as the run is there. Its `ttl` begins anew.

        Args:
            document: as `export_run` answered it, or as `json.loads` gives it back.

        Returns:
            The id of the run.

        Raises:
            InvalidArgumentError: it is no such document; PayloadError for a payload that the store does not take.
                Nothing was sent.
            RunExistsError: there is such a run; nothing was written.
            RunDeletedError: it was deleted a short while ago; nothing was written.
            CorruptRunError: what is stored cannot be trusted.
        """
        given = from_document(document, self.payloads)
        run = self._run(given.run_id)

        def parse(reply: Reply) -> str:
            if reply[0] == b"exists":
                raise RunExistsError(run.text)
            return run.text

        counts = (b"%d" % given.made, b"%d" % len(given.order))
        args = (token(), run.member, given.ttl_ms, *counts, *given.order, *given.fields)
        return Call(run.text, script("import_run"), run.keys, args, parse)
