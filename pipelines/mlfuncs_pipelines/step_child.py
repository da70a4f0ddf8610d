"""What a forked child does with one pipeline step: its log and folder, the code, the report of how it ended.

It takes {"request": {..} or "path": FILE, "environ": {..}} and answers {"event": "exited", "code": .., "cpu_s": ..,
"max_rss_kib": .., "output": null or the output of a step of ours, "digests": {path: SHA-256}}.

The standard library only (and syntax that Python 3.9 reads): see `zygote`, which loads this file by its path.
"""

import atexit
import contextlib
import hashlib
import importlib
import json
import os
import resource
import sys
import threading
import traceback
import types

_LARGE_BYTES = 1 << 20  # what is smaller costs the engine less than a millisecond
_NO_REQUEST = {"executor_input": {"outputs": {"artifacts": {}}}, "digests": True}
_REHEARSAL = '{"request": {"kind": "step", "log": "", "cwd": null, "env": {}, "json_inputs": []}, "environ": {}}'
mask = str  # what is done to text about an error; a step with secrets replaces it


def wait_for_step(connection, loaded):
    """Wait for the step that comes over `connection`, run it and exit; just exit when none comes any more."""
    connection.set_inheritable(False)
    make_ready(loaded)
    try:
        data = connection.recv(1 << 20)
    except OSError:
        data = b""
    if not data:
        os._exit(0)
    run_child(json.loads(data), loaded, connection)


def make_ready(loaded):
    """What every step's process needs, done before its step is known."""
    if os.getpid() != os.getsid(0):
        os.setsid()
    numpy = sys.modules.get("numpy")
    if numpy is not None and hasattr(numpy, "random"):
        numpy.random.seed()  # else every child would draw the same numbers
    rehearse(loaded)


def rehearse(loaded):
    """Go the way of a step that does nothing: code that ran before is quicker, and its memory pages are copied."""
    read_request(json.loads(_REHEARSAL))
    if loaded is not None:
        from mlfuncs_pipelines.rehearsal import rehearse as rehearse_step

        rehearse_step()
    describe_exit(0, {"output": None, "digests": digests_of(_NO_REQUEST)})


def run_child(message, loaded, connection):
    """Run a step in this process, tell its exit code and results over `connection`, and exit."""
    code, results, request = 1, {}, {}
    try:
        request = read_request(message)
        for name, value in message["environ"].items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        prepare(request)
        code, output = HANDLERS[request["kind"]](request, loaded)
        results = {"output": output, "digests": digests_of(request)}
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
        if isinstance(exc.code, str):
            report(request, exc)
    except BaseException as exc:  # noqa: BLE001 - a step may raise anything; it is reported and ends the child
        report(request, exc)
    finish(code or 0, results, connection)


def read_request(message):
    """The request that a message holds, or names the file of."""
    if "request" in message:
        return message["request"]
    with open(message["path"], encoding="utf-8") as file:
        return json.load(file)


def prepare(request):
    """The step's own log, variables and working folder."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    if request.get("env"):
        os.environ.update(request["env"])
    if request.get("cwd"):
        os.chdir(request["cwd"])


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
    return 0, None


def run_command(request, _):
    """A command of its own; this process becomes it."""
    arguments = request["argv"]
    try:
        os.execvpe(arguments[0], arguments, os.environ)
    except OSError as exc:
        print(f"{arguments[0]}: {exc.strerror}", file=sys.stderr)
        return 127, None


def run_step(request, loaded):
    """A step of mlfuncs' own, loaded ahead where possible; its output travels back with the report."""
    return 0, importlib.import_module("mlfuncs_pipelines.step").run_request(request, loaded)


HANDLERS = {"kfp": run_kfp, "command": run_command, "step": run_step}


def digests_of(request):
    """SHA-256 by path of the large files among the step's artifacts, which the cache will ask for.

    Here, because the engine's one thread has other steps to start.
    """
    found = {}
    for planned in request["executor_input"]["outputs"]["artifacts"].values() if request.get("digests") else ():
        path = planned["artifacts"][0]["uri"]
        if os.path.isfile(path) and os.path.getsize(path) >= _LARGE_BYTES:
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
            found[path] = digest.hexdigest()
    return found


def report(request, exc):
    """Print the traceback from the user's first frame on, and leave it as JSON for the engine."""
    frames = traceback.extract_tb(exc.__traceback__)
    ours = ("zygote.py", "step_child.py", "step.py", os.path.join("kfp", "dsl", "executor.py"))
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


def finish(code, results, connection):
    """Leave as an interpreter does (threads joined, atexit run), without tearing down the inherited one."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        with contextlib.suppress(OSError):  # the engine is gone, or the step has closed what it did not open
            connection.send(describe_exit(code & 0xFF, results))
        os._exit(code & 0xFF)


def describe_exit(code, results):
    """The message that this process ends with `code`, and what it and those that it waited for have used."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    message = {
        "event": "exited",
        "code": code,
        "max_rss_kib": max(usage.ru_maxrss for usage in usages),
        "cpu_s": sum(usage.ru_utime + usage.ru_stime for usage in usages),
        **results,
    }
    return json.dumps(message).encode()
