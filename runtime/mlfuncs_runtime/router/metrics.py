"""Prometheus metrics of the router and, asked on demand, of every worker, as one exposition without double families."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from httptools import HttpParserError, HttpResponseParser

from mlfuncs_runtime import tracing
from mlfuncs_runtime.supervisor.places import read_json
from mlfuncs_runtime.triggers.metrics import HELP as TRIGGERS_HELP
from mlfuncs_runtime.triggers.metrics import add_triggers
from mlfuncs_runtime.worker.metrics import CONTENT_TYPE

if TYPE_CHECKING:
    from mlfuncs_runtime.router.core import Core
    from mlfuncs_runtime.router.meter import RequestCounts
    from mlfuncs_runtime.router.replica import ReplicaState

__all__ = ["CONTENT_TYPE", "gather", "merge"]

_SCRAPE_S = 1.0  # a worker that does not answer by then is left out
_SCRAPE_BYTES = 4 * 2**20
_SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)(?: \S+)?")
_SUFFIXES = ("_bucket", "_sum", "_count")


class Families:
    """Metric families in order of their first sample."""

    def __init__(self) -> None:
        self._heads: dict[str, tuple[str, str]] = {}
        self._samples: dict[str, list[str]] = {}

    def declare(self, name: str, kind: str, help_text: str) -> None:
        """Announce a family; the first word holds."""
        self._heads.setdefault(name, (kind, help_text))

    def add(self, family: str, sample: str) -> None:
        """Add one sample line to a declared family."""
        self._samples.setdefault(family, []).append(sample)

    def is_declared(self, name: str) -> bool:
        """Whether the family was announced."""
        return name in self._heads

    def render(self) -> bytes:
        """The exposition; families without samples are left out."""
        out = []
        for name, samples in self._samples.items():
            kind, help_text = self._heads[name]
            out += [f"# HELP {name} {help_text}", f"# TYPE {name} {kind}", *samples]
        return ("\n".join(out) + "\n").encode()


def merge(families: Families, text: str, labels: Mapping[str, str]) -> None:
    """Take a worker's exposition into `families`; `labels` are added where a sample lacks them.

    >>> families = Families()
    >>> merge(families, "# HELP up Up.\\n# TYPE up gauge\\nup 1", {"replica": "r1"})
    >>> families.render().splitlines()[-1]
    b'up{replica="r1"} 1'
    """
    help_texts: dict[str, str] = {}
    for line in text.splitlines():
        word, _, rest = line.partition(" ")
        if word == "#":
            what, _, rest = rest.partition(" ")
            name, _, value = rest.partition(" ")
            if what == "HELP":
                help_texts[name] = value
            elif what == "TYPE":
                families.declare(name, value, help_texts.get(name, "No help was given."))
            continue
        match = _SAMPLE.fullmatch(line)
        if match is None:
            continue
        name, own, value = match[1], match[2] or "", match[3]
        family = name
        for suffix in _SUFFIXES:
            if not families.is_declared(family) and name.endswith(suffix):
                family = name.removesuffix(suffix)
        if not families.is_declared(family):
            families.declare(family, "untyped", "No help was given.")
        added = [f'{key}="{_escape(text)}"' for key, text in labels.items() if f'{key}="' not in own]
        all_labels = ",".join([own.rstrip(","), *added] if own else added)
        families.add(family, f"{name}{{{all_labels}}} {value}")


async def gather(core: Core) -> bytes:
    """All metrics now: the router's own, then those of every worker that answers in time."""
    replicas = [replica for endpoint in core.endpoints.values() for replica in endpoint.replicas.values()]
    texts = await asyncio.gather(*(_scrape(replica) for replica in replicas))
    families = Families()
    _add_router(core, families)
    for replica, text in zip(replicas, texts, strict=True):
        if text is not None:
            merge(families, text, {**_labels_of(core, replica), "replica": replica.replica.id})
    return families.render()


def _labels_of(core: Core, replica: ReplicaState) -> dict[str, str]:
    names = [name for name, endpoint in core.endpoints.items() if replica.replica.id in endpoint.replicas]
    return {"endpoint": names[0] if names else "", "revision": replica.replica.revision}


async def _scrape(replica: ReplicaState) -> str | None:
    try:
        async with asyncio.timeout(_SCRAPE_S):
            reader, writer = await asyncio.open_unix_connection(replica.replica.socket, limit=_SCRAPE_BYTES)
            try:
                writer.write(b"GET /-/metrics HTTP/1.1\r\nHost: worker\r\nConnection: close\r\n\r\n")
                return await _read_body(reader)
            finally:
                writer.close()
    except (OSError, TimeoutError, HttpParserError):
        return None


