"""Tests of the middleware for idempotency keys."""
