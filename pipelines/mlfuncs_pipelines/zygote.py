"""A warm process that forks one child per pipeline step: `python -P zygote.py FD`.

The standard library only (and syntax that Python 3.9 reads), because it also runs inside the virtual environments of
kfp's lightweight components, where mlfuncs is not installed. FD is one end of a SOCK_SEQPACKET pair; messages are JSON.

    engine to zygote   {"op": "preload", "modules": [..], "path": [..], "step": {..}}   answered by "ready"
                       {"op": "run", "id": .., "request": {..} or "path": FILE, "environ": {..}, "inline": false}
                       {"op": "kill", "id": .., "signal": 15}
                       {"op": "fork"} with a socket attached: a child becomes another zygote behind that socket
    zygote to engine   {"event": "ready", "forkable": true, "error": ""}
                       {"event": "exited", "id": .., "code": .., "signal": .., "max_rss_kib": .., "cpu_s": ..,
                        "output": null or the output of a step of ours, "digests": {path: SHA-256}}
                       {"event": "declined"} on the attached socket: this process cannot fork safely

A child is forked ahead and waits for its step. It says itself how the step ended, which the zygote passes on, so that
nobody waits for the end of its process; for a child that ended without a word the zygote speaks.

"inline" makes the zygote itself run the step and end with it: for code that cannot be forked safely.

When the engine's end closes, the children are ended and the zygote exits: nothing outlives a killed engine.
"""

import array
import contextlib
import functools
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
import traceback
import types
import warnings

_FORK_SAFE_THREADS = {"jemalloc_bg_thd"}  # pyarrow's allocator, which has fork handlers of its own
_SPARES = 2  # children forked ahead: with one, a step of 1 ms waits for the next child to be ready
_REHEARSALS = 16  # CPython 3.11 specialises code that was called 8 times
_GRACE_S = 2.0  # between asking children to end and killing them


