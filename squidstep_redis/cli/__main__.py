"""Runs the command line as `python -m squidstep_redis.cli`."""

from squidstep_redis.cli import main

main()
