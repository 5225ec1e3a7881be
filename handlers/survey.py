"""A survey of Python files: what is in each of them, and which of them Python refuses.

`jobs` makes the input: one job for every file below a folder. `python -m handlers.survey [FOLDER]` prints them as the
JSON lines that `pipeline-app run seed` reads. The stages are plain functions; `survey`, at the end, is their table.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import sys
import sysconfig
import threading
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_to_bytes

from pydantic import BaseModel

from pipeline_app import PermanentError, Pipeline, Retry, Stage

#: Folders that hold what was installed beside the standard library.
LEFT_OUT = frozenset({"site-packages", "dist-packages"})
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
#: Job ids have at most 200 characters.
MAX_JOB_ID = 200

_FILE_URI = "file://"
_BRANCHES = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.match_case)

# The warning filters belong to the process: two threads that change and restore them at once would leave them changed.
_parsing = threading.Lock()


class Source(BaseModel):
    """A file's text."""

    path: str
    encoding: str
    text: str


class Report(BaseModel):
    """What was counted in a file."""

    path: str
    lines: int
    functions: int
    classes: int
    branches: int
    #: The module, its classes and its functions that have a docstring.
    documented: int


class Row(BaseModel):
    """A file's line in the survey's table."""

    path: str
    lines: int
    functions: int
    classes: int
    branches: int
    #: Share of the module, its classes and its functions that have a docstring, 0 to 1.
    docstring_coverage: float


def load(path: str) -> Source:
    """Read a file and decode it as Python would.

    Raises PermanentError for a file that is not there, may not be read, or cannot be decoded.
    """
    name = _file(path)
    try:
        with tokenize.open(name) as file:
            text = file.read()
            encoding = file.encoding
        text.encode()  # some codecs give lone surrogates, which no store takes
    except (SyntaxError, ValueError, LookupError) as exc:
        # The name of the file is the job's: errors that are the same read the same, and are grouped.
        raise PermanentError("cannot be decoded: " + str(exc).replace(f" for {name!r}", "")) from exc
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as exc:
        raise PermanentError(f"cannot be read: {exc.strerror}") from exc
    return Source(path=path, encoding=encoding, text=text)


def analyze(source: Source) -> Report:
    """Parse a file and count what is in it.

    Raises PermanentError if it is not Python.
    """
    tree = _parse(source)
    functions = classes = branches = documented = 0
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            functions += 1
        elif isinstance(node, ast.ClassDef):
            classes += 1
        elif isinstance(node, _BRANCHES):
            branches += 1
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            documented += ast.get_docstring(node, clean=False) is not None
    return Report(
        path=source.path,
        lines=_lines(source.text),
        functions=functions,
        classes=classes,
        branches=branches,
        documented=documented,
    )


def summarize(report: Report) -> Row:
    """The file's row."""
    places = 1 + report.classes + report.functions
    return Row(
        path=report.path,
        lines=report.lines,
        functions=report.functions,
        classes=report.classes,
        branches=report.branches,
        docstring_coverage=round(report.documented / places, 3),
    )


def jobs(folder: Path | None = None) -> Iterator[dict[str, Any]]:
    """A job for every `.py` file below `folder`, in order of their paths; default is the standard library.

    What is installed in site-packages and dist-packages is left out. Raises OSError for a folder that cannot be read:
    a survey that silently misses files would be worth nothing.
    """
    root = Path(sysconfig.get_paths()["stdlib"] if folder is None else folder).absolute()
    for parent, folders, names in os.walk(root, onerror=_refuse):
        folders[:] = sorted(set(folders) - LEFT_OUT)
        for name in sorted(names):
            path = Path(parent, name)
            if name.endswith(".py") and path.is_file():
                relative = path.relative_to(root)
                yield {"job_id": _job_id(relative), "payload": _address(path), "tags": {"kind": _kind(relative)}}


def _parse(source: Source) -> ast.Module:
    try:
        with _parsing, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an escape such as "\d"; as an error it would refuse the file
            return ast.parse(source.text)
    except SyntaxError as exc:
        raise PermanentError(f"is not Python: {exc.msg} (line {exc.lineno})") from exc
    except ValueError as exc:
        raise PermanentError(f"is not Python: {exc}") from exc
    except (RecursionError, MemoryError) as exc:  # the parser's stack is full: it is so every time
        raise PermanentError("is nested too deeply to be parsed") from exc


def _lines(text: str) -> int:
    """Lines as an editor numbers them: the last one counts if it is not empty."""
    return text.count("\n") + (not text.endswith("\n") and text != "")


def _kind(relative: Path) -> str:
    folders = relative.parts[:-1]
    if TEST_FOLDERS.intersection(folders):
        return "test"
    return "package" if folders else "module"


def _job_id(relative: Path) -> str:
    """The path with forward slashes. Bytes that are not UTF-8 are `%` and two hex digits (and `%` itself is `%25`)."""
    text = re.sub(r"[%\ud800-\udfff]", lambda odd: quote(os.fsencode(odd[0])), relative.as_posix())
    if len(text) <= MAX_JOB_ID:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{digest}~{text[-(MAX_JOB_ID - 17) :]}"


def _address(path: Path) -> str:
    """The path as text that JSON and MongoDB can hold: a `file:` address where a name in it is not UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return path.as_uri()
    return str(path)


def _file(address: str) -> str:
    """The path that `_address` stands for."""
    if not address.startswith(_FILE_URI):
        return address
    return os.fsdecode(unquote_to_bytes(address.removeprefix(_FILE_URI)))


def _refuse(error: OSError) -> None:
    raise error


survey = Pipeline(
    "survey",
    stages=[
        Stage(load, chunk=100),
        Stage(analyze, chunk=20, retry=Retry(attempts=3, backoff="2s", cap="5m")),
        Stage(summarize, chunk=100),
    ],
    partition_by=["kind"],
)

if __name__ == "__main__":
    for _job in jobs(Path(sys.argv[1]) if len(sys.argv) > 1 else None):
        print(json.dumps(_job))
