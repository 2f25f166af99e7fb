"""Caches for what redis-py and fakeredis compute again for every client or call."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

from fakeredis.commands_mixins import scripting_mixin
from redis._parsers import CommandsParser


def install() -> None:
    """Adds the caches to this process."""
    # redis-py looks up its own version for every client and connection.
    importlib.metadata.version = cache(importlib.metadata.version)
    _describe_commands_once()
    _compile_scripts_once()


def _describe_commands_once() -> None:
    """A client of a cluster asks for a description of all commands, which takes longer than most tests."""
    described: dict[str, Any] = {}
    parser_type: Any = CommandsParser
    ask = parser_type.initialize

    def initialize(parser: Any, client: Any) -> None:
        if not described:
            ask(parser, client)
            described.update(parser.commands)
        parser.commands = dict(described)

    parser_type.initialize = initialize


def _compile_scripts_once() -> None:
    """fakeredis compiles and hashes a script for every call; servers do it once.

    It also looks for global variables of the script before each command, and at its end. The end is enough.
    """
    mixin: Any = scripting_mixin
    lua = mixin.LUA_MODULE
    reject_globals = mixin._check_for_lua_globals

    class Runtime(lua.LuaRuntime):
        def __init__(self, *_args: object, **_options: object) -> None:
            self._compiled: dict[str | bytes, Callable[[], Any]] = {}
            self.executes = False

        def execute(self, code: str | bytes) -> Any:
            if code == "collectgarbage()":  # after each script; Lua collects without it, too
                self.executes = False
                return None
            self.executes = True
            if code not in self._compiled:
                self._compiled[code] = self.compile(code)
            return self._compiled[code]()

    def reject_globals_at_the_end(runtime: Runtime, expected: set[Any]) -> None:
        if not runtime.executes:
            reject_globals(runtime, expected)

    lua.LuaRuntime = Runtime
    mixin._check_for_lua_globals = reject_globals_at_the_end
    mixin.hashlib = SimpleNamespace(sha1=cache(hashlib.sha1))
