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
    "Cron": "mlfuncs.triggers",
    "ClassificationMetrics": "mlfuncs.results",
    "Endpoint": "mlfuncs.endpoints",
    "Function": "mlfuncs.decorator",
    "HTML": "mlfuncs.results",
    "KafkaTopic": "mlfuncs.triggers",
    "LogUniform": "mlfuncs.search",
    "Markdown": "mlfuncs.results",
    "Metrics": "mlfuncs.results",
    "MlfuncsError": "mlfuncs.errors",
    "Pod": "mlfuncs.spec",
    "RedisStream": "mlfuncs.triggers",
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
    from mlfuncs.endpoints import Endpoint as Endpoint
    from mlfuncs.endpoints import endpoint as endpoint
    from mlfuncs.endpoints import list_endpoints as list_endpoints
    from mlfuncs.errors import MlfuncsError as MlfuncsError
    from mlfuncs.results import HTML as HTML
    from mlfuncs.results import ClassificationMetrics as ClassificationMetrics
    from mlfuncs.results import Markdown as Markdown
    from mlfuncs.results import Metrics as Metrics
    from mlfuncs.runs import Run as Run
    from mlfuncs.runs import compare_runs as compare_runs
    from mlfuncs.runs import get_run as get_run
    from mlfuncs.runs import list_runs as list_runs
    from mlfuncs.runs import run as run
    from mlfuncs.search import LogUniform as LogUniform
    from mlfuncs.secrets import secret as secret
    from mlfuncs.settings import Settings as Settings
    from mlfuncs.settings import read_settings as read_settings
    from mlfuncs.spec import Batch as Batch
    from mlfuncs.spec import Pod as Pod
    from mlfuncs.spec import Resources as Resources
    from mlfuncs.spec import Scale as Scale
    from mlfuncs.tracking import log_artifact as log_artifact
    from mlfuncs.tracking import log_metric as log_metric
    from mlfuncs.tracking import log_params as log_params
    from mlfuncs.triggers import Cron as Cron
    from mlfuncs.triggers import KafkaTopic as KafkaTopic
    from mlfuncs.triggers import RedisStream as RedisStream


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
