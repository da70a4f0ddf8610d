"""A warm process that forks one child per pipeline step: `python -P zygote.py FD`.

The standard library only (and syntax that Python 3.9 reads), because it also runs inside the virtual environments of
kfp's lightweight components, where mlfuncs is not installed. FD is one end of a SOCK_SEQPACKET pair; messages are JSON.

    engine to zygote   {"op": "preload", "modules": [..], "path": [..], "step": {..}}   answered by "ready"
                       {"op": "run", "id": .., "request": PATH, "inline": false}
                       {"op": "kill", "id": .., "signal": 15}
                       {"op": "fork"} with a socket attached: a child becomes another zygote behind that socket
    zygote to engine   {"event": "ready", "forkable": true, "error": ""}
                       {"event": "exited", "id": .., "code": .., "signal": .., "max_rss_kib": .., "cpu_s": ..}
                       {"event": "declined"} on the attached socket: this process cannot fork safely

"inline" makes the zygote itself run the step and end with it: for code that cannot be forked safely.

When the engine's end closes, the children are ended and the zygote exits: nothing outlives a killed engine.
"""

import array
import atexit
import contextlib
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

mask = str  # what is done to text about an error; a step with secrets replaces it
_FORK_SAFE_THREADS = {"jemalloc_bg_thd"}  # pyarrow's allocator, which has fork handlers of its own
_GRACE_S = 2.0  # between asking children to end and killing them


class Zygote:
    """The loop around one socket. `children` maps a child's pid to the id of its step."""

    def __init__(self, connection):
        connection.set_inheritable(False)
        self.connection = connection
        self.children = {}
        self.loaded = None
        self.forkable = True
        self.spare = None  # (pid, pipe) of a child forked ahead, waiting for its step
        self.wake_read, self.wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self.wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def serve(self):
        """Answer messages until the engine is gone."""
        while True:
            ready, _, _ = select.select([self.connection, self.wake_read], [], [])
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
            self.run(message)
        elif operation == "kill":
            self.kill(message["id"], message["signal"])
        elif operation == "preload":
            self.preload(message)
        elif operation == "fork":
            self.fork_zygote(ancillary)
        return True

    def send(self, message):
        with contextlib.suppress(OSError):  # the engine is gone; the next receive ends this process
            self.connection.send(json.dumps(message).encode())

    def preload(self, message):
        """Import what the steps need, and say whether forking is safe afterwards."""
        if self.spare is not None:  # it knows nothing of what is loaded now
            os.close(self.spare[1])
            self.spare = None
        error = ""
        try:
            sys.path[:0] = [folder for folder in message.get("path", []) if folder not in sys.path]
            for name in message.get("modules", []):
                importlib.import_module(name)
            if message.get("step"):
                self.loaded = importlib.import_module("mlfuncs_pipelines.step").load(message["step"])
        except BaseException as exc:  # noqa: BLE001 - the user's module may raise anything at import
            error = "".join(traceback.format_exception(type(exc), exc, exc.__traceback__))
        gc.collect()
        gc.freeze()  # a collection in a child would copy every page that it looks at
        self.forkable = is_single_threaded()
        self.send({"event": "ready", "forkable": self.forkable, "error": error})

    def run(self, message):
        if message.get("inline"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)
            run_child(message["request"], self.loaded, lambda code: self.farewell(message["id"], code))
        pid, pipe = self.spare or self.fork_ahead()
        self.spare = None
        self.children[pid] = message["id"]
        with contextlib.suppress(BrokenPipeError):  # the child is dead already, which reap reports
            os.write(pipe, message["request"].encode())
        os.close(pipe)
        self.spare = self.fork_ahead()

    def fork_ahead(self):
        """A child that waits for its step, so that a step does not wait for the fork."""
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(writing)
            self.detach()
            path = b""
            while part := os.read(reading, 65536):
                path += part
            os.close(reading)
            if not path:
                os._exit(0)  # the zygote is gone
            run_child(path.decode(), self.loaded)
        os.close(reading)
        return pid, writing

    def farewell(self, step_id, code):
        """Report the end of a step that ran in this very process."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        cpu_s = usage.ru_utime + usage.ru_stime
        body = {"id": step_id, "code": code, "signal": 0, "max_rss_kib": usage.ru_maxrss, "cpu_s": cpu_s}
        self.send({"event": "exited", **body})

    def detach(self):
        """In a forked child: let go of what belongs to the zygote."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.connection.close()
        os.close(self.wake_read)
        os.close(self.wake_write)
        if self.spare is not None:
            os.close(self.spare[1])
            self.spare = None
        self.children = {}

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
            if self.spare is not None and pid == self.spare[0]:
                os.close(self.spare[1])
                self.spare = None
            step_id = self.children.pop(pid, None)
            if step_id is not None:
                self.send(
                    {
                        "event": "exited",
                        "id": step_id,
                        "code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else -1,
                        "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
                        "max_rss_kib": usage.ru_maxrss,
                        "cpu_s": usage.ru_utime + usage.ru_stime,
                    }
                )

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