def _load_beside(name):
    """A module of this folder, which is not on the path: its other names must not stand in for a user's modules."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), name + ".py")
    module = types.ModuleType("mlfuncs_" + name)
    module.__file__ = path
    sys.modules[module.__name__] = module
    with open(path, encoding="utf-8") as file:
        exec(compile(file.read(), path, "exec"), module.__dict__)
    return module


step_child = _load_beside("step_child")


class Zygote:
    """The loop around one socket. `children` maps a child's pid to the id of its step."""

    def __init__(self, connection):
        connection.set_inheritable(False)
        self.connection = connection
        self.children = {}
        self.loaded = None
        self.forkable = True
        self.spares = {}  # pid to pipe of children forked ahead, waiting for a step each
        self.report_read, self.report_write = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.report_read.setblocking(False)
        if sys.stdout is not None:
            sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        self.wake_read, self.wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self.wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def serve(self):
        """Answer messages until the engine is gone."""
        while True:
            ready, _, _ = select.select([self.connection, self.report_read, self.wake_read], [], [])
            if self.report_read in ready:
                self.pass_on()
            if self.wake_read in ready:
                os.read(self.wake_read, 4096)
                self.reap()
            if self.connection in ready and not self.receive():
                self.end_children()
                os._exit(0)

    def receive(self):
        """Handle one message; False when the engine is gone."""
        try:
            data, ancillary, _, _ = self.connection.recvmsg(1 << 20, socket.CMSG_SPACE(4))
        except OSError:
            return False
        if not data:
            return False
        message = json.loads(data)
        operation = message["op"]
        if operation == "run":
            self.run(message, data)
        elif operation == "kill":
            self.kill(message["id"], message["signal"])
        elif operation == "preload":
            self.preload(message)
        elif operation == "fork":
            self.fork_zygote(ancillary)
        return True

    def send(self, message):
        """Tell the engine something: an object, or the bytes of one."""
        data = message if isinstance(message, bytes) else json.dumps(message).encode()
        with contextlib.suppress(OSError):  # the engine is gone; the next receive ends this process
            self.connection.send(data)

    def preload(self, message):
        """Import what the steps need, and say whether forking is safe afterwards."""
        self.drop_spares()  # they know nothing of what is loaded now
        error = ""
        try:
            sys.path[:0] = [folder for folder in message.get("path", []) if folder not in sys.path]
            for name in message.get("modules", []):
                importlib.import_module(name)
            if message.get("step"):
                step = importlib.import_module("mlfuncs_pipelines.step")
                self.loaded = step.load(message["step"])
                step.rehearse(_REHEARSALS)
        except BaseException as exc:  # noqa: BLE001 - the user's module may raise anything at import
            error = "".join(traceback.format_exception(type(exc), exc, exc.__traceback__))
        gc.collect()
        gc.freeze()  # a collection in a child would copy every page that it looks at
        self.forkable = is_single_threaded()
        self.send({"event": "ready", "forkable": self.forkable, "error": error})

    def run(self, message, data):
        if message.get("inline"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)
            step_child.make_ready(None)
            step_child.run_child(message, self.loaded, lambda *end: self.send(describe_exit(message["id"], *end)))
        if not self.spares:
            self.fork_ahead()
        pid = next(iter(self.spares))
        pipe = self.spares.pop(pid)
        self.children[pid] = message["id"]
        with contextlib.suppress(BrokenPipeError):  # the child is dead already, which reap reports
            os.write(pipe, data)
        os.close(pipe)
        while len(self.spares) < _SPARES:
            self.fork_ahead()

    def fork_ahead(self):
        """One more child that waits for a step, so that no step waits for a fork."""
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(writing)
            self.detach()
            step_child.make_ready(self.loaded)
            data = b""
            while part := os.read(reading, 262144):
                data += part
            os.close(reading)
            if not data:
                os._exit(0)  # the zygote is gone
            message = json.loads(data)
            step_child.run_child(message, self.loaded, functools.partial(self.report_exit, message["id"]))
        os.close(reading)
        self.spares[pid] = writing

    def report_exit(self, step_id, code, results):
        """In a child: say how its step ended. The zygote reads the pid and passes on the rest."""
        with contextlib.suppress(OSError):  # the zygote is gone, which the engine sees
            self.report_write.send(b"%d " % os.getpid() + describe_exit(step_id, code, results))

    def pass_on(self):
        """Hand the children's last words to the engine."""
        while True:
            try:
                pid, _, message = self.report_read.recv(1 << 20).partition(b" ")
            except BlockingIOError:
                return
            if int(pid) in self.children:
                self.children[int(pid)] = None
                self.send(message)

    def detach(self):
        """In a forked child: let go of what belongs to the zygote."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.connection.close()
        self.report_read.close()
        os.close(self.wake_read)
        os.close(self.wake_write)
        self.drop_spares()
        self.children = {}

    def drop_spares(self):
        for pipe in self.spares.values():
            os.close(pipe)
        self.spares = {}

    def fork_zygote(self, ancillary):
        descriptors = array.array("i")
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors.frombytes(payload[: len(payload) - len(payload) % descriptors.itemsize])
        if not self.forkable:
            socket.socket(fileno=descriptors[0]).send(json.dumps({"event": "declined"}).encode())
            return
        pid = os.fork()
        if pid == 0:
            self.detach()
            self.report_write.close()
            Zygote(socket.socket(fileno=descriptors[0])).serve()
        self.children[pid] = None
        for descriptor in descriptors:
            os.close(descriptor)

    def kill(self, step_id, number):
        for pid, owner in self.children.items():
            if owner == step_id:
                signal_group(pid, number)

    def reap(self):
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self.spares:
                os.close(self.spares.pop(pid))
            self.pass_on()  # its last words, if it had any, are in the socket by now
            step_id = self.children.pop(pid, None)
            if step_id is not None:
                code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -1
                number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
                self.send(describe_exit(step_id, code, {}, number, [usage]))

    def end_children(self):
        steps = [pid for pid, owner in self.children.items() if owner is not None]
        for pid in steps:
            signal_group(pid, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_S
        while self.children and time.monotonic() < deadline:
            self.reap()
            if not any(owner is not None for owner in self.children.values()):
                return
            select.select([self.wake_read], [], [], 0.05)
        for pid in list(self.children):
            if self.children[pid] is not None:
                signal_group(pid, signal.SIGKILL)


def describe_exit(step_id, code, results, number=0, usages=()):
    """An "exited" message as bytes; `usages` are of this process and its children unless given."""
    usages = usages or [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    message = {
        "event": "exited",
        "id": step_id,
        "code": code,
        "signal": number,
        "max_rss_kib": max(usage.ru_maxrss for usage in usages),
        "cpu_s": sum(usage.ru_utime + usage.ru_stime for usage in usages),
        **results,
    }
    return json.dumps(message).encode()


def signal_group(pid, number):
    """Send a signal to a step and everything it started."""
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)  # not yet the leader of its own group


def is_single_threaded():
    """Whether this process can fork safely.

    A first fork makes OpenBLAS put its threads away (it has fork handlers) until the next call; what is left after it
    are threads that a child would lose while their locks stay held.
    """
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    try:
        others = [task for task in os.listdir("/proc/self/task") if int(task) != os.getpid()]
        return all(_thread_name(task) in _FORK_SAFE_THREADS for task in others)
    except OSError:
        return threading.active_count() == 1


def _thread_name(task):
    with open(f"/proc/self/task/{task}/comm") as file:
        return file.read().strip()


if __name__ == "__main__":
    # Python 3.12 warns of every thread; `is_single_threaded` knows those that a fork survives
    warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
    Zygote(socket.socket(fileno=int(sys.argv[1]))).serve()
