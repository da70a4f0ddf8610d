"""A thread that notices when the server's loop stands still, and answers in its place.

A quick sync handler runs on the loop (see `placement`), and an async one may block it by mistake. When such a call
hangs, the loop can neither answer health checks nor send a 504: this thread does, over plain sockets, and ends the
process when the call does not come back, so that the supervisor replaces it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mlfuncs_runtime.worker.calls import too_late

if TYPE_CHECKING:
    from mlfuncs_runtime.worker.asgi import WorkerApp

log = logging.getLogger("mlfuncs.worker")
_LOOK_S = 0.25
_STALL_S = 0.5  # guess: a busy machine keeps a healthy loop waiting for less
_EXIT_STUCK = 70
_REQUEST_MAX = 4096  # bytes looked at, for the request line
_HEALTH = (b"/-/live", b"/-/healthz", b"/-/ready")


class Guard:
    """Watches one application's loop from a daemon thread."""

    def __init__(
        self,
        app: WorkerApp,
        listener: socket.socket,
        loop: asyncio.AbstractEventLoop,
        adopt: Callable[[socket.socket], None],
    ) -> None:
        self._app, self._listener, self._loop, self._adopt = app, listener, loop, adopt
        self._stopped = threading.Event()
        self._beat = time.monotonic()  # when the loop last ran our callback
        self._asked = False
        self._answered: object = None  # the inline request that was sent its 504
        self._thread = threading.Thread(target=self._watch, name="guard", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """End watching; returns at once."""
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(_LOOK_S):
            if not self._app.in_flight or self._loop.is_closed():
                self._beat, self._asked = time.monotonic(), False
                continue
            if not self._asked:
                self._asked, self._beat = True, time.monotonic()
                self._loop.call_soon_threadsafe(self._on_beat)
            elif time.monotonic() - self._beat > _STALL_S:
                self._stand_in(self._beat)

    def _on_beat(self) -> None:
        self._beat, self._asked = time.monotonic(), False

    def _stand_in(self, since: float) -> None:
        """Answer health checks until the loop runs again, or the process is beyond hope."""
        options = self._app.options
        while self._asked and not self._stopped.is_set():
            running = getattr(self._app.invocation.calls, "running_inline", None)
            if running is not None:
                late_s = -running.remaining_s()
                if late_s > 0 and self._answered is not running:
                    self._answered = running
                    _send_late(running)
            else:
                late_s = time.monotonic() - since - options.timeout_s
            if late_s > options.stuck_grace_s:
                log.error("the function has not come back %.0f s after its timeout: the worker ends", late_s)
                os._exit(_EXIT_STUCK)
            readable, _, _ = select.select([self._listener], [], [], _LOOK_S)
            if readable and self._asked:
                self._answer_one(blocked=late_s > 0)

    def _answer_one(self, blocked: bool) -> None:
        """Answer a new connection's health check; any other connection waits for the loop, untouched."""
        try:
            connection, _ = self._listener.accept()
        except OSError:  # the loop was faster, or the listener is closed
            return
        try:
            connection.settimeout(_LOOK_S)
            head = connection.recv(_REQUEST_MAX, socket.MSG_PEEK).split(b" ", 2)
            if head[0] == b"GET" and len(head) > 1 and head[1] in _HEALTH:
                connection.sendall(self._health(head[1], blocked))
                connection.close()
                return
        except TimeoutError:
            pass
        except OSError:
            connection.close()
            return
        with contextlib.suppress(RuntimeError):  # the loop has been closed
            self._loop.call_soon_threadsafe(self._adopt, connection)

    def _health(self, path: bytes, blocked: bool) -> bytes:
        if path != b"/-/ready" or not (blocked or self._app.unready_reason()):
            return _plain(b"200 OK", b"application/json", b'{"busy":true}')
        problem = {
            "type": "about:blank",
            "title": "Unavailable",
            "status": 503,
            "detail": "the worker is busy in an earlier request",
        }
        return _plain(b"503 Service Unavailable", b"application/problem+json", json.dumps(problem).encode())


def _send_late(exchange: Any) -> None:
    """Write a 504 on the stuck request's own socket and shut it; uvicorn has written nothing there yet."""
    transport = getattr(getattr(exchange.send, "__self__", None), "transport", None)
    sock = transport.get_extra_info("socket") if transport is not None else None
    if sock is None:
        return
    body = json.dumps(too_late().to_problem(exchange.request_id)).encode()
    extra = b"x-request-id: " + exchange.request_id.encode("latin-1", "replace") + b"\r\n"
    try:
        duplicate = socket.socket(fileno=os.dup(sock.fileno()))
    except OSError:  # the client is gone
        return
    with duplicate:
        try:
            duplicate.setblocking(True)
            duplicate.settimeout(1.0)
            duplicate.sendall(_plain(b"504 Gateway Timeout", b"application/problem+json", body, extra))
            duplicate.shutdown(socket.SHUT_RDWR)
        except OSError:
            return


def _plain(status: bytes, content_type: bytes, body: bytes, extra: bytes = b"") -> bytes:
    head = b"HTTP/1.1 %s\r\ncontent-type: %s\r\ncontent-length: %d\r\nretry-after: 1\r\nconnection: close\r\n%s\r\n"
    return head % (status, content_type, len(body), extra) + body
