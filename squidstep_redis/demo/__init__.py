"""`squidstep demo` and `squidstep demo rq`: real work under real faults, and a check of the result.

`work` is the work, `worker` and `scenario` are the two sides of the processes, `check` is the final check, `command`
the command line. `plain` and `rq` are the two scenarios.
"""
