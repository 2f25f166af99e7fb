"""`squidstep demo` and `squidstep demo rq`: real work under real faults, and a check of what came of it.

`work` is what is done and how it is checked, `stage` what both demos share of a command; `plain` delivers by a `broker`
of its own, `rq` by RQ.
"""
