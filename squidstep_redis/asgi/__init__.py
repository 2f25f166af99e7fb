"""Idempotency keys for ASGI applications: a middleware. pip install 'squidstep_redis[asgi]'.

    store = AsyncStepRunStore.from_url(url, run_ttl=timedelta(days=1))
    app.add_middleware(IdempotencyMiddleware, store=store, tenant=lambda scope: scope["user"].username)

It implements the draft "The Idempotency-Key HTTP Header Field" (draft-ietf-httpapi-idempotency-key-header-07) for any
ASGI framework, and needs no further package. The guide is `tests/guide/webhooks.md` in the source distribution.
"""

from squidstep_redis.asgi.middleware import RETRY_STATUSES, UNSTORED_HEADERS, IdempotencyMiddleware

__all__ = ["RETRY_STATUSES", "UNSTORED_HEADERS", "IdempotencyMiddleware"]
