"""The names of RQ that this package uses, imported only if RQ is installed and new enough.

The other modules import RQ from here, so that the version is checked first, in whichever order they are imported.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from typing import Final

OLDEST: Final = (2, 1)


def _check_version() -> None:
    try:
        installed = version("rq")
    except PackageNotFoundError as missing:
        raise ImportError("squidstep_redis.rq needs RQ: pip install 'squidstep_redis[rq]'") from missing
    if tuple(int(part) for part in re.findall(r"\d+", installed)[:2]) < OLDEST:
        raise ImportError(
            f"squidstep_redis.rq needs RQ 2.1 or later, where a job function can return Retry; RQ {installed} is "
            "installed: pip install --upgrade 'squidstep_redis[rq]'"
        )


_check_version()

from rq import Retry, get_current_job  # noqa: E402 -- after the check, whose errors say what to install
from rq.job import Job  # noqa: E402 -- after the check
from rq.scheduler import RQScheduler  # noqa: E402 -- after the check

__all__ = ["OLDEST", "Job", "RQScheduler", "Retry", "get_current_job"]
