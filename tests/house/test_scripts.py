"""The Lua scripts: the loader builds them as documented, and their headers agree with their code."""

from __future__ import annotations

import inspect
import re
import shutil
from pathlib import Path

import pytest

from squidstep_redis import Calls, model
from squidstep_redis.protocol import scripts
from squidstep_redis.protocol.scripts import directory, macros, script

LUA = directory()
SCRIPTS = sorted(path.stem for path in LUA.glob("*.lua"))
FILES = sorted(LUA.rglob("*.lua"))
WITH_COMMON_CASE = ("begin_step", "complete_step", "advance_step")
STATUSES = ("PENDING", "RUNNING", "COMPLETED", "FAILED", "EXPIRED", "FINAL")
GRAMMAR = LUA / "lib" / "grammar.lua"


def built(lua: Path, name: str = "example") -> str:
    """Builds a script of another directory, past the cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scripts, "directory", lambda: lua)
        return script.__wrapped__(name).source.decode()


class TestLoader:
    """Each test writes an `example.lua` and, where it needs one, `lib/shared.lua`."""

    @pytest.fixture
    def lua(self, tmp_path: Path) -> Path:
        (tmp_path / "lib").mkdir()
        return tmp_path

    def build(self, lua: Path, text: str, shared: str = "") -> str:
        (lua / "example.lua").write_text(text, "utf-8")
        (lua / "lib" / "shared.lua").write_text(shared, "utf-8")
        return built(lua)

    def test_an_include_is_inserted_once(self, lua: Path) -> None:
        code = self.build(lua, "-- include shared\nreturn a\n-- include shared\n", "local a = 1\n")
        assert code == "local a = 1\nreturn a\n"

    def test_comments_and_blank_lines_are_dropped(self, lua: Path) -> None:
        assert self.build(lua, "-- A header.\n\n  -- Why.\nreturn 1 -- beside code\n") == "return 1 -- beside code\n"

    def test_the_general_path_becomes_a_function(self, lua: Path) -> None:
        text = "local a = 1\n-- general path\n-- include shared\nreturn a\n"
        expected = "local a = 1\nlocal function general_path()\nlocal b = 2\nreturn a\nend\nreturn general_path()\n"
        assert self.build(lua, text, "local b = 2\n") == expected

    def test_a_macro_is_known_above_its_definition(self, lua: Path) -> None:
        assert self.build(lua, "return @LIMIT\n-- include shared\n", "-- define LIMIT 10\n") == "return 10\n"

    def test_arguments_replace_parameters_as_whole_words(self, lua: Path) -> None:
        shared = "-- define SUM(a, b) a + b + ab\n"
        assert self.build(lua, "-- include shared\nreturn @SUM(b, x[1])\n", shared) == "return b + x[1] + ab\n"

    def test_a_literal_argument_may_contain_commas_and_parentheses(self, lua: Path) -> None:
        shared = "-- define FIND(pattern) string.match(line, pattern)\n"
        code = self.build(lua, '-- include shared\nreturn @FIND("(%d+), (%S")\n', shared)
        assert code == 'return string.match(line, "(%d+), (%S")\n'

    def test_macros_nest_in_texts_and_in_arguments(self, lua: Path) -> None:
        shared = (
            '-- define DIGITS "%d+"\n-- define GROUP(a) "(" .. a .. ")"\n-- define TWO @GROUP(@DIGITS) .. @DIGITS\n'
        )
        code = self.build(lua, "-- include shared\nreturn @GROUP(@GROUP(@TWO))\n", shared)
        assert code == 'return "(((%d+)%d+))"\n'

    def test_a_definition_continues_on_indented_comment_lines(self, lua: Path) -> None:
        assert self.build(lua, "-- define SUM(a) a +\n--   1\n-- Other.\nreturn @SUM(2)\n") == "return 2 + 1\n"

    def test_adjacent_literals_are_joined(self, lua: Path) -> None:
        code = self.build(lua, 'return "a" .. " " .. "" .. "b" .. c .. "" .. d\n')
        assert code == 'return "a b" .. c .. "" .. d\n'

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("-- include missing\n", "include missing is unknown"),
            ("return @MISSING\n", "macro MISSING is undefined"),
            ("return @MISSING(1)\n", "macro MISSING is undefined"),
            ("-- define LOOP 1 + @LOOP\nreturn @LOOP\n", "macro LOOP is undefined, or its text uses itself"),
            ("-- define LIMIT 1\n-- define LIMIT 2\n", "macro LIMIT is defined twice"),
            ("-- define LIMIT 1\nreturn @LIMIT(2)\n", "macro LIMIT takes no arguments"),
            ("-- define SUM(a, b) a + b\nreturn @SUM(1)\n", r"macro SUM takes the arguments \(a, b\)"),
            ("-- define SUM(a, b) a + b\nreturn @SUM\n", r"macro SUM takes the arguments \(a, b\)"),
            ("-- define SUM(a) a\nreturn @SUM(f(1))\n", "arguments of a macro are malformed"),
        ],
    )
    def test_a_mistake_is_an_error_that_names_the_script(self, lua: Path, text: str, problem: str) -> None:
        with pytest.raises(ValueError, match=rf"^example\.lua: .*{problem}"):
            self.build(lua, text)

    def test_the_directory_inside_the_package_comes_first(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A wheel contains `squidstep_redis/lua`; a checkout has `lua` next to the package."""
        package = tmp_path / "squidstep_redis"
        package.mkdir()
        monkeypatch.setattr(scripts, "_PACKAGE", package)
        assert directory() == tmp_path / "lua"
        (package / "lua").mkdir()
        assert directory() == package / "lua"


