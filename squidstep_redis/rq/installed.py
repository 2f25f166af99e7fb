"""The names of RQ that this package uses, imported only if RQ is installed and new enough.

The other modules import RQ from here, so that the version is checked first, in any order of imports.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

try:
    installed = version("rq")
except PackageNotFoundError as missing:
    raise ImportError("squidstep_redis.rq needs RQ: pip install 'squidstep_redis[rq]'") from missing
if tuple(int(part) for part in re.findall(r"\d+", installed)[:2]) < (OLDEST := (2, 1)):
    raise ImportError(
        f"squidstep_redis.rq needs RQ 2.1 or later, where a job function can return Retry; RQ {installed} is "
        "installed: pip install --upgrade 'squidstep_redis[rq]'"
    )

from rq import Retry, get_current_job
from rq.job import Job
from rq.scheduler import RQScheduler

__all__ = ["OLDEST", "Job", "RQScheduler", "Retry", "get_current_job"]
