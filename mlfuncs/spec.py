"""What a user declares about a function, as frozen values that are right once they exist."""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mlfuncs.errors import SpecError
from mlfuncs.triggers import Trigger, check_triggers, trigger_from_dict, trigger_to_dict

_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(Ki|Mi|Gi|Ti|k|M|G|T|)")
_FACTORS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,51}[a-z0-9])?")
_KINDS: dict[str, tuple[type, str]] = {
    "int": (numbers.Integral, "a whole number"),
    "float": (numbers.Real, "a number"),
    "str": (str, "text"),
}
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def check_name(kind: str, name: str) -> str:
    """`name`, when it can be a host name, a path segment and a Kubernetes name at once. Raises SpecError.

    >>> check_name("endpoint", "churn-model")
    'churn-model'
    """
    if not _NAME.fullmatch(name):
        raise SpecError(
            f"{kind} name {name!r} is not valid: use 1 to 53 of a-z, 0-9 and '-', starting and ending with a letter "
            "or digit"
        )
    return name


def slugify(name: str) -> str:
    """`name` as a valid endpoint name: lower case, runs of other characters become one '-'.

    >>> slugify("Predict_Churn")
    'predict-churn'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:53].strip("-") or "function"


def parse_memory(quantity: str) -> int:
    """Bytes in a Kubernetes memory quantity. Raises SpecError.

    >>> parse_memory("1.5Gi")
    1610612736
    """
    match = _QUANTITY.fullmatch(quantity.strip())
    if not match:
        raise SpecError(f"memory {quantity!r} is not a quantity: write it like '512Mi' or '2Gi'")
    return int(float(match[1]) * _FACTORS[match[2]])


@dataclass(frozen=True)
class Resources:
    """What one replica may use: cores, memory as a Kubernetes quantity, and GPUs."""

    cpu: float | None = None
    memory: str | None = None
    gpu: int = 0
    gpu_type: str = "nvidia.com/gpu"

    def __post_init__(self) -> None:
        _require(not isinstance(self.cpu, str), f"cpu is a number of cores like 0.5, not {self.cpu!r}")
        _check_kinds(self, "")
        _require(self.cpu is None or self.cpu > 0, f"cpu must be above 0 cores, not {self.cpu!r}")
        _require(self.gpu >= 0, f"gpu must be 0 or more, not {self.gpu!r}")
        if self.memory is not None and parse_memory(self.memory) < 2**20:
            raise SpecError(f"memory {self.memory!r} is less than a mebibyte: write it like '512Mi' or '2Gi'")

    @property
    def memory_bytes(self) -> int | None:
        """The memory limit in bytes, or None for no limit."""
        return None if self.memory is None else parse_memory(self.memory)


@dataclass(frozen=True)
class Scale:
    """How many replicas serve: between `min` and `max`, each given `concurrency` requests at once.

    `concurrency` 0 is no limit per replica. `target` is the wished load per replica that the autoscaler aims at
    (default: `concurrency`, else Knative's 100; requests per second: 200). `window_s` and `scale_down_delay_s` are
    Knative's stable window and scale-down-delay. `buffer` is the number of parked spare workers, `initial` the
    replicas a new revision starts with.
    """

    min: int = 0
    max: int = 4
    concurrency: int = 0
    target: float | None = None
    metric: Literal["concurrency", "rps"] = "concurrency"
    window_s: float = 60.0
    scale_down_delay_s: float = 0.0
    grace_s: float = 30.0
    buffer: int = 0
    initial: int = 1

    def __post_init__(self) -> None:
        _check_kinds(self, "scale.")
        _require(self.min >= 0, f"scale.min must be 0 or more, not {self.min!r}")
        _require(self.max >= 1, f"scale.max must be 1 or more, not {self.max!r}")
        _require(self.min <= self.max, f"scale.min ({self.min}) is above scale.max ({self.max})")
        _require(self.concurrency >= 0, f"scale.concurrency must be 0 or more, not {self.concurrency!r}")
        _require(self.target is None or self.target > 0, f"scale.target must be above 0, not {self.target!r}")
        _require(self.metric in ("concurrency", "rps"), f"scale.metric is 'concurrency' or 'rps', not {self.metric!r}")
        _require(self.window_s >= 1, f"scale.window_s must be at least 1 s, not {self.window_s!r}")
        _require(
            self.scale_down_delay_s >= 0, f"scale.scale_down_delay_s must be >= 0, not {self.scale_down_delay_s!r}"
        )
        _require(self.grace_s >= 0, f"scale.grace_s must be 0 or more, not {self.grace_s!r}")
        _require(self.buffer >= 0, f"scale.buffer must be 0 or more, not {self.buffer!r}")
        _require(0 <= self.initial <= self.max, f"scale.initial must be between 0 and scale.max, not {self.initial!r}")


@dataclass(frozen=True)
class Batch:
    """Batched calls: up to `max_size` rows a call; wait at most `max_wait_ms` for more (0: take what queued)."""

    max_size: int = 64
    max_wait_ms: float = 0.0

    def __post_init__(self) -> None:
        _check_kinds(self, "batch.")
        _require(self.max_size >= 1, f"batch.max_size must be 1 or more, not {self.max_size!r}")
        _require(self.max_wait_ms >= 0, f"batch.max_wait_ms must be 0 or more, not {self.max_wait_ms!r}")


@dataclass(frozen=True)
class Pod:
    """Where and how a cluster places the replicas; the laptop ignores it. The values are Kubernetes' own.

    `volumes` maps a mount path to a volume source, e.g. {"/models": {"persistentVolumeClaim": {"claimName": "m"}}}.
    """

    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, Any], ...] = ()
    volumes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    image_pull_secrets: tuple[str, ...] = ()
    priority_class: str = ""
    runtime_class: str = ""

    def __post_init__(self) -> None:
        _check_kinds(self, "pod.")
        for key, example in (
            ("tolerations", "[{'key': 'gpu', 'operator': 'Exists'}]"),
            ("image_pull_secrets", "['s']"),
        ):
            _require(not isinstance(getattr(self, key), str), f"pod.{key} is a list, like {example}, not one string")
            object.__setattr__(self, key, tuple(getattr(self, key)))
        for path, source in self.volumes.items():
            _require(path.startswith("/"), f"pod.volumes: mount path {path!r} must be absolute, like '/models'")
            one_kind = isinstance(source, Mapping) and len(source) == 1
            _require(one_kind, f"pod.volumes[{path!r}] must be one volume source, like {{'emptyDir': {{}}}}")


_PARTS: tuple[tuple[str, type, str], ...] = (
    ("resources", Resources, "ml.Resources(cpu=1, memory='1Gi')"),
    ("scale", Scale, "ml.Scale(min=0, max=4)"),
    ("batch", Batch, "ml.Batch(max_size=64)"),
    ("pod", Pod, "ml.Pod(node_selector={'pool': 'gpu'})"),
)


@dataclass(frozen=True)
class FunctionSpec:
    """Everything declared about a function besides its code."""

    name: str
    requirements: tuple[str, ...] | None = None  # PEP 508; None: inferred from the imports
    resources: Resources = field(default_factory=Resources)
    scale: Scale = field(default_factory=Scale)
    batch: Batch | None = None
    timeout_s: float = 60.0
    retries: int = 0
    env: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    features: tuple[str, ...] = ()  # online features the handler receives; the caller sends entity keys
    feature_sample_rate: float = 0.0  # share of served vectors kept for the skew check, 0 to 1
    labels: Mapping[str, str] = field(default_factory=dict)
    pod: Pod = field(default_factory=Pod)
    triggers: tuple[Trigger, ...] = ()  # what calls the endpoint besides HTTP
    base_image: str = ""  # what its image stands on; empty: chosen by the resources

    def __post_init__(self) -> None:
        _check_kinds(self, "")
        for key, kind, example in _PARTS:
            is_one = isinstance(getattr(self, key), kind) or (key == "batch" and self.batch is None)
            _require(is_one, f"{key} is an ml.{kind.__name__}, like {example}, not {getattr(self, key)!r}")
        check_name("function", self.name)
        self._own_collections()
        _require(
            self.timeout_s > 0 and math.isfinite(self.timeout_s),
            f"timeout_s must be above 0 seconds and finite, not {self.timeout_s!r}",
        )
        rate = self.feature_sample_rate
        _require(0 <= rate <= 1, f"feature_sample_rate is the share of served vectors to keep, 0 to 1, not {rate!r}")
        named = self.base_image
        _require(not re.search(r"\s", named), f"base_image {named!r} has a space: write it like 'registry/name:tag'")
        _require(self.retries >= 0, f"retries must be 0 or more, not {self.retries!r}")
        for key in self.env:
            _require(bool(_ENV_NAME.fullmatch(key)), f"env name {key!r} is not an environment variable name")
        for secret in self.secrets:
            _require(bool(_ENV_NAME.fullmatch(secret)), f"secret name {secret!r} must look like DB_PASSWORD")
            _require(secret not in self.env, f"{secret!r} is in both env and secrets; keep it in secrets")
        if self.requirements is not None:
            _check_requirements(self.requirements)

    def _own_collections(self) -> None:
        """Copies of what was given, as the declared types: a change to the caller's list or dict does not reach in."""
        for key in ("secrets", "features", "requirements"):
            given = getattr(self, key)
            if given is None and key == "requirements":
                continue
            _require(not isinstance(given, str), f"{key} is a list: write {key}=[{given!r}]")
            texts = tuple(given) if isinstance(given, Iterable) else (given,)
            _require(all(isinstance(text, str) for text in texts), f"{key} is a list of texts, not {given!r}")
            object.__setattr__(self, key, texts)
        object.__setattr__(self, "triggers", check_triggers(self.triggers))
        for key, example in (("env", "{'MODE': 'fast'}"), ("labels", "{'team': 'risk'}")):
            given = getattr(self, key)
            _require(isinstance(given, Mapping), f"{key} is a dict like {example}, not {given!r}")
            for name, value in given.items():
                _require(isinstance(name, str), f"{key} is a dict like {example}, and {name!r} is no name")
                words = f"must be text, not {type(value).__name__}: write {str(value)!r}"
                _require(isinstance(value, str), f"{key} {name!r} {words}")
            object.__setattr__(self, key, dict(given))

    def to_dict(self) -> dict[str, Any]:
        """The spec as JSON-ready values; `from_dict` gives an equal spec back.

        Without triggers, a sample rate or a base image there is no such key: the digests of functions that have none
        do not depend on them.
        """
        values = dataclasses.asdict(dataclasses.replace(self, triggers=()))
        del values["triggers"]
        for key in ("feature_sample_rate", "base_image"):
            if not values[key]:
                del values[key]
        if self.triggers:
            values["triggers"] = [trigger_to_dict(trigger) for trigger in self.triggers]
        return values | {
            "requirements": None if self.requirements is None else list(self.requirements),
            "env": dict(self.env),
            "secrets": list(self.secrets),
            "features": list(self.features),
            "labels": dict(self.labels),
            "pod": dataclasses.asdict(self.pod)
            | {
                "tolerations": [dict(toleration) for toleration in self.pod.tolerations],
                "image_pull_secrets": list(self.pod.image_pull_secrets),
            },
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FunctionSpec:
        """The spec that `to_dict` wrote."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = set(values) - known
        _require(not unknown, f"function spec has unknown keys: {', '.join(sorted(unknown))}")
        requirements = values.get("requirements")
        return cls(
            **{
                **values,
                "requirements": None if requirements is None else tuple(requirements),
                "resources": Resources(**values.get("resources") or {}),
                "scale": Scale(**values.get("scale") or {}),
                "batch": None if values.get("batch") is None else Batch(**values["batch"]),
                "secrets": tuple(values.get("secrets") or ()),
                "features": tuple(values.get("features") or ()),
                "env": dict(values.get("env") or {}),
                "labels": dict(values.get("labels") or {}),
                "pod": Pod(**values.get("pod") or {}),
                "triggers": tuple(trigger_from_dict(trigger) for trigger in values.get("triggers") or ()),
            }
        )


def _check_kinds(spec: Any, prefix: str) -> None:
    """Raise SpecError for a number or text of another type: a comparison with it would fail with less to say."""
    for field_ in dataclasses.fields(spec):
        kind, _, optional = str(field_.type).partition(" | ")
        value = getattr(spec, field_.name)
        if kind in _KINDS and not (value is None and optional):
            wanted, words = _KINDS[kind]
            is_one = isinstance(value, wanted) and not isinstance(value, bool)
            _require(is_one, f"{prefix}{field_.name} must be {words}, not {value!r}")


def _check_requirements(requirements: tuple[str, ...]) -> None:
    from packaging.requirements import InvalidRequirement, Requirement

    for line in requirements:
        try:
            Requirement(line)
        except InvalidRequirement as exc:
            reason = str(exc).splitlines()[0]
            raise SpecError(
                f"requirement {line!r} is not PEP 508: {reason}; write it like 'scikit-learn>=1.5'"
            ) from exc


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise SpecError(message)
