"""Who may see and change what, and what every response forbids the browser."""

from __future__ import annotations

import re
from typing import Any

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from support.backends import Bench
from support.records import begun
from support.web import HOST, Site

from squidstep_redis import AsyncStepRunStore, InvalidArgumentError, StepRunStore
from squidstep_redis.web import web_app
from squidstep_redis.web.guard import root_of

pytestmark = pytest.mark.servers("valkey")  # what is tested does not depend on the server

PATHS = ("/runs", "/run?id=run-1", "/step?run=run-1&step=pay", "/static/style.css", "/run?id=nope", "/nope", "/retry")


@pytest.fixture
def failed(acting_site: Site) -> Site:
    """A page with actions, of a store with one failed step."""
    acting_site.store.fail_step(begun(acting_site.store.begin_step("run-1", "pay", {})), {"type": "T"})
    return acting_site


def status_of(site: Site) -> str:
    return str(site.store.get_step_run("run-1", "pay").status)


def form_of(site: Site) -> tuple[str, str]:
    """Returns the action and the token of the form that retries the step."""
    return next(item for item in site.get("/step?run=run-1&step=pay").forms().items() if item[0].startswith("/retry?"))


class TestHeaders:
    @pytest.mark.parametrize("path", PATHS)
    def test_every_response_has_the_strict_policy(self, failed: Site, path: str) -> None:
        headers = failed.get(path).headers
        assert headers["content-security-policy"] == (
            "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; "
            "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
        )
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "same-origin"
        assert headers["cache-control"] == ("public, max-age=86400" if "static" in path else "no-store")

    def test_no_page_has_inline_styles_scripts_or_handlers(self, failed: Site) -> None:
        for path in PATHS:
            html = failed.get(path).html
            assert not re.search(r"<[^>]+\s(style|on\w+)\s*=", html)
            assert not re.search(r"<script(?![^>]*\ssrc=)", html)
            assert "<style" not in html

    def test_no_page_names_another_host(self, failed: Site) -> None:
        for path in PATHS[:3]:
            page = failed.get(path)
            assert page.status == 200
            assert "//" not in page.html.replace("</", "")
            assert all(link.startswith(("/", "#")) for link in page.links())

    @pytest.mark.parametrize(("name", "type_"), [("style.css", "text/css"), ("live.js", "text/javascript")])
    def test_static_files_have_their_types(self, site: Site, name: str, type_: str) -> None:
        file = site.get(f"/static/{name}")
        assert file.headers["content-type"].partition(";")[0] == type_
        assert b"http" not in file.body
        assert site.get("/static/base.html").status == 404
        assert site.get("/static/..%2fapp.py").status == 404