class TestGrammar:
    """The common cases and the general path cannot drift: both are built from `lib/grammar.lua`."""

    @pytest.mark.parametrize("name", WITH_COMMON_CASE)
    @pytest.mark.parametrize(
        ("old", "new", "only_new"),
        [
            ('-- define FORMAT "1"', '-- define FORMAT "~"', r'"\^?~[ r(]'),
            ('status .. " " .. claim', 'status .. "~" .. claim', r'"\^?1[^"]*~'),
            ('created .. " " .. completed', 'created .. "~" .. completed', r'"\^1 ?\(%d\+\)~|created .. "~"'),
            ('"00000" .. time[2]', '"~" .. time[2]', r'string\.sub\("~"'),
        ],
    )
    def test_a_changed_definition_changes_both_paths(
        self, tmp_path: Path, name: str, old: str, new: str, only_new: str
    ) -> None:
        lua = tmp_path / "lua"
        shutil.copytree(LUA / "lib", lua / "lib")
        shutil.copy(LUA / f"{name}.lua", lua)
        text = GRAMMAR.read_text("utf-8")
        assert text.count(old) == 1
        (lua / "lib" / "grammar.lua").write_text(text.replace(old, new), "utf-8")

        before, after = (self.paths(each, name) for each in (LUA, lua))
        for was, now in zip(before, after, strict=True):
            assert re.search(only_new, now)
            assert not re.search(only_new, was)

    @staticmethod
    def paths(lua: Path, name: str) -> tuple[str, str]:
        """The common case of a script, and its general path."""
        common, marker, general = built(lua, name).partition("local nonce = ARGV[1]\n")
        assert marker
        return common, general

    @pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
    def test_no_code_spells_out_a_line(self, path: Path) -> None:
        code = re.sub(r"^\s*--.*$", "", path.read_text("utf-8"), flags=re.MULTILINE)
        literals = re.findall(r'"([^"\n]*)"', code)
        assert not [text for text in literals if re.match(r"\^?1[prcfxn ]|\^?%d\+ %S", text)]
        assert "time[2]" not in code

    def test_a_pattern_is_one_literal(self) -> None:
        common, general = self.paths(LUA, "complete_step")
        assert 'string.match(lines[2], "^1r (%d+ %d* (%S+)) (%d*) (%d*)  (%d+) (%d+ %S* .*)$")' in common
        parsed = r"^1([prcfxn]) (%d+) (%d*) (%S*) (%d*) (%d*) (%d*) (%d+) (%d+ %S* .*)$"
        assert f'string.match(line, "{parsed}")' in general

    def test_the_letters_and_the_format_are_those_of_the_model(self) -> None:
        known = macros(GRAMMAR.read_text("utf-8"), "grammar")
        letters = {known[name].text.strip('"').encode() for name in STATUSES}
        assert letters == set(model.STATUS) == set(model.OUTCOME)
        assert known["FORMAT"].text == f'"{model.FORMAT.decode()}"'


