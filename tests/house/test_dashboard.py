"""The Grafana dashboard: its queries match the metrics that `observe` exports, and its commands exist."""

from __future__ import annotations

import itertools
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import click
import promql_parser
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from support.commands import invoke
from support.servers import find_binary

import squidstep_redis
from squidstep_redis import InputMismatchError, StaleStepRunError, StepRunStore
from squidstep_redis.cli.entry import build_group
from squidstep_redis.embedded import EmbeddedServer
from squidstep_redis.metrics import observe

DASHBOARD: dict[str, Any] = json.loads(Path(squidstep_redis.__file__).with_name("grafana_dashboard.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
VARIABLES: dict[str, dict[str, Any]] = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
EXPRESSIONS: list[str] = [target["expr"] for panel in PANELS for target in panel.get("targets", ())]
LABEL_QUERY = re.compile(r"label_values\((?P<selector>.+), (?P<label>\w+)\)")
ADDED_BY_PROMETHEUS = {"job", "instance"}
# What is exported and in no panel, and the reason.
NOT_SHOWN: dict[str, str] = {}
TIMESTAMPS = "_created"  # prometheus_client exports the start of each counter, which Prometheus does not need


def test_command_prints_the_file_of_the_package() -> None:
    result = invoke("dashboard")
    assert (result.exit_code, json.loads(result.stdout)) == (0, DASHBOARD)
    assert result.stdout == files(squidstep_redis).joinpath("grafana_dashboard.json").read_text("utf-8")


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """The labels of each exported name, after at least one decision of each kind."""
    with EmbeddedServer(binary=find_binary("valkey"), port=0) as server:
        registry = CollectorRegistry()
        store = StepRunStore.from_url(server.url)
        observe(store, registry)
        with store:
            decide_everything(store)
            text = generate_latest(registry).decode()
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return {name: labels for name, labels in found.items() if not name.endswith(TIMESTAMPS)}


class TestQueries:
    @pytest.mark.parametrize("expression", EXPRESSIONS, ids=itertools.count())
    def test_names_and_labels_are_exported(self, expression: str, exported: dict[str, set[str]]) -> None:
        used = Used(with_values(expression))
        assert used.names
        for name in used.names:
            assert name in exported
        for name, labels in used.matchers:
            assert labels <= exported[name] | ADDED_BY_PROMETHEUS
        for labels in used.groupings:
            assert labels <= set.intersection(*(exported[name] for name in used.names))

    def test_variables_read_labels_that_are_exported(self, exported: dict[str, set[str]]) -> None:
        for variable in VARIABLES.values():
            if variable["type"] != "query":
                continue
            found = LABEL_QUERY.fullmatch(variable["query"]["query"])
            assert found is not None
            ((name, labels),) = Used(with_values(found["selector"])).matchers
            assert {*labels, found["label"]} <= exported[name] | ADDED_BY_PROMETHEUS
            assert variable["definition"] == variable["query"]["query"]

    def test_variables_select_every_label(self, exported: dict[str, set[str]]) -> None:
        assert {*VARIABLES} == set.union(*exported.values()) - {"le"} | {"datasource", "job"}

    def test_every_exported_metric_is_in_a_panel(self, exported: dict[str, set[str]]) -> None:
        shown = set[str]().union(*(Used(with_values(each)).names for each in EXPRESSIONS))
        assert exported.keys() - shown == NOT_SHOWN.keys()

    def test_values_in_matchers_are_exported(self) -> None:
        errors = {value for each in EXPRESSIONS for value in re.findall(r'error=~"([\w|]+)"', each)}
        assert errors
        for name in "|".join(errors).split("|"):
            assert issubclass(getattr(squidstep_redis, name), squidstep_redis.ServerError)


class TestLayout:
    def test_panels_have_distinct_ids(self) -> None:
        ids = [panel["id"] for panel in PANELS]
        assert len(ids) == len(set(ids))

    def test_panels_do_not_overlap(self) -> None:
        for first, second in itertools.combinations(PANELS, 2):
            assert not overlap(first["gridPos"], second["gridPos"]), (first["title"], second["title"])
        assert all(0 <= panel["gridPos"]["x"] <= 24 - panel["gridPos"]["w"] for panel in PANELS)

    def test_panels_are_described_and_have_a_unit(self) -> None:
        for panel in PANELS:
            assert panel["title"]
            if panel["type"] != "row":
                assert len(panel["description"]) > 40 or panel["type"] == "text", panel["title"]
            if panel["type"] in ("stat", "timeseries"):
                assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]

    def test_data_source_is_a_variable_everywhere(self) -> None:
        assert VARIABLES["datasource"]["type"] == "datasource"
        queried = [*PANELS, *(target for panel in PANELS for target in panel.get("targets", ())), *VARIABLES.values()]
        used = [each["datasource"] for each in queried if "datasource" in each]
        assert len(used) > len(EXPRESSIONS)
        assert all(each == {"type": "prometheus", "uid": "${datasource}"} for each in used)
        assert "://" not in json.dumps(DASHBOARD)

    def test_panels_use_only_variables_that_exist(self) -> None:
        known = {*VARIABLES, "__rate_interval", "__dashboard.uid"}
        assert set(re.findall(r"\$\{?([\w.]+)", json.dumps(PANELS))) <= known

    def test_links_lead_to_the_commands(self) -> None:
        links = [link["url"] for panel in PANELS for link in panel.get("links", ())]
        assert links
        for url in links:
            number = int(url.removeprefix("/d/${__dashboard.uid}?viewPanel="))
            (target,) = [panel for panel in PANELS if panel["id"] == number]
            assert "squidstep explain RUN STEP" in target["options"]["content"]
        stuck = [panel for panel in PANELS if "squidstep_lapsed_claims" in json.dumps(panel)]
        assert all("links" in panel and "squidstep explain" in panel["description"] for panel in stuck)

    def test_commands_and_options_in_texts_exist(self) -> None:
        group = build_group()
        texts = [panel.get("options", {}).get("content", "") + panel.get("description", "") for panel in PANELS]
        commands = [found for text in texts for found in re.findall(r"squidstep ([a-z]+)([^`\n]*)", text)]
        assert commands
        for name, rest in commands:
            command = group.get_command(click.Context(group), name)
            assert command is not None, name
            options = {option for parameter in command.params for option in parameter.opts}
            assert set(re.findall(r"--[\w-]+", rest)) <= options, name


class Used:
    """What a PromQL expression uses.

    Attributes:
        names: of metrics.
        matchers: each selector's metric, and the labels that it matches.
        groupings: the labels of each `by`.
    """

    def __init__(self, expression: str) -> None:
        self.names: set[str] = set()
        self.matchers: list[tuple[str, set[str]]] = []
        self.groupings: list[set[str]] = []
        promql_parser.walk(promql_parser.parse(expression), self._visit)

    def _visit(self, node: Any) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            assert node.name is not None
            self.names.add(node.name)
            self.matchers.append((node.name, {matcher.name for matcher in node.matchers.matchers}))
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            self.groupings.append(set(node.modifier.labels))
        return True


def with_values(expression: str) -> str:
    """Fills in the variables, as Grafana does."""
    return re.sub(r"\$[a-z]+", ".*", expression.replace("$__rate_interval", "1m"))


def overlap(one: dict[str, int], other: dict[str, int]) -> bool:
    return all(
        one[start] < other[start] + other[length] and other[start] < one[start] + one[length]
        for start, length in (("x", "w"), ("y", "h"))
    )


def decide_everything(store: StepRunStore) -> None:
    """Makes each kind of decision that has a metric."""
    zombie = store.begin_step("run", "pay", {}, lease=60).step_run
    store.extend_claim(zombie, 60)
    store.begin_step("run", "pay", {}, lease=60)
    store.expire_claim(zombie)
    claim, _ = store.begin_step("run", "pay", {}, lease=60)
    with pytest.raises(StaleStepRunError):
        store.complete_step(zombie, {})
    store.complete_step(claim, {})
    for end in (store.release_step, lambda claim: store.fail_step(claim, {})):
        end(store.begin_step("run", "mail", {}, lease=60).step_run)
    _ = store.batch([store.calls.begin_step("run", "live", {}, lease=60)])
    store.begin_step("run", "print", {}, fingerprint="one")
    with pytest.raises(InputMismatchError):
        store.begin_step("run", "print", {}, fingerprint="other")