class TestHosts:
    @pytest.mark.parametrize(
        ("host", "status"),
        [
            *((host, 200) for host in ("localhost", "localhost:8421", "127.0.0.1:8421", "[::1]:8421", "10.0.0.7")),
            *((host, 200) for host in ("steps.example", "STEPS.example:80")),
            *((host, 421) for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil", "", "[::1", "a@b")),
        ],
    )
    def test_other_host_names_are_rejected(self, bench: Bench, host: str, status: int) -> None:
        site = Site(bench, hosts=["Steps.example"])
        assert site.get("/runs", {"host": host}).status == status
        assert site.get("/static/style.css", {"host": host}).status == status

    def test_a_mounted_page_accepts_any_name(self, site: Site) -> None:
        assert site.get("/runs", {"host": "evil.example"}).status == 200


class TestForms:
    def test_a_form_of_the_page_is_accepted(self, failed: Site) -> None:
        path, token = form_of(failed)
        assert failed.post(path, {"token": token}).status == 303
        assert status_of(failed) == "pending"

    @pytest.mark.parametrize(
        "headers",
        [
            {"sec-fetch-site": "cross-site"},
            {"sec-fetch-site": "same-site"},
            {"sec-fetch-site": "none"},
            {"sec-fetch-site": "", "origin": "https://evil.example"},
            {"sec-fetch-site": "", "origin": "null"},
            {"sec-fetch-site": "", "origin": f"https://{HOST}.evil.example"},
            {"sec-fetch-site": "", "origin": f"http://{HOST}:81"},
        ],
    )
    def test_a_form_of_another_site_is_rejected(self, failed: Site, headers: dict[str, str]) -> None:
        path, token = form_of(failed)
        refused = failed.post(path, {"token": token}, headers)
        assert refused.status == 403
        assert "Nothing was changed" in refused.text
        assert status_of(failed) == "failed"

    @pytest.mark.parametrize("headers", [{"origin": f"https://{HOST}"}, {"origin": f"http://{HOST}"}, {}])
    def test_older_browsers_are_checked_by_origin_and_token(self, failed: Site, headers: dict[str, str]) -> None:
        path, token = form_of(failed)
        assert failed.post(path, {"token": token}, {"sec-fetch-site": "", **headers}).status == 303

    @pytest.mark.parametrize("token", ["", "0" * 64, "ü"])
    def test_a_wrong_token_is_rejected(self, failed: Site, token: str) -> None:
        path, _ = form_of(failed)
        assert failed.post(path, {"token": token}).status == 403
        assert status_of(failed) == "failed"

    def test_a_token_belongs_to_one_browser(self, failed: Site) -> None:
        path, token = form_of(failed)
        for cookies in ({}, {"squidstep_form": "0" * 32}, {"squidstep_form": ""}):
            failed.cookies = cookies
            assert failed.post(path, {"token": token}).status == 403
        assert status_of(failed) == "failed"

    def test_a_token_of_another_process_needs_the_same_secret(self, bench: Bench, failed: Site) -> None:
        path, token = form_of(failed)
        other = Site(bench, failed.store, actions=True)
        other.cookies = failed.cookies
        assert other.post(path, {"token": token}).status == 403
        sites = [Site(bench, failed.store, actions=True, secret="correct horse battery") for _ in range(2)]
        path, token = form_of(sites[0])
        sites[1].cookies = sites[0].cookies
        assert sites[1].post(path, {"token": token}).status == 303

    def test_the_cookie_stays_in_this_site_and_path(self, failed: Site) -> None:
        cookie = failed.get("/run?id=run-1", root="/admin/steps").headers["set-cookie"]
        assert {"HttpOnly", "Path=/admin/steps", "SameSite=strict"} <= set(cookie.split("; "))

    @pytest.mark.parametrize("root", ["/acme corp/steps", "/a;b", "/Шаги", '/"é"'])
    def test_the_path_of_each_cookie_is_that_of_the_links(self, failed: Site, root: str) -> None:
        """Browsers compare it with the path that they send, in which other characters are encoded."""
        for path in ("/", "/run?id=run-1"):
            failed.cookies = {}
            page = failed.get(path, root=root)
            assert page.status == 200
            sent = re.search(r"Path=([^;]*)", page.headers["set-cookie"])
            assert sent is not None
            assert all(action.startswith(f"{sent[1]}/") for action in page.forms())
            assert f"{sent[1]}/runs" in page.links()

    def test_a_large_form_is_rejected(self, failed: Site) -> None:
        path, token = form_of(failed)
        assert failed.post(path, {"token": token, "reason": "x" * 70_000}).status == 413
        assert failed.post(path, {str(n): "" for n in range(50)}).status == 400
        assert status_of(failed) == "failed"

    def test_a_page_without_actions_has_no_form_and_no_cookie(self, bench: Bench, failed: Site) -> None:
        path, token = form_of(failed)
        readonly = Site(bench, failed.store)
        page = readonly.get("/step?run=run-1&step=pay")
        assert page.forms() == {}
        assert "set-cookie" not in page.headers
        readonly.cookies = failed.cookies
        assert readonly.post(path, {"token": token}).status == 403
        assert status_of(failed) == "failed"

    @pytest.mark.parametrize("path", ["/retry", "/retry-run", "/retry-group", "/release", "/cancel", "/resume"])
    def test_an_action_is_never_a_get_request(self, failed: Site, path: str) -> None:
        assert failed.get(f"{path}?run=run-1&step=pay").status == 405
        assert failed.post(path, {"run": "run-1", "step": "pay", "type": "T"}).status == 403
        assert status_of(failed) == "failed"


class TestAuthorize:
    def site(self, bench: Bench, store: Any, *rights: str, asynchronous: bool = False) -> Site:
        async def wait(request: Request, right: str) -> bool:
            return right in rights

        def decide(request: Request, right: str) -> bool:
            assert request.headers["host"] == HOST
            return right in rights

        authorize: Any = wait if asynchronous else decide
        return Site(bench, store, payloads=True, actions=True, authorize=authorize)

    @pytest.mark.parametrize("asynchronous", [False, True])
    def test_a_right_that_is_not_given_is_denied(self, bench: Bench, failed: Site, asynchronous: bool) -> None:
        path, token = form_of(failed)
        outsider = self.site(bench, failed.store, asynchronous=asynchronous)
        for page in ("/", *PATHS[:3], "/failed", "/events", "/payload?run=run-1&step=pay&name=input"):
            refused = outsider.get(page)
            assert refused.status == 403
            assert "pay" not in refused.text.replace("payload", "")
        assert outsider.get("/static/style.css").status == 200
        reader = self.site(bench, failed.store, "see", asynchronous=asynchronous)
        page = reader.get("/step?run=run-1&step=pay")
        assert page.status == 200
        assert page.forms() == {}
        assert "Payloads are hidden." in page.text
        assert reader.get("/payload?run=run-1&step=pay&name=input").status == 403
        reader.cookies = failed.cookies
        assert reader.post(path, {"token": token}).status == 403
        assert status_of(failed) == "failed"
        operator = self.site(bench, failed.store, "see", "payloads", "act", asynchronous=asynchronous)
        path, token = form_of(operator)
        assert operator.post(path, {"token": token}).status == 303

    @pytest.mark.parametrize("answer", [None, 1, "yes", object()])
    def test_only_true_allows(self, bench: Bench, answer: object) -> None:
        async def resolve(request: Request, right: str) -> Any:
            return answer

        def decide(request: Request, right: str) -> Any:
            return answer

        assert Site(bench, authorize=resolve).get("/runs").status == 403
        assert Site(bench, authorize=decide).get("/runs").status == 403

    def test_it_may_ask_for_a_password(self, bench: Bench) -> None:
        def ask(request: Request, right: str) -> bool:
            raise HTTPException(401, "Who are you?", {"WWW-Authenticate": "Basic"})

        page = Site(bench, authorize=ask, actions=True).get("/runs")
        assert (page.status, page.headers["www-authenticate"]) == (401, "Basic")
        assert "Who are you?" in page.text

    def test_it_may_redirect_to_a_login(self, bench: Bench) -> None:
        def redirect(request: Request, right: str) -> bool:
            raise HTTPException(303, headers={"Location": "/login"})

        page = Site(bench, authorize=redirect).get("/runs")
        assert (page.status, page.headers["location"]) == (303, "/login")

    def test_an_error_in_it_shows_nothing(self, bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
        def fail(request: Request, right: str) -> bool:
            raise KeyError("secret-1")

        page = Site(bench, authorize=fail).get("/runs")
        assert page.status == 500
        assert "secret-1" not in page.html
        assert "secret-1" in caplog.text


class TestMounting:
    def test_links_and_forms_have_the_prefix(self, failed: Site) -> None:
        root = "/admin/steps"
        page = failed.get("/run?id=run-1", root=root)
        assert page.status == 200
        assert all(link.startswith((f"{root}/", "#")) for link in page.links())
        assert all(action.startswith(f"{root}/") for action in page.forms())
        assert f'src="{root}/static/live.js' in page.html
        path, token = next(iter(page.forms().items()))
        done = failed.post(path.removeprefix(root), {"token": token}, root=root)
        assert done.headers["location"].startswith(f"{root}/run?")

    @pytest.mark.parametrize(
        ("root", "path"), [("", ""), ("/", ""), ("/a/", "/a"), ("//evil.example", "/evil.example")]
    )
    def test_a_link_never_leads_to_another_host(self, root: str, path: str) -> None:
        assert root_of(Request({"type": "http", "root_path": root, "headers": []})) == path


def test_wrong_arguments_are_rejected() -> None:
    store = AsyncStepRunStore.from_url("redis://127.0.0.1:1")
    blocking: Any = StepRunStore.from_url("redis://127.0.0.1:1")
    hook: Any = "no function"
    for arguments in ({"secret": "short"}, {"authorize": hook}):
        with pytest.raises(InvalidArgumentError, match=next(iter(arguments))):
            web_app(store, **arguments)
    with pytest.raises(InvalidArgumentError, match="store: must be an AsyncStepRunStore"):
        web_app(blocking)
