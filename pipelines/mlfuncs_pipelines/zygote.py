"""A warm process that forks one child per pipeline step: `python -P zygote.py FD`.

The standard library only (and syntax that Python 3.9 reads), because it also runs inside the virtual environments of
kfp's lightweight components, where mlfuncs is not installed. FD is one end of a SOCK_SEQPACKET pair; messages are JSON.

    engine to zygote   {"op": "preload", "modules": [..], "path": [..], "step": {..}}   answered by "ready"
                       {"op": "fork", "count": 2}     so many children, each announced by "child"
                       {"op": "kill", "pid": .., "signal": 15}
                       {"op": "zygote"} with a socket attached: a child becomes another zygote behind that socket
                       {"op": "run", ..}              run this step (see `step_child`) in the zygote itself
    zygote to engine   {"event": "ready", "pid": .., "forkable": true, "error": ""}
                       {"event": "child", "pid": ..} with a socket attached, on which the child waits for its step
                       {"event": "ended", "children": [[pid, exit code, signal, peak KiB, CPU s], ..]}
                       {"event": "declined"} on the attached socket: this process cannot fork safely

Children are forked ahead. The engine gives a step to one of them and hears from it how the step ended, each over the
child's own socket, so that neither waits for a fork that goes on meanwhile; "ended" speaks for a child that could not.

"run" is for code that cannot be forked safely: the process ends with the step.

When the engine's end closes, the children are ended and the zygote exits: nothing outlives a killed engine.
"""

import array
import contextlib
import gc
import importlib
import json
import os
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


def readable(descriptors, timeout_ms=None):
    """Those with something to read; `select.select` would take none above 1023, and the engine may have many open."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in poll.poll(timeout_ms)]


step_child = _load_beside("step_child")
# what `signal.signal` calls; the enums that it makes of everything cost a child a hundred page faults
_set_handler = importlib.import_module("_signal").signal
_SIGCHLD, _SIGINT, _SIG_DFL = int(signal.SIGCHLD), int(signal.SIGINT), int(signal.SIG_DFL)


class Zygote:
    """The loop around one socket. `children` are the pids of steps and of those that wait for one."""

    def __init__(self, connection):
        connection.set_inheritable(False)
        self.connection = connection
        self.children = set()
        self.loaded = None
        self.forkable = True
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
            ready = readable([self.connection.fileno(), self.wake_read])
            if self.connection.fileno() in ready and not self.receive():
                self.end_children()
                os._exit(0)
            if self.wake_read in ready:
                os.read(self.wake_read, 4096)
                self.reap()

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
        if operation == "fork":
            for _ in range(message["count"]):
                self.fork_child()
        elif operation == "kill":
            if message["pid"] in self.children:
                signal_group(message["pid"], message["signal"])
        elif operation == "preload":
            self.preload(message)
        elif operation == "zygote":
            self.fork_zygote(_descriptors(ancillary)[0])
        elif operation == "run":
            self.release_signals()
            step_child.make_ready(None)
            step_child.run_child(message, self.loaded, self.connection)
        return True

    def send(self, message, descriptors=()):
        """Tell the engine something, with descriptors for it."""
        attached = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        with contextlib.suppress(OSError):  # the engine is gone; the next receive ends this process
            self.connection.sendmsg([json.dumps(message).encode()], attached)

    def preload(self, message):
        """Import what the steps need, and say whether forking is safe afterwards."""
        error = ""
        try:
            sys.path[:0] = [folder for folder in message.get("path", []) if folder not in sys.path]
            for name in message.get("modules", []):
                importlib.import_module(name)
            if message.get("step"):
                step = importlib.import_module("mlfuncs_pipelines.step")
                self.loaded = step.load(message["step"])
                for _ in range(_REHEARSALS):
                    step_child.rehearse(self.loaded)
        except BaseException as exc:  # noqa: BLE001 - the user's module may raise anything at import
            error = "".join(traceback.format_exception(type(exc), exc, exc.__traceback__))
        gc.collect()
        gc.freeze()  # a collection in a child would copy every page that it looks at
        self.forkable = is_single_threaded()
        self.send({"event": "ready", "pid": os.getpid(), "forkable": self.forkable, "error": error})

    def fork_child(self):
        """One more child that waits for a step, so that no step waits for a fork."""
        engines, childs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            engines.close()
            self.detach()
            step_child.wait_for_step(childs, self.loaded)
        childs.close()
        self.children.add(pid)
        self.send({"event": "child", "pid": pid}, [engines.fileno()])
        engines.close()

    def fork_zygote(self, descriptor):
        """Another zygote with all that this one has loaded, unless forking is not safe."""
        connection = socket.socket(fileno=descriptor)
        if not self.forkable:
            connection.send(json.dumps({"event": "declined"}).encode())
        elif os.fork() == 0:  # a zygote of its own: it is not among `children`, which this one ends
            self.detach()
            Zygote(connection).serve()
        connection.close()

    def detach(self):
        """In a forked child: let go of what belongs to the zygote."""
        self.release_signals()
        self.connection.close()
        os.close(self.wake_read)
        os.close(self.wake_write)
        self.children = set()

    def release_signals(self):
        """Have signals do what they do in a fresh interpreter."""
        signal.set_wakeup_fd(-1)
        _set_handler(_SIGCHLD, _SIG_DFL)
        _set_handler(_SIGINT, signal.default_int_handler)

    def reap(self):
        """Tell the engine of the children that are no more."""
        ended = []
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
                if pid == 0:
                    break
                if pid in self.children:
                    self.children.remove(pid)
                    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -1
                    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
                    ended.append([pid, code, number, usage.ru_maxrss, usage.ru_utime + usage.ru_stime])
        if ended:
            self.send({"event": "ended", "children": ended})

    def end_children(self):
        """Ask every child to end, and kill those that do not."""
        for pid in self.children:
            signal_group(pid, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_S
        while self.children and time.monotonic() < deadline:
            readable([self.wake_read], 50)
            self.reap()
        for pid in self.children:
            signal_group(pid, signal.SIGKILL)


def _descriptors(ancillary):
    found = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(payload[: len(payload) - len(payload) % found.itemsize])
    return found


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
