"""What a page may show and do, and to whom; and signatures for the data that a browser stores for the page."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from hashlib import sha256
from inspect import isawaitable
from typing import Literal

from starlette.requests import Request

from squidstep_redis import AsyncStepRunStore

Right = Literal["see", "payloads", "act"]
"""The rights that `authorize` decides on: to see any page, to see and download payloads, to change the store."""

Authorize = Callable[[Request, Right], bool | Awaitable[bool]]
"""Returns, or resolves to, True if this request has this right. Any other value denies it."""


@dataclass(frozen=True)
class WebSettings:
    """The settings of one application.

    Attributes:
        store: the store that it shows.
        title: the name of the store in the heading.
        payloads: whether anyone may see payloads.
        actions: whether anyone may change the store.
        authorize: decides on each request; None: every request has every right that is enabled.
        hosts: names that the Host header may have, besides IP addresses and localhost; None: any.
        key: signs the tokens of forms, and the counts of the last visit.
    """

    store: AsyncStepRunStore
    title: str
    payloads: bool
    actions: bool
    authorize: Authorize | None
    hosts: frozenset[str] | None
    key: bytes

    async def allows(self, request: Request, right: Right) -> bool:
        """Returns whether a right is enabled, and the request has it."""
        if (right == "payloads" and not self.payloads) or (right == "act" and not self.actions):
            return False
        if self.authorize is None:
            return True
        answer = self.authorize(request, right)
        return (await answer if isawaitable(answer) else answer) is True

    def sign(self, purpose: str, text: str) -> str:
        """Returns the signature of a text, which is valid for one purpose."""
        return hmac.new(self.key, f"{purpose}\0{text}".encode(), sha256).hexdigest()

    def is_signed(self, purpose: str, text: str, signature: str) -> bool:
        """Returns whether `sign` returned this signature for the text."""
        return hmac.compare_digest(self.sign(purpose, text).encode(), signature.encode())
