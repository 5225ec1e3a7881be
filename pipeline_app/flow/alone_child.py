"""The process that runs one job's handler: `alone_process.py` starts it, and it ends with that job or with its parent.

It reads the request from the socket that it was given, says BEGUN right before the handler starts, and answers with one
document. Should it crash, the interpreter's last words (where it was when it crashed) come instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import io
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline_app.domain.handler import Handler, inspect_handler
from pipeline_app.domain.job import Job
from pipeline_app.domain.outcome import ErrorRecord
from pipeline_app.domain.pipeline import load_pipeline
from pipeline_app.errors import RateLimited
from pipeline_app.flow.deadline import run_within
from pipeline_app.flow.execute import execute, permanent_kind
from pipeline_app.store.encoding import UnstorableError, from_bytes, to_bytes

#: From here on the end of the process is the handler's doing.
BEGUN = b"+"
#: Bytes in front of a document that say how long it is; they count, too.
_LENGTH = 4
_PIECE = 1 << 20
_PR_SET_PDEATHSIG = 1


def is_whole(document: bytes | bytearray | memoryview) -> bool:
    """Whether these bytes are a document to its end."""
    return len(document) >= _LENGTH and len(document) >= int.from_bytes(document[:_LENGTH], "little")


def main() -> None:
    """The process as an interpreter of its own, which was given the number of its channel."""
    serve(socket.socket(fileno=int(sys.argv[1])))


def serve(channel: socket.socket) -> None:
    """Run one handler, answer, and end the process, whatever threads the handler leaves behind."""
    # What the handler starts must not hold the channel open, or it would seem to live for as long as that does.
    channel.set_inheritable(False)
    channel.setblocking(True)  # a worker with gevent makes all its sockets otherwise
    die_with_parent()
    faulthandler.enable(channel.fileno(), all_threads=False)
    request = from_bytes(_receive(channel))
    threading.Thread(target=_end_with_parent, args=(channel,), name="pipeline-parent", daemon=True).start()
    _settle(request)
    answer = _answer(request, channel)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        # Nobody may be there to read it, and the handler may have closed it.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    channel.sendall(answer)
    os._exit(0)


def die_with_parent() -> None:
    """Linux ends us when our parent ends, also while a handler lets no other thread run."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_with_parent(channel: socket.socket) -> None:
    """Elsewhere, and if the parent was faster than we, the channel's end says so: nothing follows the request."""
    with contextlib.suppress(OSError):
        if channel.recv(1):
            return
    os._exit(1)


def _receive(channel: socket.socket) -> bytes:
    request = bytearray()
    while not is_whole(request):
        piece = channel.recv(_PIECE)
        if not piece:
            os._exit(1)
        request += piece
    return bytes(request)


def _settle(request: Mapping[str, Any]) -> None:
    """What handlers find around them is as in the worker."""
    sys.path[:] = request["sys_path"]
    # What is printed right before a crash is worth the most.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    form = "[%(asctime)s: %(levelname)s/alone-%(process)d] %(message)s"
    logging.basicConfig(level=request["log_level"], format=form)


def _settle_celery(broker: Mapping[str, Any]) -> None:
    """A handler that sends tasks of its own sends them as in the worker; who does not import Celery, does not."""
    celery = sys.modules.get("celery")
    if celery is not None:
        importlib.import_module("pipeline_app.transport")  # what `amqps://` means
        conf = celery.current_app.conf
        conf.broker_url = broker["url"]
        conf.broker_transport_options = {**(conf.broker_transport_options or {}), **broker["options"]}


def _answer(request: Mapping[str, Any], channel: socket.socket) -> bytes:
    """BEGUN, unless it was said already, and the answer."""
    fields = request["job"]
    ids = {"run": fields["run"], "stage": fields["stage"], "job": fields["id"]}
    job = Job(**fields, log=logging.LoggerAdapter(logging.getLogger("pipeline_app.handlers"), ids))
    try:
        handler = find_handler(request)
    except BaseException as exc:  # noqa: BLE001 - also SystemExit: it is the user's module
        return BEGUN + _failed(exc, job)
    _settle_celery(request["broker"])
    channel.sendall(BEGUN)
    try:
        soft_limit_s = request["soft_time_limit_s"]
        output = run_within(soft_limit_s, lambda: execute(handler, request["input"], job, request["message"]))
        return to_bytes({"output": bytes(output.raw), "spent": job.spent})
    except BaseException as exc:  # noqa: BLE001 - whatever a handler raises is an outcome
        try:
            return _failed(exc, job)
        except UnstorableError as unstorable:  # what it says in RateLimited, or spent, is none of what it may
            job.spent.clear()
            return _failed(unstorable, job)


def find_handler(request: Mapping[str, Any]) -> Handler:
    """The stage's handler, found as the worker found it: by way of its pipeline, whose module may prepare things.

    A pipeline that the project does not name has handlers that can be imported, or none that we could run.

    Raises DefinitionError.
    """
    for path in request["pipelines"]:
        pipeline = load_pipeline(path, Path(request["root"]))
        if pipeline.name == request["pipeline"]:
            for stage in pipeline.stages:
                if stage.name == request["job"]["stage"] and stage.handler.path == request["handler"]:
                    return stage.handler
    return inspect_handler(request["handler"])


def _failed(exc: BaseException, job: Job) -> bytes:
    answer = {"error": ErrorRecord.of(exc).as_dict(), "kind": permanent_kind(exc), "spent": job.spent}
    if isinstance(exc, RateLimited):
        selector = dict(exc.selector) if isinstance(exc.selector, Mapping) else None
        limits = {"message": exc.message, "until": exc.until, "retry_after": exc.retry_after, "selector": selector}
        answer["limits"] = limits
    return to_bytes(answer)
