"""One step of a run, run again alone: same inputs, same code, outputs put aside, the debugger on failure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from mlfuncs.errors import Conflict, NotFound
from mlfuncs.settings import Settings
from mlfuncs_pipelines.run_log import read_journal, runs_folder
from mlfuncs_pipelines.steps import REQUEST_FILE

_CHILD = Path(__file__).with_name("debug_child.py")


def debug_step(run_id: str, step: str, settings: Settings) -> int:
    """Run the step's last attempt again in the foreground and return its exit code.

    Raises NotFound for an unknown run or step, Conflict for a step that had no process of its own.
    """
    events = read_journal(runs_folder(settings) / run_id)
    started = {event["id"]: event for event in events if event["event"] == "started"}
    if step not in started:
        ended = {event["id"] for event in events if event["event"] == "ended"}
        if step in ended:
            raise Conflict(
                f"step {step} of {run_id} had no process: its result came from the cache, or it is an importer"
            )
        raise NotFound("step", step, started)
    folder = Path(started[step]["folder"])
    if "request" in started[step]:
        request = json.dumps(started[step]["request"])
    else:
        request = (folder / REQUEST_FILE).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="mlfuncs-debug-") as aside:
        body = json.loads(request.replace(json.dumps(str(folder))[1:-1], aside))
        path = Path(aside) / REQUEST_FILE
        path.write_text(json.dumps({**body, "track": None}), encoding="utf-8")
        environment = {**os.environ, **settings.to_environ(), **body.get("env", {}), "_KFP_RUNTIME": "true"}
        python = body.get("python") or sys.executable
        return subprocess.run([python, "-P", str(_CHILD), str(path)], env=environment).returncode
