"""The `squidstep` command-line tools. `main` is the entry point; the other modules need the extra `cli`."""

from squidstep_redis.cli.entry import main

__all__ = ["main"]
