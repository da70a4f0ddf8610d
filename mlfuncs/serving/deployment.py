"""From a function to a revision in the registry: options checked, bundle built, constructor's values stored."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import uuid
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlfuncs.errors import Conflict, SpecError, did_you_mean
from mlfuncs.serving.revision_config import RevisionConfig
from mlfuncs.serving.rollouts import check_traffic, start_rollout
from mlfuncs.settings import Settings
from mlfuncs.spec import FunctionSpec, check_name

if TYPE_CHECKING:
    from mlfuncs.decorator import Function
    from mlfuncs.registry import EndpointRow, Registry, Revision

DEFAULT_WAIT_S = 300.0
STEPS = ("building the bundle", "preparing the environment", "recording the revision", "starting it")
_OVERRIDES = ("scale", "batch", "resources", "timeout_s", "env", "secrets", "features", "labels", "triggers")
_ACCESS = ("rate_per_s", "burst", "cors_origins")
_LIMITS = ("queue_size", "queue_bytes", "body_bytes")
_STICKY = ("sticky_header", "sticky_cookie")
_OWN = ("traffic", "wait_s")
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]*")  # RFC 9110, section 5.6.2


@dataclass(frozen=True)
class Deployment:
    """One deploy, checked: what the user asked for besides the function itself.

    `traffic` is the percentage of requests that goes to the new revision, the rest staying as it is. `options` is the
    part of the endpoint's `desired` document on access, limits and stickiness.
    """

    name: str
    target: str
    spec: FunctionSpec
    init: Mapping[str, Any] = field(default_factory=dict)
    traffic: int = 100
    wait_s: float = DEFAULT_WAIT_S
    options: Mapping[str, Any] = field(default_factory=dict)


def read_options(function: Function[Any, Any], name: str | None, target: str, given: Mapping[str, Any]) -> Deployment:
    """The deployment that `given` (keyword arguments of deploy) describes. Raises SpecError."""
    init_names = _constructor(function.target)
    init = {key: value for key, value in given.items() if key in init_names}
    rest = {key: value for key, value in given.items() if key not in init_names and value is not None}
    known = (*_OVERRIDES, *_ACCESS, *_LIMITS, *_STICKY, *_OWN)
    for key in rest:
        if key not in known:
            takes = f"its constructor takes {', '.join(init_names) or 'nothing'}"
            what = takes if inspect.isclass(function.target) else "a function has nothing to bind"
            near = did_you_mean(key, [*init_names, *known])
            raise SpecError(
                f"deploy of {function.spec.name!r} got an unknown option {key!r}{near}; {what}; options: "
                f"{', '.join(known)}"
            )
    required = [key for key, default in init_names.items() if default is inspect.Parameter.empty]
    if missing := [key for key in required if key not in init]:
        example = ", ".join(f"{key}=..." for key in missing)
        raise SpecError(f"the constructor of {function.spec.name!r} needs {missing[0]!r}: deploy({example})")
    _check_init(function, init_names, init)
    if not name and function.spec.name == "lambda" and getattr(function.target, "__name__", "") == "<lambda>":
        raise SpecError("a lambda has no name that an endpoint could have: deploy(name='...'), or give it by def")
    changes = {key: rest[key] for key in _OVERRIDES if key in rest}
    if function.with_options(**changes).spec.triggers and target not in ("process", "docker"):
        raise SpecError(f"triggers are run by a home's supervisor, not on target {target!r}: leave them out there")
    wait_s = rest.get("wait_s", DEFAULT_WAIT_S)
    if isinstance(wait_s, bool) or not isinstance(wait_s, int | float) or not wait_s >= 0:
        raise SpecError(f"wait_s must be seconds of 0 or more, not {wait_s!r}")
    share = rest.get("traffic", 100)
    if not isinstance(share, int) or isinstance(share, bool) or not 0 <= share <= 100:
        raise SpecError(f"traffic is the new revision's percentage, a whole number from 0 to 100, not {share!r}")
    return Deployment(
        name=check_name("endpoint", name or function.spec.name),
        target=target,
        spec=function.with_options(**changes).spec if changes else function.spec,
        init=init,
        traffic=share,
        wait_s=float(wait_s),
        options=_endpoint_options(rest),
    )


def add_revision(
    function: Function[Any, Any], deployment: Deployment, settings: Settings, report: Callable[[str], None]
) -> tuple[EndpointRow, Revision, str]:
    """The endpoint's row with a rollout to its new revision under way, that revision, and the rollout's id.

    Everything that can fail by the user's code happens before the first row is written.
    """
    from mlfuncs.registry import open_registry, site_id

    registry = open_registry(settings)
    check_free(registry, deployment.name, site_id(settings))
    if deployment.target == "process":
        from mlfuncs.secrets import resolve_secrets

        resolve_secrets(deployment.spec.secrets, settings)
    config, digest = _pack(function, deployment, settings, registry, report)
    report(STEPS[2])
    revision = registry.endpoints.add_revision(
        deployment.name, digest, config.to_dict(), target=deployment.target, site=site_id(settings)
    )
    rollout = uuid.uuid4().hex

    def change(desired: dict[str, Any], row: EndpointRow) -> dict[str, Any]:
        traffic = shift_traffic(desired.get("traffic") or {}, revision.revision, deployment.traffic)
        traffic = check_traffic(traffic, [r.revision for r in row.revisions], row.name)
        options = {**(desired.get("options") or {})}
        for part, values in deployment.options.items():
            options[part] = {**options.get(part, {}), **values} if isinstance(values, dict) else values
        check_endpoint_options(options)  # also what an older release let through
        return start_rollout({**desired, "options": options}, rollout, traffic)

    return registry.endpoints.update(deployment.name, change), revision, rollout


def shift_traffic(traffic: Mapping[str, int], revision: str, percent: int) -> dict[str, int]:
    """`traffic` with `percent` of the whole for `revision`, the others keeping their proportions.

    >>> shift_traffic({"rev-1": 100}, "rev-2", 10)
    {'rev-1': 90, 'rev-2': 10}
    """
    others = {name: share for name, share in traffic.items() if name != revision}
    if percent == 100 or not others:
        return {revision: 100}
    whole = sum(others.values())
    shares = {name: round(share * (100 - percent) / whole) for name, share in others.items()}
    first = next(iter(shares))
    shares[first] += 100 - percent - sum(shares.values())  # what rounding lost
    return {**shares, revision: percent}


def check_free(registry: Registry, name: str, site: str) -> None:
    """Raise Conflict when another project has an endpoint of that name in the same home: they share one router."""
    for row in registry.endpoints.changes(0, site):
        if row.name == name and row.project != registry.project and not row.deleted:
            raise Conflict(
                f"endpoint {name!r} of this home belongs to project {row.project!r}, not {registry.project!r}: deploy "
                "under another name, or set MLFUNCS_HOME to a home of this project's own"
            )


def _pack(
    function: Function[Any, Any],
    deployment: Deployment,
    settings: Settings,
    registry: Registry,
    report: Callable[[str], None],
) -> tuple[RevisionConfig, str]:
    from mlfuncs.artifacts import ArtifactStore
    from mlfuncs.bundles.bundle import build_bundle, open_bundle
    from mlfuncs.bundles.imports import missing_imports

    signature = function.signature
    report(STEPS[0])
    bundle = build_bundle(function.target, function.spec, settings)
    opened, python = open_bundle(bundle.digest, settings), None
    if deployment.target == "process":
        report(STEPS[1])
        python = opened.python()
    for module, wanted in missing_imports(opened, python).items():
        warnings.warn(
            f"function {function.spec.name!r} imports {module!r}, which its environment does not have: a call that "
            f"comes to that import fails. Add what brings it: ml.function(requirements=[{wanted!r}, ...])",
            stacklevel=2,
        )
    refs: dict[str, Mapping[str, Any]] = {}
    if deployment.init:
        report("storing the constructor's values")
        store = ArtifactStore.open(settings)
        for key, value in deployment.init.items():
            ref = getattr(value, "ref", None) or store.put(value)
            registry.artifacts.record(ref.to_dict())
            refs[key] = ref.to_dict()
    registry.functions.record(function.spec.name, bundle.digest, bundle.manifest.to_dict())
    config = RevisionConfig(
        spec=deployment.spec,
        kind=bundle.manifest.kind,
        init_args=refs,
        parameters=tuple(parameter.name for parameter in signature.parameters),
        doc=signature.doc,
    )
    return config, bundle.digest


def _constructor(target: Any) -> dict[str, Any]:
    """The constructor's parameters with their defaults; none for what is not a class."""
    if not inspect.isclass(target) or target.__init__ is object.__init__:
        return {}
    parameters = list(inspect.signature(target.__init__).parameters.values())[1:]
    plain = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return {parameter.name: parameter.default for parameter in plain}


