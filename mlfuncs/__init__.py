"""Decorated Python functions as tracked runs, autoscaling endpoints, pipeline steps and feature-store clients.

`import mlfuncs as ml` loads almost nothing: every name below is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlfuncs.adapters import FACADE as _FACADE

__version__ = "0.1.0"

# public name -> module of the core that defines it
_CORE = {
    "Batch": "mlfuncs.spec",
    "ClassificationMetrics": "mlfuncs.results",
    "Endpoint": "mlfuncs.endpoints",
    "Function": "mlfuncs.decorator",
    "HTML": "mlfuncs.results",
    "LogUniform": "mlfuncs.search",
    "Markdown": "mlfuncs.results",
    "Metrics": "mlfuncs.results",
    "MlfuncsError": "mlfuncs.errors",
    "Pod": "mlfuncs.spec",
    "Resources": "mlfuncs.spec",
    "Run": "mlfuncs.runs",
    "Scale": "mlfuncs.spec",
    "Settings": "mlfuncs.settings",
    "compare_runs": "mlfuncs.runs",
    "endpoint": "mlfuncs.endpoints",
    "list_endpoints": "mlfuncs.endpoints",
    "function": "mlfuncs.decorator",
    "log_artifact": "mlfuncs.tracking",
    "log_metric": "mlfuncs.tracking",
    "log_params": "mlfuncs.tracking",
    "read_settings": "mlfuncs.settings",
    "get_run": "mlfuncs.runs",
    "run": "mlfuncs.runs",
    "list_runs": "mlfuncs.runs",
    "secret": "mlfuncs.secrets",
}

__all__ = sorted([*_CORE, *_FACADE])

if TYPE_CHECKING:  # for editors and type checkers; `as` marks a name as exported
    from mlfuncs.decorator import Function as Function
    from mlfuncs.decorator import function as function
    from mlfuncs.errors import MlfuncsError as MlfuncsError
    from mlfuncs.settings import Settings as Settings
    from mlfuncs.settings import read_settings as read_settings
    from mlfuncs.spec import Batch as Batch
    from mlfuncs.spec import Pod as Pod
    from mlfuncs.spec import Resources as Resources
    from mlfuncs.spec import Scale as Scale


def __getattr__(name: str) -> Any:
    if name in _CORE:
        import importlib

        value = getattr(importlib.import_module(_CORE[name]), name)
    elif name in _FACADE:
        from mlfuncs.adapters import resolve

        value = resolve(*_FACADE[name], what=f"ml.{name}")
    else:
        raise AttributeError(f"module 'mlfuncs' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
