"""`squidstep dashboard`: prints the Grafana dashboard for the metrics of `squidstep_redis.metrics`."""

from __future__ import annotations

import sys
from importlib.resources import files

import click


@click.command("dashboard", epilog="Example: squidstep dashboard > squidstep.json")
def dashboard_command() -> None:
    """Prints a Grafana dashboard for the Prometheus metrics.

    The metrics are those of `squidstep_redis.metrics`. Import the file into Grafana 10.4 or later, and choose the data
    source at the top of the dashboard. The command connects to no server.
    """
    sys.stdout.write(files("squidstep_redis").joinpath("grafana_dashboard.json").read_text("utf-8"))
