"""A software bill of materials from a lock, as CycloneDX 1.5 JSON (https://cyclonedx.org/docs/1.5/json/)."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

_NAMESPACE = uuid.UUID("6ba7b811-9dad-11d1-80b4-00c04fd430c8")  # RFC 4122's for URLs


def cyclonedx(name: str, digest: str, lock: Sequence[str]) -> dict[str, Any]:
    """The bill of a function: its bundle as the subject, each pin of its lock as a library with its hashes.

    The serial number comes from the bundle's digest and nothing has a time, so the same input gives the same bill.
    """
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, f'mlfuncs:bundle:{digest}')}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": f"bundle:{digest}",
                "name": name,
                "version": digest[:12],
                "hashes": [{"alg": "SHA-256", "content": digest}],
            }
        },
        "components": [_component(line) for line in sorted(lock)],
    }


def to_bytes(bill: dict[str, Any]) -> bytes:
    """The bill as stored: sorted keys, one space of indent."""
    return json.dumps(bill, sort_keys=True, indent=1).encode() + b"\n"


def _component(line: str) -> dict[str, Any]:
    text, *hashes = line.split(" --hash=")
    try:
        requirement = Requirement(text.partition(";")[0])
    except InvalidRequirement:
        return {"type": "library", "name": text.strip(), "bom-ref": text.strip()}
    name = canonicalize_name(requirement.name)
    version = next((spec.version for spec in requirement.specifier if spec.operator in ("==", "===")), "")
    purl = f"pkg:pypi/{name}@{version}" if version else f"pkg:pypi/{name}"
    made: dict[str, Any] = {"type": "library", "bom-ref": purl, "name": requirement.name, "purl": purl}
    if version:
        made["version"] = version
    if requirement.url:
        made["externalReferences"] = [{"type": "vcs", "url": _without_user(requirement.url)}]
    if sums := [value.removeprefix("sha256:").strip() for value in hashes if value.startswith("sha256:")]:
        made["hashes"] = [{"alg": "SHA-256", "content": value} for value in sums]
    return made


def _without_user(url: str) -> str:
    """`url` without a user name and password."""
    scheme, separator, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}" if separator else url
