"""Caches for what redis-py and fakeredis compute again for every client or call."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from functools import cache
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
    """fakeredis compiles a script for every call; servers do it once."""
    lua: Any = scripting_mixin.LUA_MODULE

    class Runtime(lua.LuaRuntime):
        def __init__(self, *_args: object, **_options: object) -> None:
            self._compiled: dict[str | bytes, Callable[[], Any]] = {}

        def execute(self, code: str | bytes) -> Any:
            if code == "collectgarbage()":
                return None  # after each call; Lua collects without it, too
            if code not in self._compiled:
                self._compiled[code] = self.compile(code)
            return self._compiled[code]()

    lua.LuaRuntime = Runtime
