"""Keeps passwords out of the process's title, which everybody on the machine can read. Called before any command."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from pipeline_app.domain.redaction import redact

#: Flags whose addresses may have a password -> the environment variable that says the same.
FLAGS = {"--amqp-url": "AMQP_URL", "--mongodb-url": "MONGODB_URL"}


def hide_passwords() -> None:
    """If an address on the command line has a password, begin again with it in the environment.

    It can be read until then, for some hundredths of a second; whoever cannot bear that sets the environment. Returns
    only if nothing is to be hidden.
    """
    # As Python was called: with the path of its program, and its own options.
    words, moved = without_passwords(sys.orig_argv)
    if moved and os.name == "posix":
        os.execve(sys.executable, words, {**os.environ, **moved})  # noqa: S606 - ourselves


def without_passwords(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The words that remain, and the environment variables that take the place of the others."""
    left: list[str] = []
    moved: dict[str, str] = {}
    words = list(argv)
    while words:
        given = [words.pop(0)]
        flag, equals, value = given[0].partition("=")
        if flag in FLAGS and not equals and words:
            value = words.pop(0)
            given.append(value)
        if flag in FLAGS and redact(value) != value:
            moved[FLAGS[flag]] = value
        else:
            left += given
    return left, moved
