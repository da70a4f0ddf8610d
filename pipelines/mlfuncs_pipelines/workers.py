"""The engine's side of the warm processes in which steps run (see `zygote`)."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
from collections.abc import Mapping
from typing import Any

from mlfuncs.errors import Unavailable
from mlfuncs_pipelines.children import ONE_DESCRIPTOR, Child, received_socket, signal_group
from mlfuncs_pipelines.messages import Environment, Exit, Request, exit_told

SPARES = 4  # children forked ahead, about 2.5 MB each: what steps of 1 ms one after the other do not use up
_BATCH = 2  # fork so many at once: after each fork the zygote copies the pages that it works on
_MESSAGE_BYTES = 1 << 20


class Worker:
    """One zygote and its children: `fileno()` is readable when something happened to a step.

    Steps wait while it is still loading or forking. A `single` one runs one step in itself; steps that it cannot take
    are left in `overflow` for whoever asked.
    """

    def __init__(
        self,
        connection: socket.socket,
        environment: Environment,
        process: subprocess.Popen[bytes] | None = None,  # None: forked from another zygote
        single: bool = False,
        spares: int = SPARES,
    ) -> None:
        self.socket, self.environment, self.process, self.single = connection, environment, process, single
        self.overflow: dict[str, Request] = {}
        self.is_lost = False  # whether the zygote is known to be gone
        self._wanted_spares = spares
        self._pid = process.pid if process else 0
        self._ready = False
        self._inline = ""  # the step that the zygote runs itself
        self._pending: dict[str, Request] = {}
        self._spares: dict[int, Child] = {}
        self._asked = 0  # children that the zygote was asked for and has not announced
        self._busy: dict[int, Child] = {}
        self._events = select.epoll()
        self._events.register(connection, select.EPOLLIN)
        self._end: int | None = None  # readable once the process of a single worker is over
        if single:
            self._watch_end()

    def fileno(self) -> int:
        """What to poll."""
        return self._events.fileno()

    def run(self, step_id: str, request: Request) -> None:
        """Start a step; its end comes as an Exit from `receive`."""
        if self._ready and self.single:
            self.overflow[step_id] = request
        else:
            self._pending[step_id] = request
            self._hand_out()

    def kill(self, step_id: str, number: int = signal.SIGTERM) -> list[Exit]:
        """Send a signal to the step's process group; the end of a step that has no process yet."""
        if self.single:
            if self._pid and not (self.process and self.process.poll() is not None):
                signal_group(self._pid, number)
        elif self._pending.pop(step_id, None):
            return [Exit(step_id, -1, int(number))]
        for child in self._busy.values():
            if child.step_id == step_id:
                with contextlib.suppress(Unavailable):
                    self.send({"op": "kill", "pid": child.pid, "signal": int(number)})
        return []

    def receive(self) -> list[Exit]:
        """What ended since the last time. A zygote that died ends all of its steps with signal 9."""
        ended: list[Exit] = []
        for descriptor, _ in self._events.poll(0):
            child = next((one for one in self._busy.values() if one.socket.fileno() == descriptor), None)
            if child is not None:
                ended += self._hear_child(child)
            elif descriptor == self.socket.fileno():
                ended += self._hear_zygote()
            elif descriptor == self._end:
                ended += self._lost()
        return ended

    def send(self, message: Mapping[str, Any]) -> None:
        """Tell the zygote something. Raises Unavailable when it is gone."""
        try:
            self.socket.send(json.dumps(message).encode())
        except OSError as exc:
            raise Unavailable(f"a pipeline worker process is gone: {exc}") from exc

    def forget(self) -> None:
        """Stop waiting for steps that were killed; what is still said of them will be ignored."""
        for child in self._busy.values():
            child.socket.close()
        self._busy.clear()
        self._pending.clear()
        self.overflow.clear()
        self._inline = ""

    def close(self, wait: bool = True) -> None:
        """Let the zygote go; it ends its children and itself."""
        for child in (*self._spares.values(), *self._busy.values()):
            child.socket.close()
        self.socket.close()
        self._events.close()
        if self._end is not None:
            os.close(self._end)
            self._end = None
        if wait and self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=5)

    @property
    def is_closed(self) -> bool:
        """Whether the zygote was let go."""
        return self._events.closed

    @property
    def is_idle(self) -> bool:
        """Whether no step runs or waits here."""
        return not (self._busy or self._inline or self._pending or self.overflow)

    @property
    def is_alive(self) -> bool:
        """Whether the zygote still holds its end; the answer may be late while steps of it are being waited for."""
        try:
            return not self.is_lost and bool(self.socket.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def _hand_out(self) -> None:
        """Give waiting steps to waiting children, and have more children forked."""
        if not self._ready or self.single or self.is_lost:
            return
        while self._pending and self._spares:
            child = self._spares.pop(next(iter(self._spares)))
            child.step_id, request = next(iter(self._pending.items()))
            try:
                child.socket.send(request.message(self.environment))
            except (BrokenPipeError, ConnectionResetError):  # it died while it waited
                child.socket.close()
                continue
            except OSError as exc:
                raise Unavailable(f"step {child.step_id} cannot be given to its process: {exc}") from exc
            del self._pending[child.step_id]
            self._busy[child.pid] = child
            self._events.register(child.socket, select.EPOLLIN)
        missing = self._wanted_spares + len(self._pending) - len(self._spares) - self._asked
        if missing >= _BATCH or (self._pending and missing > 0):
            self._asked += missing
            with contextlib.suppress(Unavailable):  # `receive` will say so
                self.send({"op": "fork", "count": missing})

    def _hear_zygote(self) -> list[Exit]:
        try:
            data, attached, _, _ = self.socket.recvmsg(_MESSAGE_BYTES, ONE_DESCRIPTOR, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return []
        except OSError:
            data, attached = b"", []
        if not data:
            return self._hung_up()
        message = json.loads(data)
        if message["event"] == "child":
            if not attached:
                raise Unavailable("a step's process cannot be reached: too many files are open; raise `ulimit -n`")
            self._spares[message["pid"]] = Child(message["pid"], received_socket(attached))
            self._asked -= 1
            self._hand_out()
            return []
        if message["event"] == "ended":
            return [end for gone in message["children"] for end in self._bury(*gone)]
        if message["event"] == "exited":
            step_id, self._inline = self._inline, ""
            return [exit_told(step_id, message)] if step_id else []
        return self._loaded(message)

    def _hear_child(self, child: Child) -> list[Exit]:
        """What a child says of its step; nothing when it says nothing, which its zygote then explains."""
        if child.hung_up:
            return []
        try:
            data = child.socket.recv(_MESSAGE_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            child.hung_up = True
            self._events.unregister(child.socket)
            return []
        self._drop(child)
        return [exit_told(child.step_id, json.loads(data))]

    def _bury(self, pid: int, code: int, number: int, max_rss_kib: int, cpu_s: float) -> list[Exit]:
        """A child is gone: with a last word that was not read yet, or without one."""
        if pid in self._spares:
            self._spares.pop(pid).socket.close()
        child = self._busy.get(pid)
        if child is None:
            return []
        told = self._hear_child(child)
        if not told:
            self._drop(child)
        return told or [Exit(child.step_id, code, number, max_rss_kib, cpu_s)]

    def _drop(self, child: Child) -> None:
        del self._busy[child.pid]
        child.socket.close()  # which the kernel takes as the end of its events as well

    def _loaded(self, message: Mapping[str, Any]) -> list[Exit]:
        """The zygote is ready, or says why it never will be: start what waited, or hand it back."""
        if message["event"] == "declined":
            self.single = True
            self.overflow, self._pending = {**self.overflow, **self._pending}, {}
            return []
        if message["error"]:
            waiting, self._pending = self._pending, {}
            return [Exit(step_id, 1, error=message["error"]) for step_id in waiting]
        if self._ready:  # it has loaded more
            return []
        self._ready, self._pid = True, message["pid"]
        if self.single or not message["forkable"]:
            self._become_single()
        self._hand_out()
        return []

    def _become_single(self) -> None:
        if not self.single:
            self.single = True
            self._watch_end()
        waiting, self._pending = self._pending, {}
        for position, (step_id, request) in enumerate(waiting.items()):
            if position:
                self.overflow[step_id] = request
                continue
            self._inline = step_id
            with contextlib.suppress(OSError):  # its end will be seen
                self.socket.send(request.message(self.environment, "run"))

    def _watch_end(self) -> None:
        """Have the end of the process seen as such: a command that it becomes closes the socket and goes on."""
        if self.process is not None:
            self._end = os.pidfd_open(self.process.pid)
            self._events.register(self._end, select.EPOLLIN)

    def _hung_up(self) -> list[Exit]:
        if self._end is None:
            return self._lost()
        self._events.unregister(self.socket)
        return []

    def _lost(self) -> list[Exit]:
        """The zygote is gone, and with it all that it would have told."""
        self.is_lost = True
        for watched in (self.socket, self._end):
            if watched is not None:
                with contextlib.suppress(FileNotFoundError):
                    self._events.unregister(watched)
        code, number = -1, int(signal.SIGKILL)
        if self.single and self.process is not None:
            returned = self.process.wait()
            code, number = (returned, 0) if returned >= 0 else (-1, -returned)
        ended = []
        for child in list(self._busy.values()):
            told = self._hear_child(child)
            if not told:
                signal_group(child.pid, signal.SIGKILL)  # nobody would hear of it, and the step may be tried again
                self._drop(child)
            ended += told or [Exit(child.step_id, code, number)]
        ended += [Exit(step_id, code, number) for step_id in (self._inline, *self._pending) if step_id]
        self._inline = ""
        self._pending.clear()
        return ended
