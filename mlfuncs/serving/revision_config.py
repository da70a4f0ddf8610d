"""What a revision is besides its bundle: the options it runs under and the values bound to it. Never changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlfuncs.spec import FunctionSpec


@dataclass(frozen=True)
class RevisionConfig:
    """The document that the registry keeps with a revision and that every target reads.

    `spec` is the function's own with what the deploy overrode. `init_args` maps a constructor argument to its
    artifact reference as a dict. `parameters` are the names that positional arguments of `invoke` bind to.
    """

    spec: FunctionSpec
    kind: str = "function"  # "function", "class" or "nuclio"
    init_args: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    doc: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; `from_dict` gives an equal config back."""
        return {
            "spec": self.spec.to_dict(),
            "kind": self.kind,
            "init_args": {name: dict(ref) for name, ref in self.init_args.items()},
            "parameters": list(self.parameters),
            "doc": self.doc,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RevisionConfig:
        """The config that `to_dict` wrote."""
        return cls(
            spec=FunctionSpec.from_dict(values["spec"]),
            kind=values.get("kind", "function"),
            init_args=dict(values.get("init_args") or {}),
            parameters=tuple(values.get("parameters") or ()),
            doc=values.get("doc", ""),
        )
