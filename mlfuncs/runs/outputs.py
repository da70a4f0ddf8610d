"""What a function returned, as the named outputs of its run.

    returned                                                       outputs
    None                                                           none
    a NamedTuple                                                   one per field
    a dict with text keys and a value that is more than JSON       one per key: {"model": estimator, "auc": 0.9}
    anything else, a dict of plain JSON included                   "output"

JSON is None, bool, int, float, text, lists and dicts of them, whatever their size; a NumPy number counts as a number.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

from mlfuncs.errors import NotFound
from mlfuncs.runs.tracking import ActiveRun, is_name, log_metric
from mlfuncs.runs.values import encode, masked, masked_document

_LEAVES = (type(None), bool, int, float, str)
_FEW = 1000  # items of what may stand in the registry; see `mlfuncs.runs.values.is_plain`


def encode_outputs(result: Any, returns: Any, run: ActiveRun) -> dict[str, Any]:
    """The outputs of `run`, whose function, annotated with `returns`, gave `result`, as documents by name.

    Values that have no plain form are stored; secrets are masked in what stands in the registry. Raises ArtifactError
    for a value that cannot be stored.
    """
    documents = {}
    for name, (value, hint) in split(result, returns).items():
        _log_metrics_value(value)
        document = encode(_unboxed(value, hint), _usable(hint), run.settings)
        documents[masked(name, run.secrets)] = masked_document(document, run.secrets)
    return documents


def split(result: Any, returns: Any) -> dict[str, tuple[Any, Any]]:
    """Output name to its value and type hint; see the module's table.

    >>> list(split({"model": object(), "auc": 0.9}, dict)), list(split({"auc": 0.9}, dict))
    (['model', 'auc'], ['output'])
    """
    names = getattr(type(result), "_fields", None)
    if result is None:
        return {}
    if isinstance(result, tuple) and names is not None:
        hints = getattr(type(result), "__annotations__", {})
        return {name: (value, hints.get(name)) for name, value in zip(names, result, strict=True)}
    if type(result) is dict and result and all(map(_is_output_name, result)) and not _is_json(result):
        hints = getattr(returns, "__annotations__", {}) if isinstance(returns, type) else {}  # of a TypedDict
        return {name: (value, hints.get(name)) for name, value in result.items()}
    return {"output": (result, None if returns is inspect.Signature.empty else returns)}


class Outputs(dict[str, Any]):
    """Outputs by name: plain values and artifacts. What `log_artifact` kept is found by its name too, when no output
    has it, but is not counted or listed here."""

    def __init__(self, returned: Mapping[str, Any], logged: Mapping[str, Any]) -> None:
        super().__init__(returned)
        self._logged = logged

    def __missing__(self, name: str) -> Any:
        if name in self._logged:
            return self._logged[name]
        raise OutputNotFound("output", str(name), [*self, *self._logged])

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self._logged

    def get(self, name: str, default: Any = None) -> Any:
        """The output of that name, or the logged artifact; else `default`."""
        return super().get(name, self._logged.get(name, default))


class OutputNotFound(NotFound, KeyError):
    """A run has no output of that name; a KeyError too, as of any dict."""

    __str__ = Exception.__str__  # a KeyError shows its message in quotes


def _is_output_name(key: Any) -> bool:
    return type(key) is str and bool(key) and is_name(key)


def _is_json(value: Any) -> bool:
    """Whether the value is JSON all the way down; stops at the first part that is not."""
    if type(value) is dict:
        return all(type(key) is str and _is_json(item) for key, item in value.items())
    if type(value) is list:
        return all(_is_json(item) for item in value)
    return type(value) in _LEAVES or _is_number(value)


def _is_number(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.generic) and value.dtype.kind in "biuf" and _fits(value)


def _fits(value: Any) -> bool:
    return type(value.item()) in (bool, int, float)  # a long double is no Python float


def _unboxed(value: Any, hint: Any) -> Any:
    """The value with NumPy's numbers as Python's, which are equal and need no file; as it is when hinted so."""
    if _is_number(value):
        return value if hint is type(value) else value.item()
    if type(value) is dict and len(value) <= _FEW:
        return {key: _unboxed(item, None) for key, item in value.items()}
    if type(value) is list and len(value) <= _FEW:
        return [_unboxed(item, None) for item in value]
    return value


def _usable(hint: Any) -> Any:
    return None if isinstance(hint, str) or hint is Any else hint


def _log_metrics_value(value: Any) -> None:
    """Returned metrics count as logged, so that runs compare by them."""
    from mlfuncs.results import ClassificationMetrics, Metrics

    if isinstance(value, Metrics):
        for name, number in value.items():
            log_metric(name, number)
    elif isinstance(value, ClassificationMetrics) and value.auc is not None:
        log_metric("auc", value.auc)
