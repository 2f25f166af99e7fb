"""`squidstep demo` and `squidstep demo rq`: real work under real faults, and a check of the result.

- `work`: the work itself
- `worker`: the worker processes' side
- `scenario`: the parent process's side
- `plain`, `rq`: the two scenarios
- `check`: the final check
- `command`: the command line
"""
