"""One spawned worker process behind a pipe of JSON lines: a crash or a hang in it is an answer here.

Spawned, not forked: a forked child inherits a CUDA context it cannot use. What the worker runs is
named by "module:function", so nothing but strings crosses over.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any

POLL_SECONDS = 0.2  # how quickly Ctrl-C is seen while waiting


class WorkerGone(Exception):
    """The worker is no more. status is `crash` or `timeout`, the text says how it ended."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Worker:
    """A process that runs `target(emit, request)` for every request, and the pipe to it.

    environment: variables it has beside those of this process."""

    def __init__(self, target: str, environment: Mapping[str, str] | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, target, os.getpid(), dict(environment or {})), daemon=True
        )
        self._process.start()
        theirs.close()

    def events(self, request: dict[str, Any], deadline: float) -> Iterator[dict[str, Any]]:
        """Send `request`; yield what the worker emits until it is done.

        deadline: seconds it may be silent. Raises WorkerGone when it dies or falls silent, and
        leaves no process behind.
        """
        try:
            self._pipe.send_bytes(json.dumps(request).encode())
            while (event := self._receive(deadline)) != {"event": "done"}:
                yield event
        except (EOFError, OSError):
            self._process.join(5)
            raise WorkerGone("crash", self._how_it_ended()) from None

    def _receive(self, deadline: float) -> dict[str, Any]:
        end = time.monotonic() + deadline
        while not self._pipe.poll(POLL_SECONDS):
            if time.monotonic() > end:
                self.kill()
                raise WorkerGone("timeout", f"no answer within {deadline:g} s; the worker was stopped")
        return json.loads(self._pipe.recv_bytes())

    def _how_it_ended(self) -> str:
        code = self._process.exitcode
        if code is None:
            self.kill()
            return "the worker closed its pipe"
        if code >= 0:
            return f"the worker exited with code {code}"
        hint = "; the system may have run out of memory" if -code == signal.SIGKILL else ""
        return f"the worker was killed by {signal.Signals(-code).name}{hint}"

    def close(self) -> None:
        """End the process; it is idle, and leaves by itself once its pipe is closed."""
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self.kill()

    def kill(self) -> None:
        """End the process now; nothing it holds is worth waiting for."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(pipe: Connection, target: str, parent: int, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _die_with(parent)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler reports its stages on stderr otherwise
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a chatty library must not end up in a table on stdout
    module, _, name = target.partition(":")
    handle = getattr(importlib.import_module(module), name)

    def emit(event: dict[str, Any]) -> None:
        pipe.send_bytes(json.dumps(event).encode())

    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent is gone: so are we
        while True:
            handle(emit, json.loads(pipe.recv_bytes()))
            emit({"event": "done"})


def _die_with(parent: int) -> None:
    # A worker that hangs in a kernel cannot notice that its parent was killed; the kernel can.
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)