def run_child(path, loaded, farewell=lambda code: None):
    """Run the request at `path` in this process, say so to `farewell`, and exit with its code."""
    code = 1
    try:
        with open(path, encoding="utf-8") as file:
            request = json.load(file)
        prepare(request)
        code = HANDLERS[request["kind"]](request, loaded)
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
        if isinstance(exc.code, str):
            print(exc.code, file=sys.stderr)
    except BaseException as exc:  # noqa: BLE001 - a step may raise anything; it is reported and ends the child
        report(request if "request" in locals() else {}, exc)
    finish(code or 0, farewell)


def prepare(request):
    """The step's own session, log, working folder, variables and random numbers."""
    if os.getpid() != os.getsid(0):
        os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.close(null)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.update(request.get("env", {}))
    if request.get("cwd"):
        os.chdir(request["cwd"])
    numpy = sys.modules.get("numpy")
    if numpy is not None and hasattr(numpy, "random"):
        numpy.random.seed()  # else every child would draw the same numbers


def run_kfp(request, _):
    """A kfp lightweight component: its source as a module, executed by kfp's own executor."""
    executor = importlib.import_module(request.get("executor_module", "kfp.dsl.executor"))
    if request.get("cwd"):
        sys.path.insert(0, request["cwd"])  # as `python -m` does
    path = request["module_path"]
    with open(path, "w", encoding="utf-8") as file:
        file.write(request["source"])
    module = types.ModuleType("ephemeral_component")
    module.__file__ = path
    sys.modules["ephemeral_component"] = module
    exec(compile(request["source"], path, "exec"), module.__dict__)
    function = getattr(module, request["function"])
    executor.Executor(executor_input=request["executor_input"], function_to_execute=function).execute()
    return 0


def run_command(request, _):
    """A command of its own; this process becomes it."""
    arguments = request["argv"]
    try:
        os.execvpe(arguments[0], arguments, os.environ)
    except OSError as exc:
        print(f"{arguments[0]}: {exc.strerror}", file=sys.stderr)
        return 127


def run_step(request, loaded):
    """A step of mlfuncs' own, loaded ahead where possible."""
    return importlib.import_module("mlfuncs_pipelines.step").run_request(request, loaded)


HANDLERS = {"kfp": run_kfp, "command": run_command, "step": run_step}


def report(request, exc):
    """Print the traceback from the user's first frame on, and leave it as JSON for the engine."""
    frames = traceback.extract_tb(exc.__traceback__)
    ours = ("zygote.py", "step.py", os.path.join("kfp", "dsl", "executor.py"))
    first = next((n for n, frame in enumerate(frames) if not frame.filename.endswith(ours)), 0)
    exc.__traceback__ = _skip(exc.__traceback__, first)
    text = "".join(traceback.format_exception(type(exc), exc, exc.__traceback__))
    sys.stdout.flush()
    sys.stderr.write(text)
    if request.get("error_path"):
        with open(request["error_path"], "w", encoding="utf-8") as file:
            json.dump({"type": type(exc).__name__, "message": mask(str(exc)), "traceback": mask(text)}, file)


def _skip(trace, count):
    while count and trace is not None and trace.tb_next is not None:
        trace, count = trace.tb_next, count - 1
    return trace


def finish(code, farewell):
    """Leave as an interpreter does (threads joined, atexit run), without tearing down the inherited one."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        farewell(code & 0xFF)
        os._exit(code & 0xFF)


if __name__ == "__main__":
    Zygote(socket.socket(fileno=int(sys.argv[1]))).serve()