class TestHeaders:
    @pytest.fixture(params=SCRIPTS)
    def source(self, request: pytest.FixtureRequest) -> tuple[str, str, str]:
        """A script's name, its header and its code as it is sent."""
        header = re.match(r"(--[^\n]*\n)+", (LUA / f"{request.param}.lua").read_text("utf-8"))
        assert header is not None
        return request.param, header[0], script(request.param).source.decode()

    def test_the_header_has_its_form(self, source: tuple[str, str, str]) -> None:
        name, header, _ = source
        first, blank, *rest = header.splitlines()
        assert re.fullmatch(rf"-- {name}: .+\.", first)
        assert blank == "--"
        sections = [match[1] for line in rest if (match := re.match(r"-- (KEYS|ARGV|REPLY|Writes)\b", line))]
        assert sections == ["KEYS", "ARGV", "REPLY", "Writes"]

    @pytest.mark.parametrize("kind", ["KEYS", "ARGV"])
    def test_the_header_names_what_the_code_reads(self, source: tuple[str, str, str], kind: str) -> None:
        _, header, code = source
        section = re.search(rf"-- {kind} (.*?)(?=-- [A-Z])", header, re.DOTALL)
        assert section is not None
        documented = {int(number) for number in re.findall(r"(?:^|-- +|, |\s)(\d+) [a-z_]+", section[1])}
        assert documented == set(range(1, len(documented) + 1))
        read = {int(number) for number in re.findall(rf"{kind}\[(\d+)\]", code)}
        constants = {int(number) for number in re.findall(r"local (?:FIRST|SUCCESSORS|MORE) = (\d+)", code)}
        if kind == "ARGV":
            read |= constants
            # Pairs and lists of any length are documented by their first members.
            assert read <= documented
            assert max(documented) - max(read) <= (1 if constants else 0)
        else:
            assert read == documented

    def test_the_header_names_every_reply(self, source: tuple[str, str, str]) -> None:
        _, header, code = source
        words = set(re.findall(r'\{ "(\w+)", nonce', code)) | set(re.findall(r'with_(?:record|input)\("(\w+)"', code))
        words |= set(re.findall(r'and "(\w+)" or "\w+", (?:nonce|steps)', code))
        refusals = {"wrongtype", "torn", "corrupt", "newer", "tombstone"}  # of every script: lib/record.lua
        replies = re.search(r"-- REPLY (.*?)-- Writes", header, re.DOTALL)
        assert replies is not None
        assert words - refusals <= set(re.findall(r'"(\w+)"', replies[1]))

    def test_every_script_includes_record_first_and_nothing_twice(self, source: tuple[str, str, str]) -> None:
        text = (LUA / f"{source[0]}.lua").read_text("utf-8")
        found = re.findall(r"^\s*-- include (\w+)$", text, re.MULTILINE)
        assert found[0] == "record"
        assert len(found) == len(set(found))

    def test_every_operation_has_its_script(self) -> None:
        # Scripts that several calls share, or that are one part of an operation.
        inner = {"list_index", "confirm_entry", "drop_entry", "await_step", "scan_runs", "purge_run", "list_runs"}
        listings = {"failed_steps", "lapsed_claims", "live_claims"}  # list_index
        listings |= {"runs", "count_runs"}  # list_runs
        workflows = {"batch", "retry_run", "purge", "fork_run", "explain_run", "explain_step"}
        shared = {
            "expire_claim",
            "count_failed",
            "wait_for_step",
            "begin_steps",
            "complete_steps",
        }  # of extend_claim, await_step, …
        operations = {name for name, value in inspect.getmembers(Calls, inspect.isfunction) if not name.startswith("_")}
        assert set(SCRIPTS) - inner == operations - workflows - shared - listings
