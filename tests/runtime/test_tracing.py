"""Spans against a collector that reads the real protobuf: their tree, what becomes of them when it is away, and off."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import mlfuncs as ml
from mlfuncs.errors import MissingExtra, SpecError
from mlfuncs.serving.request_context import watch_calls
from mlfuncs.settings import read_settings
from mlfuncs_runtime.process_target import ProcessTarget
from mlfuncs_runtime.router.core import RouterOptions
from mlfuncs_runtime.router.spans import RouterSpans
from mlfuncs_runtime.supervisor.places import find_places, make_places, write_json
from mlfuncs_runtime.supervisor.triggers import table_path
from mlfuncs_runtime.tracing import QUEUE_SPANS, Span, SpanExport, new_traceparent, open_export, read_traceparent
from mlfuncs_runtime.triggers.cron import Memory
from mlfuncs_runtime.triggers.process import TriggerProcess
from mlfuncs_runtime.triggers.table import Entry
from tests.runtime.router_harness import Harness, with_router

pytest.importorskip("opentelemetry.sdk")
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

TRACE = "0af7651916cd43dd8448eb211c80319c"
GIVEN = f"00-{TRACE}-b7ad6b7169203331-01"
SERVER, CLIENT, CONSUMER, INTERNAL = 2, 3, 5, 1  # SpanKind in OTLP


def wait_until(holds: Callable[[], Any], what: str, timeout_s: float = 60) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := holds()):
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.02)
    return found


class Collector:
    """An OTLP/HTTP receiver; `spans` are dicts of what came, their resource's attributes included."""

    def __init__(self) -> None:
        self.spans: list[dict[str, Any]] = []
        self.paths: set[str] = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.headers["Content-Type"] == "application/x-protobuf"
                outer.take(self.path, ExportTraceServiceRequest.FromString(body))
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def take(self, path: str, request: Any) -> None:
        self.paths.add(path)
        for group in request.resource_spans:
            resource = {item.key: item.value.string_value for item in group.resource.attributes}
            for scope in group.scope_spans:
                for span in scope.spans:
                    values = {item.key: item.value.string_value or item.value.int_value for item in span.attributes}
                    self.spans.append(
                        {
                            "name": span.name,
                            "kind": span.kind,
                            "trace": span.trace_id.hex(),
                            "id": span.span_id.hex(),
                            "parent": span.parent_span_id.hex(),
                            "start": span.start_time_unix_nano,
                            "end": span.end_time_unix_nano,
                            "failed": span.status.code == 2,
                            "attributes": values,
                            "resource": resource,
                        }
                    )


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    found = Collector()
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture
def live(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MLFUNCS_PORT", "0")
    yield home
    ProcessTarget(read_settings()).stop()


def post(url: str, values: Any, **headers: str) -> tuple[int, Any]:
    named = {"Content-Type": "application/json", **headers}
    request = urllib.request.Request(url, json.dumps(values).encode(), named)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as exc:
        return exc.code, json.load(exc)


def only(spans: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    found = [span for span in spans if all(span[key] == value for key, value in wanted.items())]
    assert len(found) == 1, (wanted, [(s["name"], s["kind"], s["resource"]["service.name"]) for s in spans])
    return found[0]


def test_a_chain_of_endpoints_is_one_tree_of_spans(
    live: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFUNCS_OTEL_ENDPOINT", collector.url)

    @ml.function
    def inner(x: int) -> int:
        if x < 0:
            raise ValueError("negative")
        return x * 2

    @ml.function
    def outer(x: int) -> int:
        from opentelemetry import trace

        with trace.get_tracer("mine").start_as_current_span("think"):
            pass
        return int(ml.endpoint("inner").invoke(x=x)) + 1

    inner.deploy()
    place = outer.deploy()
    assert post(place.url, {"x": 20}, traceparent=GIVEN) == (200, 41)
    spans = wait_until(lambda: (s := [*collector.spans]) and len(s) == 6 and s, "six spans")
    assert collector.paths == {"/v1/traces"} and {span["trace"] for span in spans} == {TRACE}

    def of(service: str, **wanted: Any) -> dict[str, Any]:
        return only([span for span in spans if span["resource"]["service.name"] == service], **wanted)

    first = of("mlfuncs-router", name="POST /outer")
    worker = of("outer", kind=SERVER)
    call = of("outer", kind=CLIENT)
    own = of("outer", kind=INTERNAL)
    second = of("mlfuncs-router", name="POST /inner")
    last = of("inner", kind=SERVER)
    assert first["kind"] == second["kind"] == SERVER and own["name"] == "think"
    chain = [GIVEN.split("-")[2], first["id"], worker["id"], call["id"], second["id"]]
    assert [span["parent"] for span in (first, worker, call, second, last)] == chain
    assert own["parent"] == worker["id"]
    resource = worker["resource"]
    assert (resource["mlfuncs.project"], resource["mlfuncs.endpoint"], resource["mlfuncs.revision"]) == (
        "test",
        "outer",
        "rev-1",
    )
    assert resource["service.instance.id"] and first["resource"]["mlfuncs.project"] == "test"
    assert first["attributes"]["mlfuncs.endpoint"] == "outer" and first["attributes"]["mlfuncs.revision"] == "rev-1"
    assert first["attributes"]["http.response.status_code"] == 200 and not first["failed"]
    assert abs(first["start"] / 1e9 - time.time()) < 60  # a time of the wall's clock
    starts = [span["start"] / 1e6 for span in (first, worker, call, last)]
    assert all(earlier <= later + 5 for earlier, later in itertools.pairwise(starts))  # ms; wall clocks are slewed
    assert last["start"] <= call["end"] + 5e6 and call["end"] <= first["end"] + 5e6

    collector.spans.clear()
    assert post(place.url.replace("outer", "inner"), {"x": -1})[0] == 500  # a trace of the router's own making
    assert post(place.url.replace("outer", "nobody"), {})[0] == 404
    spans = wait_until(lambda: (s := [*collector.spans]) and len(s) == 3 and s, "three spans")
    failed = only(spans, name="POST /inner")
    assert failed["parent"] == "" and failed["failed"] and only(spans, parent=failed["id"])["failed"]
    assert only(spans, name="POST")["attributes"]["http.response.status_code"] == 404


def test_a_collector_that_is_away_costs_no_request_and_is_counted(
    live: Path, monkeypatch: pytest.MonkeyPatch, require: Callable[[str, object], None]
) -> None:
    require("promtool", shutil.which("promtool"))
    monkeypatch.setenv("MLFUNCS_OTEL_ENDPOINT", "http://127.0.0.1:9")
    place = ml.function(name="same")(lambda x: x).deploy(name="same")
    for number in range(20):
        assert place.invoke(x=number) == number
    base = place.url.rpartition("/")[0]

    def metrics() -> str:
        with urllib.request.urlopen(f"{base}/-/metrics", timeout=60) as answer:
            return str(answer.read().decode())

    def dropped(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.startswith("mlfuncs_spans_dropped_total")]

    def all_dropped() -> bool:
        return sorted(line.rsplit(" ", 1)[1] for line in dropped(metrics())) == ["20", "20"]

    wait_until(all_dropped, "the router's 20 spans and the worker's 20 to be counted")
    subprocess.run(["promtool", "check", "metrics"], input=metrics(), text=True, check=True, capture_output=True)
    log = find_places(read_settings()).logs / "router.log"
    assert log.read_text().count("does not take spans") == 1  # told once, not for every batch


class Gated(SpanExporter):
    """A collector that hangs until the gate opens."""

    def __init__(self) -> None:
        self.gate, self.busy = threading.Event(), threading.Event()
        self.taken = 0

    def export(self, spans: Any) -> SpanExportResult:
        self.busy.set()
        assert self.gate.wait(30)
        self.taken += len(spans)
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Nothing to end."""


def a_span(number: int) -> Span:
    return Span(f"s{number}", "SERVER", new_traceparent(None), "", 1.0, 2.0, {})


def test_a_hanging_collector_holds_up_nobody_and_what_overflows_is_dropped_and_counted() -> None:
    exporter = Gated()
    export = SpanExport(exporter, Resource.create({}))
    export.start()
    export.add(a_span(0))
    assert exporter.busy.wait(30)
    for number in range(QUEUE_SPANS + 100):  # returns at once although nobody takes any
        export.add(a_span(number))
    assert export.dropped == 100 and export.exported == 0
    exporter.gate.set()
    export.stop(30.0)
    assert export.exported == exporter.taken == QUEUE_SPANS + 1 and export.dropped == 100


def test_a_batch_that_cannot_be_sent_is_dropped_and_the_next_one_is_sent() -> None:
    class Picky(SpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            if spans[0].name == "s13":
                raise ValueError("no such thing")
            return SpanExportResult.SUCCESS

    export = SpanExport(Picky(), Resource.create({}))
    export.start()
    export.add(a_span(13))
    wait_until(lambda: export.dropped == 1, "the drop")
    export.add(a_span(14))
    wait_until(lambda: export.exported == 1, "the next span")
    export.stop(30.0)


class FailsOnce(BaseHTTPRequestHandler):
    """An endpoint that answers 500, and then 200."""

    statuses: list[int]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.statuses.pop(0))
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: Any) -> None:
        """Quiet."""


def test_the_tries_of_one_tick_are_consumer_spans_of_one_trace(
    home: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFUNCS_OTEL_ENDPOINT", collector.url)
    settings = read_settings()
    places, now = make_places(settings), datetime.now(UTC)
    far_month = (now.month + 5) % 12 + 1  # no other tick comes while this runs
    entry = Entry("test", "yearly", 30.0, ml.Cron(f"0 0 1 {far_month} *"))
    write_json(places.run / "cron.json", {entry.key: Memory(now - timedelta(days=400)).to_dict()})
    FailsOnce.statuses = [500, 200]
    server = ThreadingHTTPServer(("127.0.0.1", 0), FailsOnce)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    write_json(table_path(places), {"url": url, "entries": [entry.to_dict()]})
    stop = threading.Event()
    running = threading.Thread(target=TriggerProcess(settings, places).run, args=(stop,))
    running.start()
    try:
        spans = wait_until(lambda: (s := [*collector.spans]) and len(s) == 2 and s, "two spans")
    finally:
        stop.set()
        running.join(60)
        watch_calls(None)
        server.shutdown()
        server.server_close()
    assert FailsOnce.statuses == []
    assert {span["kind"] for span in spans} == {CONSUMER} and {span["parent"] for span in spans} == {""}
    assert len({span["trace"] for span in spans}) == 1 and len({span["id"] for span in spans}) == 2
    assert [span["failed"] for span in sorted(spans, key=lambda span: span["start"])] == [True, False]
    assert {span["attributes"]["url.full"] for span in spans} == {f"{url}/yearly"}
    assert spans[0]["resource"]["service.name"] == "mlfuncs-triggers"


def test_only_sampled_requests_leave_a_span_and_workers_hear_of_the_routers_own() -> None:
    memory = InMemorySpanExporter()
    export = SpanExport(memory, Resource.create({}))

    async def scenario(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker)
        assert (await harness.call("POST", "/predict?secret=1", b"{}", traceparent=GIVEN)).status == 200
        await harness.call("POST", "/predict", b"{}", traceparent=GIVEN[:-2] + "00")
        await harness.call("GET", "/-/healthz")
        traces = [read_traceparent(seen.header("traceparent")) for seen in worker.seen]
        assert [trace and (trace.trace_id, trace.sampled) for trace in traces] == [(TRACE, True), (TRACE, False)]
        harness.router.stop()
        (span,) = memory.get_finished_spans()
        assert span.context is not None and span.parent is not None and traces[0] is not None
        assert f"{span.context.span_id:016x}" == traces[0].span_id != "b7ad6b7169203331"
        assert span.attributes is not None and span.attributes["url.path"] == "/predict"  # a query may hold secrets

    with_router(scenario, RouterOptions(spans=RouterSpans(export)))


def test_nothing_of_opentelemetry_is_imported_while_it_is_off() -> None:
    code = (
        "import sys, mlfuncs_runtime.router.process, mlfuncs_runtime.worker.process, mlfuncs_runtime.worker.asgi,"
        "mlfuncs_runtime.triggers.process, mlfuncs_runtime.worker.zygote, mlfuncs_runtime.worker.server;"
        "print([name for name in sys.modules if 'opentelemetry' in name])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(MissingExtra, match=r"mlfuncs\[otel\]"):
        open_export("http://127.0.0.1:4318", "x", {})


def test_an_address_that_is_no_url_is_an_error_that_shows_one() -> None:
    with pytest.raises(SpecError, match="http://collector:4318"):
        open_export("collector:4317", "x", {})