async def _read_body(reader: asyncio.StreamReader) -> str | None:
    answer, size = _Answer(), 0
    parser = HttpResponseParser(answer)
    while not answer.is_whole and size < _SCRAPE_BYTES:
        data = await reader.read(65_536)
        if not data:
            break
        size += len(data)
        parser.feed_data(data)
    if not answer.is_whole or parser.get_status_code() != 200:
        return None
    return b"".join(answer.pieces).decode("utf-8", "replace")


class _Answer:
    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.is_whole = False

    def on_message_complete(self) -> None:
        self.is_whole = True

    def on_body(self, piece: bytes) -> None:
        self.pieces.append(piece)


def _add_router(core: Core, families: Families) -> None:
    add = _Adder(families)
    counts: dict[tuple[str, str], RequestCounts] = dict(core.retired)
    for name, endpoint in core.endpoints.items():
        counts |= {(name, revision.name): revision.counts for revision in endpoint.revisions.values()}
    for (name, revision), count in sorted(counts.items()):
        labels = {"endpoint": name, "revision": revision}
        for status, number in sorted(count.by_status.items()):
            add("mlfuncs_requests_total", {**labels, "code": str(status or 499)}, number)
        family = "mlfuncs_request_duration_seconds"
        add.declare(family)
        for line in count.durations.lines(family, _render(labels)):
            families.add(family, line)
    for name, endpoint in sorted(core.endpoints.items()):
        labels = {"endpoint": name}
        add("mlfuncs_queue_requests", labels, endpoint.queued)
        add("mlfuncs_queue_bytes", labels, endpoint.queued_bytes)
        add("mlfuncs_request_retries_total", labels, endpoint.retried)
        for reason, number in sorted(endpoint.rejected.items()):
            add("mlfuncs_requests_rejected_total", {**labels, "reason": reason}, number)
        add("mlfuncs_mirrored_requests_total", labels, endpoint.mirror.sent)
        add("mlfuncs_mirrored_requests_dropped_total", labels, endpoint.mirror.dropped)
        for state in endpoint.revisions.values():
            of_revision = {**labels, "revision": state.name}
            add("mlfuncs_replicas", of_revision, len(state.replicas))
            add("mlfuncs_concurrent_requests", of_revision, state.meter.active)
    for status, number in sorted(core.refused.items()):
        add("mlfuncs_requests_refused_total", {"code": str(status)}, number)
    if core.options.triggers is not None:
        add_triggers(add, read_json(core.options.triggers) or {})
    add("mlfuncs_router_connections", {}, len(core.clients))
    if core.spans is not None:
        add("mlfuncs_spans_exported_total", {}, core.spans.export.exported)
        add("mlfuncs_spans_dropped_total", {}, core.spans.export.dropped)
    add("mlfuncs_router_cpu_seconds_total", {}, round(time.process_time(), 6))


_HELP = {
    **TRIGGERS_HELP,
    "mlfuncs_requests_total": ("counter", "Requests by HTTP status; 499 is a caller that went away."),
    "mlfuncs_request_duration_seconds": ("histogram", "Time from a request's arrival to the end of its answer."),
    "mlfuncs_queue_requests": ("gauge", "Requests that wait for a replica."),
    "mlfuncs_queue_bytes": ("gauge", "Bytes of request bodies that wait for a replica."),
    "mlfuncs_request_retries_total": ("counter", "Requests sent anew after a connection that never read them."),
    "mlfuncs_requests_rejected_total": ("counter", "Requests turned away by a limit of their endpoint."),
    "mlfuncs_mirrored_requests_total": ("counter", "Requests copied to a mirror."),
    "mlfuncs_mirrored_requests_dropped_total": ("counter", "Copies that were not made for want of room."),
    "mlfuncs_replicas": ("gauge", "Workers that take requests."),
    "mlfuncs_concurrent_requests": ("gauge", "Requests that wait or are being answered."),
    "mlfuncs_requests_refused_total": ("counter", "Requests that no endpoint took, by HTTP status."),
    "mlfuncs_router_connections": ("gauge", "Client connections."),
    "mlfuncs_spans_exported_total": ("counter", tracing.HELP["exported"]),
    "mlfuncs_spans_dropped_total": ("counter", tracing.HELP["dropped"]),
    "mlfuncs_router_cpu_seconds_total": ("counter", "CPU time of the router's process."),
}


class _Adder:
    """Adds samples of the router's own families, declared on first use."""

    def __init__(self, families: Families) -> None:
        self._families = families

    def declare(self, name: str) -> None:
        self._families.declare(name, *_HELP[name])

    def __call__(self, name: str, labels: Mapping[str, str], value: float) -> None:
        self.declare(name)
        rendered = _render(labels)
        self._families.add(name, f"{name}{{{rendered}}} {value}" if rendered else f"{name} {value}")


def _render(labels: Mapping[str, str]) -> str:
    return ",".join(f'{key}="{_escape(value)}"' for key, value in labels.items())


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
