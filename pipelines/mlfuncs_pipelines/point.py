"""One point of a sweep as a step: the function is called as a run of its own, and a failure of it is a result too.

The step's inputs are a point as JSON text ({"point": number, "values": {name: document}}), the documents that all
points share, and the sweep's id. What came of it is left at the artifact URL, where the sweep looks for it; the step's
output says it in short, for the step that collects.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlfuncs.interface.signature import Signature
    from mlfuncs_pipelines.step import Loaded


def point_signature() -> Signature:
    """The interface of every point step."""
    from mlfuncs.interface.signature import Signature

    return Signature.of(_step_of(None))


def _step_of(loaded: Loaded | None) -> Callable[[str, str, str], dict[str, Any]]:
    """The step over the swept function; None when only its signature is wanted, before there is one."""

    def point(point: str, shared: str, sweep: str) -> dict[str, Any]:
        assert loaded is not None
        return run_point(loaded, json.loads(point), json.loads(shared), sweep)

    return point


def as_point(loaded: Loaded) -> Loaded:
    """`loaded` as the step that runs one point of a sweep."""
    from mlfuncs_pipelines.ports import input_ports, output_ports

    signature = point_signature()
    inputs, outputs = input_ports(signature), output_ports(signature)
    return dataclasses.replace(loaded, target=_step_of(loaded), signature=signature, inputs=inputs, outputs=outputs)


def run_point(loaded: Loaded, given: Mapping[str, Any], shared: Mapping[str, Any], sweep: str) -> dict[str, Any]:
    """Call the function with the values of one point, leave the outcome for the sweep, and return it in short."""
    from mlfuncs.runs.outcome import final_of, store_outcome

    outcome = _outcome(loaded, {**shared, **given["values"]}, f"{sweep}-{given['point']}")
    store_outcome(loaded.settings, sweep, given["point"], outcome)
    final = final_of(outcome)
    error = final.get("error") or {}
    if error:
        print(error.get("traceback") or f"{error['type']}: {error['message']}", file=sys.stderr)
    return {
        "point": given["point"],
        "status": final["status"],
        "params": {name: _shown(document) for name, document in given["values"].items()},
        "numbers": _numbers(outcome),
        "error": f"{error['type']}: {error['message']}" if error else "",
    }


def _outcome(loaded: Loaded, documents: Mapping[str, Any], run_id: str) -> dict[str, Any]:
    """What comes of the function's attempts, as many as its spec allows."""
    from mlfuncs.errors import MlfuncsError
    from mlfuncs.runs.journal import FINISH, Journal, failed
    from mlfuncs.runs.outcome import Left
    from mlfuncs.runs.values import decode

    left = Left.under(_folder())
    journal = Journal(left.journal)
    hints = {parameter.name: parameter.annotation for parameter in loaded.signature.parameters}
    try:
        values = {name: decode(item, _hint(hints.get(name)), loaded.settings) for name, item in documents.items()}
    except MlfuncsError as exc:
        journal.append(FINISH, failed(type(exc).__name__, str(exc)))
    else:
        _attempt_often(loaded, values, journal, left.log, run_id)
    outcome = left.ended()
    journal.close()
    return outcome


def _folder() -> Path:
    """The folder of this step on the local engine, which reads there what a point that is killed leaves."""
    from mlfuncs.runs.tracking import enclosing_run

    step = enclosing_run()
    return Path(tempfile.mkdtemp(prefix="mlfuncs-point-")) if step is None else step.journal.path.parent


def _attempt_often(loaded: Loaded, values: Mapping[str, Any], journal: Any, printed: Path, run_id: str) -> None:
    from mlfuncs.runs.capture import RunLog, captured
    from mlfuncs.runs.execution import execute
    from mlfuncs.runs.journal import ATTEMPT, FINISH
    from mlfuncs.runs.tracking import ActiveRun
    from mlfuncs.secrets import available_secrets

    secrets = available_secrets(loaded.spec.secrets, loaded.settings)
    log = RunLog(printed, secrets)
    for attempt in range(1, loaded.spec.retries + 2):
        journal.append(ATTEMPT, attempt)
        run = ActiveRun(run_id, loaded.settings, journal, secrets)
        with captured(run_id, log):
            outcome = execute(loaded.target, values, loaded.signature.returns, loaded.spec, run)
        journal.append(FINISH, outcome.final)
        if isinstance(outcome.raised, KeyboardInterrupt):
            raise outcome.raised
        if outcome.final["status"] == "succeeded":
            break
        if attempt <= loaded.spec.retries:
            log.write(f"attempt {attempt} failed; trying again\n")
    log.close()


def _numbers(outcome: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of the outcome, and the numbers among its outputs."""
    from mlfuncs.runs.journal import METRIC
    from mlfuncs.runs.objective import numbers_of
    from mlfuncs.runs.outcome import final_of

    documents = (final_of(outcome).get("outputs") or {}).items()
    found = numbers_of({name: document["value"] for name, document in documents if "value" in document})
    found |= {entry[1]: entry[2] for entry in outcome["entries"] if entry[0] == METRIC}
    return {name: value for name, value in found.items() if math.isfinite(value)}  # JSON has no others


def _shown(document: Mapping[str, Any]) -> Any:
    return document["value"] if "value" in document else f"artifact:{document['artifact']['digest'][:12]}"


def _hint(annotation: Any) -> Any:
    return None if annotation is Any or isinstance(annotation, str) else annotation
