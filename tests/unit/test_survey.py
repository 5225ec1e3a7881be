"""The survey's handlers as plain functions, without the framework around them."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import sysconfig
import textwrap
import tokenize
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from handlers import survey
from handlers.survey import Report, Source, analyze, jobs, load, summarize
from pipeline_app import PermanentError
from pipeline_app.domain.job import as_job_line

ROOT = Path(__file__).parents[2]

SAMPLE = '''\
"""A module."""

import os


class Shape:
    """Documented."""

    def area(self):
        """Documented."""
        return 1 if self else 0

    async def later(self):
        async for _ in self:
            pass


def walk(value):
    for item in value:
        while item:
            try:
                item = lambda: None
            except ValueError:
                pass
    match value:
        case 1:
            pass
        case _:
            if value:
                pass
            elif item:
                pass
'''


def source(text: str) -> Source:
    return Source(path="sample.py", encoding="utf-8", text=text)


def write(folder: Path, name: str, content: str | bytes = "") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


class TestLoad:
    @pytest.mark.parametrize(
        ("content", "encoding", "text"),
        [
            (b"", "utf-8", ""),
            ("x = 'é'\n".encode(), "utf-8", "x = 'é'\n"),
            (b"# coding: latin-1\nx = '\xe9'\n", "iso-8859-1", "# coding: latin-1\nx = 'é'\n"),
            (b"\xef\xbb\xbfx = 1\n", "utf-8-sig", "x = 1\n"),
            (b"x = 1\r\ny = 2\r\n", "utf-8", "x = 1\ny = 2\n"),
        ],
    )
    def test_a_file_is_decoded_as_python_would(self, tmp_path: Path, content: bytes, encoding: str, text: str) -> None:
        path = str(write(tmp_path, "a.py", content))
        assert load(path) == Source(path=path, encoding=encoding, text=text)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"x = '\xff'\n", "invalid or missing encoding declaration$"),
            (b"# coding: uft-8\n", "unknown encoding: uft-8$"),
            (b"\xef\xbb\xbf# coding: latin-1\n", "encoding problem: utf-8$"),
            (b"# coding: ascii\n\n\n'\xe9'\n", "'ascii' codec can't decode byte 0xe9"),
            (b"# coding: unicode_escape\n'\\ud800'\n", "surrogates not allowed"),
        ],
    )
    def test_a_file_that_cannot_be_decoded_is_refused_for_good(
        self, tmp_path: Path, content: bytes, reason: str
    ) -> None:
        path = write(tmp_path, "a.py", content)
        with pytest.raises(PermanentError, match=f"^cannot be decoded: .*{reason}") as caught:
            load(str(path))
        assert str(path) not in str(caught.value)

    def test_a_file_that_cannot_be_read_is_refused_for_good(self, tmp_path: Path) -> None:
        with pytest.raises(PermanentError, match=r"^cannot be read: No such file or directory$"):
            load(str(tmp_path / "gone.py"))
        with pytest.raises(PermanentError, match=r"^cannot be read: Is a directory$"):
            load(str(tmp_path))
        with pytest.raises(PermanentError, match=r"^cannot be read: Not a directory$"):
            load(str(write(tmp_path, "a.py") / "b.py"))


class TestAnalyze:
    def test_what_is_counted(self) -> None:
        assert analyze(source(SAMPLE)) == Report(
            path="sample.py",
            lines=SAMPLE.count("\n"),
            functions=3,
            classes=1,
            branches=9,  # if-else in a line, async for, for, while, except, two cases, if, elif
            documented=3,  # the module, Shape, Shape.area
        )

    @pytest.mark.parametrize(("text", "lines"), [("", 0), ("\n", 1), ("x = 1", 1), ("x = 1\n", 1), ("x\n\ny", 3)])
    def test_lines_are_counted_as_an_editor_does(self, text: str, lines: int) -> None:
        assert analyze(source(text)).lines == lines

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("def (", r"is not Python: invalid syntax \(line 1\)"),
            ("x = 1\nprint 'old'\n", r"is not Python: Missing parentheses .* \(line 2\)"),
            ("a = b\0c", "is not Python: .*null bytes"),
            ("-" * 10_000 + "1", "is nested too deeply"),
            ("a." * 20_000 + "b", "is nested too deeply"),
        ],
    )
    def test_what_python_refuses_is_refused_for_good(self, text: str, reason: str) -> None:
        with pytest.raises(PermanentError, match=f"^{reason}"):
            analyze(source(text))

    def test_a_doubtful_escape_is_no_reason_to_refuse_even_where_warnings_are_errors(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert analyze(source('import re\nre.compile("\\d")\n')).lines == 2

    def test_threads_that_parse_at_once_leave_the_warning_filters_as_they_were(self) -> None:
        # Given the filters of this process, and sources that warn
        before = list(warnings.filters)
        doubtful = source('x = "\\d"\n' * 20)
        # When many threads parse at once, switching as often as they can
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            with ThreadPoolExecutor(8) as pool:
                reports = list(pool.map(lambda _: analyze(doubtful), range(800)))
        finally:
            sys.setswitchinterval(interval)
        # Then each was parsed, and the filters are the same
        assert [report.lines for report in reports] == [20] * 800
        assert list(warnings.filters) == before


class TestSummarize:
    def test_a_row(self) -> None:
        row = summarize(Report(path="a.py", lines=10, functions=4, classes=2, branches=5, documented=2))
        assert row.model_dump() == {
            "path": "a.py",
            "lines": 10,
            "functions": 4,
            "classes": 2,
            "branches": 5,
            "docstring_coverage": 0.286,
        }

    @pytest.mark.parametrize(("text", "coverage"), [("", 0.0), ('"""Doc."""', 1.0), ('"""Doc."""\ndef f(): ...', 0.5)])
    def test_the_module_itself_counts(self, text: str, coverage: float) -> None:
        assert summarize(analyze(source(text))).docstring_coverage == coverage


class TestJobs:
    def test_a_job_for_every_file_with_its_kind_in_order(self, tmp_path: Path) -> None:
        # Given a folder with files of every kind, and some that don't belong
        for name in ("b.py", "a.py", "pkg/__init__.py", "pkg/test/x.py", "tests/y.py", "idlelib/idle_test/z.py"):
            write(tmp_path, name)
        for name in ("c.txt", "site-packages/s.py", "pkg/dist-packages/d.py", "pkg/e.pyc"):
            write(tmp_path, name)
        (tmp_path / "folder.py").mkdir()
        (tmp_path / "dangling.py").symlink_to(tmp_path / "nowhere")
        # When its jobs are made
        made = list(jobs(tmp_path))
        # Then there is one for each Python file
        assert [(job["job_id"], job["tags"]) for job in made] == [
            ("a.py", {"kind": "module"}),
            ("b.py", {"kind": "module"}),
            ("idlelib/idle_test/z.py", {"kind": "test"}),
            ("pkg/__init__.py", {"kind": "package"}),
            ("pkg/test/x.py", {"kind": "test"}),
            ("tests/y.py", {"kind": "test"}),
        ]
        assert made[0]["payload"] == str(tmp_path / "a.py")

    def test_they_are_made_one_by_one(self, tmp_path: Path) -> None:
        write(tmp_path, "a.py")
        made = jobs(tmp_path)
        assert next(made)["job_id"] == "a.py"
        assert next(made, None) is None

    def test_the_default_is_the_standard_library(self) -> None:
        # Given an independent count of its files
        stdlib = Path(sysconfig.get_paths()["stdlib"])
        expected = {
            path.relative_to(stdlib).as_posix()
            for path in stdlib.rglob("*.py")
            if path.is_file() and not {"site-packages", "dist-packages"} & set(path.parts)
        }
        # Then there is a job for each of them, and several partitions
        made = list(jobs())
        assert {job["job_id"] for job in made} == expected
        assert len(made) == len(expected) > 100
        assert len({survey.survey.partition(job["tags"]) for job in made}) > 1

    def test_a_folder_may_be_given_relative_to_the_current_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(tmp_path, "sub/a.py", "x = 1\n")
        monkeypatch.chdir(tmp_path)
        (job,) = jobs(Path("sub"))
        monkeypatch.chdir("/")
        assert load(job["payload"]).text == "x = 1\n"

    def test_a_folder_that_cannot_be_read_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            list(jobs(tmp_path / "nowhere"))
        with pytest.raises(NotADirectoryError):
            list(jobs(write(tmp_path, "a.py")))

    @pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such file names")
    def test_names_that_are_not_utf8_get_an_id_and_an_address_that_can_be_stored(self, tmp_path: Path) -> None:
        # Given files whose names only bytes can tell apart
        names = [b"caf\xe9.py", b"caf%E9.py", "café.py".encode(), b"two words.py", b"new\nline.py"]
        for name in names:
            Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_text(f"x = {name!r}\n")
        write(tmp_path, os.fsdecode(b"\xff/in.py"), "x = 1\n")
        # When their jobs are made, written as JSON and read back
        made = [json.loads(json.dumps(job).encode()) for job in jobs(tmp_path)]
        # Then each has its own id, and its address leads to it
        assert {job["job_id"] for job in made} == {
            "caf%E9.py",
            "caf%25E9.py",
            "café.py",
            "two words.py",
            "new\nline.py",
            "%FF/in.py",
        }
        assert {load(as_job_line(job, 1).payload).text for job in made} == {
            "x = 1\n",
            *(f"x = {name!r}\n" for name in names),
        }

    def test_a_path_longer_than_a_job_id_may_be_keeps_its_end(self, tmp_path: Path) -> None:
        # Given two files so deep that their paths are too long, alike but for the beginning
        deep = "/".join(["d" * 50] * 5)
        for top in ("a", "b"):
            write(tmp_path, f"{top}/{deep}/x.py")
        # Then their ids are as long as allowed, differ, and can still be recognised
        ids = [as_job_line(job, 1).job_id for job in jobs(tmp_path)]
        assert [len(job_id) for job_id in ids] == [200, 200]
        assert len(set(ids)) == 2
        assert all(job_id.endswith(f"{'d' * 50}/x.py") for job_id in ids)

    def test_they_are_printed_as_job_lines(self, tmp_path: Path) -> None:
        write(tmp_path, "pkg/a.py")
        printed = subprocess.run(
            [sys.executable, "-m", "handlers.survey", str(tmp_path)],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        assert [json.loads(line) for line in printed.splitlines()] == list(jobs(tmp_path))


def test_the_table_of_stages() -> None:
    assert [(stage.name, stage.chunk) for stage in survey.survey.stages] == [
        ("load", 100),
        ("analyze", 20),
        ("summarize", 100),
    ]
    assert survey.survey.partition_by == ("kind",)
    assert survey.survey.stage("analyze").retry.definition()["attempts"] == 3


def test_the_stages_refuse_exactly_the_files_that_python_refuses(tmp_path: Path) -> None:
    # Given sound and damaged files
    contents = {
        "good.py": SAMPLE.encode(),
        "latin.py": b"# coding: latin-1\nx = '\xe9'\n",
        "escape.py": b'x = "\\d"\n',
        "bytes.py": b"x = '\xff'\n",
        "codec.py": b"# coding: nope\n",
        "python2.py": b"print 'old'\n",
        "indent.py": textwrap.dedent("""\
            if True:
                x = 1
               y = 2
        """).encode(),
    }
    for name, content in contents.items():
        write(tmp_path, name, content)
    # When each goes through the stages
    refused = set()
    for job in jobs(tmp_path):
        try:
            summarize(analyze(load(job["payload"])))
        except PermanentError:
            refused.add(job["job_id"])
    # Then those are refused that tokenize and ast refuse
    assert refused == {name for name in contents if python_refuses(tmp_path / name)}
    assert refused == {"bytes.py", "codec.py", "python2.py", "indent.py"}


def python_refuses(path: Path) -> bool:
    try:
        with warnings.catch_warnings(), tokenize.open(path) as file:
            warnings.simplefilter("ignore")
            ast.parse(file.read())
    except (SyntaxError, ValueError):
        return True
    return False
