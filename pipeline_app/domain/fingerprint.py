"""What makes two errors the same error: type, message without its varying parts, place. Who calls: ErrorRecord.

A message is made of what the author wrote and of what this job put into it. What the job puts in mostly comes in
quotes, has a digit, or is a path or an address; all of that becomes `*`. An id of letters alone cannot be told from a
word, and stays. Of a URL scheme and host stay, quoted or not: the host is the target, and one provider that is down
must not hide behind another one.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from functools import lru_cache
from pathlib import PurePath
from types import FrameType, TracebackType

#: How much of a message is looked at: more than any that was written for people.
MAX_READ = 20_000
#: How much of it counts, once its varying parts are removed.
MAX_NORMALISED = 200

_FRAMEWORK = "pipeline_app."
_LIBRARIES = {"site-packages", "dist-packages"}
_STANDARD_LIBRARY = {PurePath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")}

# Every alternative takes what it looked at, or begins only where a word begins, or gives up at a bounded distance; and
# none can take the same text in two ways. So the time is linear in the length, whatever a message holds. They stand in
# the order of their precedence. Only single characters are repeated possessively: Python before 3.11.5 gets groups
# wrong, and those here have nothing to go back to. A quote that is never closed goes to the end: programs cut the
# values they quote.
_URL = (
    r"(?P<url>(?<![A-Za-z])[A-Za-z][A-Za-z0-9+.]{0,20}+://(?:[^\s/?#@'\"]{0,200}@)?"
    r"(?P<host>\[[\w:.]{0,60}\]|[\w.-]{0,255}+)[^\s'\"<>]*+)"
)
_VARYING = re.compile(
    "|".join(
        (
            # Quoted. A single quote inside of a word is an apostrophe, and one after a backslash belongs to a value.
            r"(?P<single>(?<![\w\\])[bBrRuU]{0,2}'(?:[^'\\]|\\.|(?<=\w)'(?=\w))*(?:'|\\?\Z))",
            r'(?P<double>(?:(?<![\w\\])[bBrRuU]{1,2}|(?<!\\))"(?:[^"\\]|\\.)*(?:"|\\?\Z))',
            r"`[^`]*+(?:`|\Z)",
            r"[“„][^“”]*+(?:[“”]|\Z)",
            r"‘[^’]*+(?:’|\Z)",
            r"«[^»]*+(?:»|\Z)",
            _URL,
            # E-mail addresses; also names of processes, which have their host behind the @.
            r"(?<![\w.+-])[\w.+-]++@[\w.-]++",
            # Paths: from a root, a drive or a dot; relative ones if they have two slashes, or one and an extension.
            r"(?<![\w/\\.~])(?:[A-Za-z]:[\\/]|\\\\|~?/(?=[^\s/])|\.{1,2}/)[^\s'\"`<>|,;:()\[\]{}]*+",
            r"(?<![\w/.-])(?:[\w.-]++/){2,}[\w.-]*+",
            r"(?<![\w/.-])[\w.-]++/[\w-]++\.\w++",
            # Ids: UUIDs; IPv6 and MAC addresses; hexadecimal ones, even without a digit; and what is joined to
            # letters and digits side by side, as in base64.
            r"(?<!\w)[0-9A-Fa-f]{8}-(?:[0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12}(?!\w)",
            r"(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])",
            r"(?<!\w)[0-9A-Fa-f]{8,}+(?!\w)",
            r"(?<![\w+/-])(?=[\w+/-]*(?:[^\W\d_]\d|\d[^\W\d_]))[\w+/-]++={0,2}",
            # Days and months as mail and HTTP write them; the rest of a time is numbers.
            r"(?<!\w)(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun),?(?= (?:\d|Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec))",
            r"(?<!\w)(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)(?=[ -]\d)",
            # Numbers with their sign, and whatever else has a digit.
            r"(?<!\w)[-+]?[^\W\d]*+\d\w*+",
        )
    )
)
_URL_ALONE = re.compile(r"[bBrRuU]{0,2}['\"]" + _URL)
#: Values beside each other count as one: lists of any length, the parts of a time, an address and its port.
_ROW = re.compile(r"\*(?:[-+.,:;=/ ]*+\*)+")


def group_of(type_name: str, message: str, frame: str | None) -> str:
    """The name of the failure group of such an error: ten hexadecimal digits."""
    parts = "\n".join((type_name, normalised(message), frame or ""))
    return hashlib.sha256(parts.encode("utf-8", "replace")).hexdigest()[:10]


def normalised(message: str) -> str:
    """The message without what varies from job to job."""
    text = _VARYING.sub(_kept, " ".join(message[:MAX_READ].split()))
    return _ROW.sub("*", text)[:MAX_NORMALISED]


def _kept(found: re.Match[str]) -> str:
    """What stays of a varying part."""
    if found["single"] or found["double"]:
        url = _URL_ALONE.match(found[0])
        return "*" if url is None else _scheme_and_host(url)
    return _scheme_and_host(found) if found["url"] else "*"


def _scheme_and_host(url: re.Match[str]) -> str:
    host = "*" if url["host"].startswith("[") else re.sub(r"\d+", "*", url["host"].rstrip("."))
    return f"{url['url'].partition('://')[0]}://{_ROW.sub('*', host)}"


def frame_of(frames: TracebackType | None) -> str | None:
    """Where an error came from, as `module:function`: the innermost place in the user's own code.

    Args:
        frames: a traceback that begins with the handler. None (nobody's code was reached) has no place.
    """
    walked: list[FrameType] = []
    while frames is not None:
        walked.append(frames.tb_frame)
        frames = frames.tb_next
    if not walked:
        return None
    # An application may be installed like any library: what the handler's package has is the user's, too.
    package = _module(walked[0]).partition(".")[0]
    chosen = next((frame for frame in reversed(walked) if _is_own(frame, package)), walked[-1])
    return f"{_module(chosen)}:{chosen.f_code.co_qualname}"


def _is_own(frame: FrameType, package: str) -> bool:
    module = _module(frame)
    if module.startswith(_FRAMEWORK):
        return False
    return module.partition(".")[0] == package or not _is_library(frame.f_code.co_filename)


@lru_cache(maxsize=1024)
def _is_library(file: str) -> bool:
    """Whether the code there is installed, comes with Python, or was made at run time."""
    path = PurePath(file)
    installed = _LIBRARIES.intersection(path.parts) or _STANDARD_LIBRARY.intersection(path.parents)
    return file.startswith("<") or bool(installed)


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "?"))