def _check_init(function: Function[Any, Any], defaults: Mapping[str, Any], init: Mapping[str, Any]) -> None:
    """Raise InvalidInput for a value that the constructor's type hints refuse; artifacts are not loaded for it."""
    from mlfuncs.interface.hints import known_hints

    hints = known_hints(function.target.__init__) if init else {}
    typed = {
        name: value
        for name, value in init.items()
        if not hasattr(value, "digest") and not isinstance(hints.get(name, ""), str)
    }
    if not typed:
        return
    from mlfuncs.interface.signature import Parameter
    from mlfuncs.interface.validation import Checker

    parameters = [Parameter(name, hints[name], defaults[name], "keyword") for name in typed]
    Checker(f"{function.spec.name}'s constructor", parameters).check(typed)


def _endpoint_options(given: Mapping[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {key: given[key] for key in _STICKY if key in given}
    if access := {key: given[key] for key in _ACCESS if key in given}:
        options["access"] = access
    if limits := {key: given[key] for key in _LIMITS if key in given}:
        options["limits"] = limits
    check_endpoint_options(options)
    return options


def check_endpoint_options(options: Mapping[str, Any]) -> None:
    """Check the part of an endpoint's `desired` document on access, limits and stickiness. Raises SpecError."""
    access, limits = options.get("access") or {}, options.get("limits") or {}
    rate = access.get("rate_per_s", 0)
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not (rate >= 0 and math.isfinite(rate)):
        raise SpecError(f"rate_per_s must be a number of requests a second, or 0 for no limit, not {rate!r}")
    counts = {**limits, **{key: access[key] for key in ("burst",) if key in access}}
    for key, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise SpecError(f"{key} must be a whole number of 0 or more, not {value!r}")
    origins = access.get("cors_origins", ())
    if not isinstance(origins, list | tuple) or not all(isinstance(origin, str) for origin in origins):
        raise SpecError(f"cors_origins must be a list of origins like 'https://app.example', not {origins!r}")
    for key in _STICKY:
        if not isinstance(name := options.get(key, ""), str) or not _TOKEN.fullmatch(name):
            raise SpecError(f"{key} must be the name of a header or cookie, not {name!r}")


def with_scale(spec: FunctionSpec, **bounds: Any) -> FunctionSpec:
    """`spec` with some of its scale replaced, e.g. with_scale(spec, min=1, max=3)."""
    given = {key: value for key, value in bounds.items() if value is not None}
    if "min" in given and given["min"] > given.get("max", spec.scale.max):
        given["max"] = given["min"]
    if "max" in given:
        given["initial"] = min(spec.scale.initial, given["max"])
        if "min" not in given:
            given["min"] = min(spec.scale.min, given["max"])
    return dataclasses.replace(spec, scale=dataclasses.replace(spec.scale, **given)) if given else spec
