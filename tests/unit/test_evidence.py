"""How a process ended: from its return code, from what the pool says, in words and as data."""

from __future__ import annotations

import signal

import pytest
from billiard.common import human_status
from billiard.exceptions import WorkerLostError

from pipeline_app.domain.evidence import WORKER_LOST, End, worker_lost


@pytest.mark.parametrize(
    ("code", "text", "data"),
    [
        (-9, "was killed by signal 9 (SIGKILL)", {"signal": 9, "signal_name": "SIGKILL", "exit_code": None}),
        (-11, "was killed by signal 11 (SIGSEGV)", {"signal": 11, "signal_name": "SIGSEGV", "exit_code": None}),
        (-50, "was killed by signal 50", {"signal": 50, "signal_name": None, "exit_code": None}),
        (0, "ended with exit code 0", {"signal": None, "signal_name": None, "exit_code": 0}),
        (3, "ended with exit code 3", {"signal": None, "signal_name": None, "exit_code": 3}),
    ],
)
def test_the_end_of_a_process(code: int, text: str, data: dict[str, object]) -> None:
    """Given a return code, then its end is told in words and as data."""
    end = End.of_code(code)

    assert str(end) == text
    assert end.as_dict() == data


@pytest.mark.parametrize("code", [-signal.SIGKILL, -signal.SIGSEGV, -50, 0, 1, 155])
def test_the_end_of_a_child_as_the_pool_tells_it(code: int) -> None:
    """Given what Celery's pool says of a child that ended, then it is read as what its return code says."""
    error = WorkerLostError(f"Worker exited prematurely: {human_status(code)} Job: 17.")

    assert End.of_text(str(error)) == End.of_code(code)


def test_an_end_of_which_nothing_is_known() -> None:
    """Given a text without a status, then nothing is made up."""
    assert str(End.of_text("Could not start worker processes")) == "ended"
    assert set(End.of_text("").as_dict().values()) == {None}


def test_the_error_of_a_lost_attempt() -> None:
    """Given evidence, then it stands in the error's document, and those of the same kind are one group."""
    one = worker_lost("its process was killed by signal 9 (SIGKILL)", pid=17, rss_bytes=4096)
    other = worker_lost("its process was killed by signal 9 (SIGKILL)", pid=18)

    assert one.type == WORKER_LOST
    assert one.as_dict()["evidence"] == {"pid": 17, "rss_bytes": 4096}
    assert one.group == other.group
