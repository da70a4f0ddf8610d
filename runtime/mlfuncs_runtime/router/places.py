"""Where a request target leads: to the platform, to an endpoint, or to one of its revisions by a tag."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from mlfuncs.errors import NotFound
from mlfuncs_runtime.router.http import decode_unreserved

if TYPE_CHECKING:
    from mlfuncs_runtime.router.endpoint import Endpoint

_PLACES = 4096  # request targets whose place is remembered


class Place(NamedTuple):
    """Where a request target leads: `endpoint` None is the platform itself."""

    endpoint: Endpoint | None
    revision: str  # of a tag; empty: by the traffic's shares
    path: bytes


class Places:
    """Finds the places among `endpoints`, by name, and remembers them until it is told to forget."""

    def __init__(self, endpoints: Mapping[str, Endpoint]) -> None:
        self._endpoints = endpoints
        self._known: dict[bytes, Place] = {}

    def forget(self) -> None:
        """The endpoints or their tags are others now."""
        self._known.clear()

    def find(self, target: bytes) -> Place:
        """Where a target leads. Raises NotFound."""
        place = self._known.get(target)
        if place is None:
            place = self._find(target)
            if len(self._known) >= _PLACES:
                self._known.clear()
            self._known[target] = place
        return place

    def _find(self, target: bytes) -> Place:
        path, mark, query = target.partition(b"?")
        name, _, rest = path[1:].partition(b"/")
        if name in (b"-", b"v2"):
            model, _, _ = rest.removeprefix(b"models/").partition(b"/")
            if name == b"-" or not rest.startswith(b"models/") or not model:
                return Place(None, "", path)
            return self._endpoint(model, target)
        return self._endpoint(name, b"/" + rest + mark + query)

    def _endpoint(self, segment: bytes, path: bytes) -> Place:
        name = decode_unreserved(segment).decode("latin-1")
        endpoint = self._endpoints.get(name)
        if endpoint is not None:
            return Place(endpoint, "", path)
        base, mark, tag = name.rpartition("--")
        tagged = self._endpoints.get(base) if mark else None
        if tagged is not None and tag in tagged.route.tags:
            return Place(tagged, tagged.route.tags[tag], path)
        if tagged is not None:
            raise NotFound("tag of endpoint " + base, tag, tagged.route.tags)
        raise NotFound("endpoint", name[:100], self._endpoints)
