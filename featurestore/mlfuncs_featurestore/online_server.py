"""The feature server: online features over HTTP, with Feast's request and answer for get-online-features.

Owns: the application and `serve`. One check stands before every route: a bearer token, where the settings have one; an
address that is not loopback without a token is refused. Errors are problem documents (RFC 9457).

    POST /get-online-features  {"features": ["spend:amount"], "entities": {"user_id": [1, 2]}}
                               or {"feature_service": "fraud", ...}; "full_feature_names": true
    POST /push                 {"push_source_name": "spend", "df": {"user_id": [1], ...}, "push_id": "..."}
    GET  /health  /metrics  /docs  /openapi.json

Numbers that JSON does not have are the strings "NaN", "Infinity" and "-Infinity"; bytes are base64; times ISO 8601.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import hmac
import ipaddress
import json
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field

from mlfuncs.errors import InvalidInput, MlfuncsError, SpecError, TooLarge, Unauthorized
from mlfuncs.settings import Settings
from mlfuncs_featurestore.flusher import Flusher
from mlfuncs_featurestore.json_rows import read_cell, read_value
from mlfuncs_featurestore.online_metrics import CONTENT_TYPE, FeatureMetrics
from mlfuncs_featurestore.online_result import OnlineFeatures
from mlfuncs_featurestore.store import FeatureStore
from mlfuncs_featurestore.types import parse_type

OPEN_ROUTES = ("/health",)  # need no token
BODY_BYTES = 64 * 2**20
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


class FeaturesRequest(BaseModel):
    """What get-online-features takes: features or a service, and columns of entity keys and request data."""

    model_config = ConfigDict(extra="forbid")
    features: list[str] = Field(default_factory=list)
    feature_service: str | None = None
    entities: dict[str, list[Any]]
    full_feature_names: bool = False


class PushRequest(BaseModel):
    """What push takes: the view's name and its rows as columns."""

    model_config = ConfigDict(extra="forbid")
    push_source_name: str
    df: dict[str, list[Any]]
    push_id: str | None = None


def make_app(store: FeatureStore, sample_rate: float = 0.0) -> FastAPI:
    """The server's application. `sample_rate`: the share of answers kept for the skew check."""
    app = FastAPI(title="mlfuncs feature server", version="1")
    metrics = app.state.metrics = FeatureMetrics()
    _add_guard(app, store.settings.token, metrics)
    _add_features(app, store, metrics, sample_rate)
    _add_operations(app, store, metrics)
    return app


def _add_guard(app: FastAPI, token: str, metrics: FeatureMetrics) -> None:
    """The check before every route, and errors as problem documents."""

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        begun = time.perf_counter()
        response = _refusal(request, token)
        if response is None:
            response = await call_next(request)
        route = request.scope.get("route")
        metrics.answered(getattr(route, "path", "other"), response.status_code, time.perf_counter() - begun)
        return response

    @app.exception_handler(MlfuncsError)
    async def problem(_: Request, exc: Exception) -> Response:
        assert isinstance(exc, MlfuncsError)
        return _problem(exc)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, exc: Exception) -> Response:
        assert isinstance(exc, RequestValidationError)
        fields = [{"field": ".".join(map(str, one["loc"][1:])), "message": one["msg"]} for one in exc.errors()]
        return _problem(InvalidInput("the body does not fit; see errors", fields))


def _add_features(app: FastAPI, store: FeatureStore, metrics: FeatureMetrics, sample_rate: float) -> None:
    @app.post("/get-online-features")
    def get_online_features(request: FeaturesRequest) -> Response:
        """Features of the entities, one result per feature, with statuses and event times."""
        if bool(request.features) == (request.feature_service is not None):
            raise InvalidInput("name either features or a feature_service")
        wanted: Any = request.feature_service or request.features
        names = {"full_feature_names": request.full_feature_names}
        begun = time.perf_counter()
        try:
            found = store.get_online_features(wanted, _given(store, wanted, request.entities), **names)
            answer = answer_of(found)
        except MlfuncsError:
            metrics.reads.failed()
            raise
        metrics.reads.read(time.perf_counter() - begun, found.counts())
        if sample_rate:
            from mlfuncs_featurestore.skew import sample

            sample(store, found, sample_rate)
        return _json(answer)

    @app.post("/push")
    def push(request: PushRequest) -> Response:
        """Rows into a view: online at once and durable offline."""
        report = store.push(request.push_source_name, _rows(store, request), push_id=request.push_id)
        metrics.pushed(report.rows)
        return _json({"view": report.view, "push_id": report.push_id, "rows": report.rows, "repeated": report.repeated})


def _add_operations(app: FastAPI, store: FeatureStore, metrics: FeatureMetrics) -> None:
    @app.get("/health")
    def health() -> Response:
        """200 while Redis answers."""
        store.online.rows.read([b"mlfuncs"])
        return _json({"status": "ok"})

    @app.get("/metrics")
    def show_metrics() -> Response:
        """Prometheus text."""
        return Response(metrics.render(), media_type=CONTENT_TYPE)


def answer_of(found: OnlineFeatures) -> dict[str, Any]:
    """Feast's answer: entity columns first, then features, each with values, statuses and event times; types beside."""
    values, statuses, times = found.to_dict(), found.statuses, found.event_us
    results = []
    for name in values:
        if name in statuses:
            moments = [_iso(int(us)) for us in times[name]]
            results.append({"values": values[name], "statuses": statuses[name], "event_timestamps": moments})
        else:
            given = ["PRESENT"] * len(values[name])
            results.append({"values": values[name], "statuses": given, "event_timestamps": [_iso(0)] * len(given)})
    return {"metadata": {"feature_names": list(values), "feature_types": found.types}, "results": results}


def serve(settings: Settings, host: str = "127.0.0.1", port: int = 6566, sample_rate: float = 0.0) -> None:
    """Serve until the process is told to end. Raises SpecError for an open address without a token."""
    import uvicorn

    check_address(host, settings.token)
    store = FeatureStore(settings)
    store.online.rows.read([b"mlfuncs"])  # say now when Redis is away
    with Flusher(store):
        uvicorn.run(make_app(store, sample_rate), host=host, port=port, log_level=settings.log_level.lower())


def check_address(host: str, token: str) -> None:
    """Refuse to serve others than this machine without a token. Raises SpecError."""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback and not token:
        raise SpecError(f"{host!r} is open to others: set MLFUNCS_TOKEN, or serve on 127.0.0.1")


def _refusal(request: Request, token: str) -> Response | None:
    """Why the request is not let in; None when it is."""
    length = request.headers.get("content-length", "0")
    if "transfer-encoding" in request.headers:
        return _problem(TooLarge("the length of the body is not known before it comes; send Content-Length"))
    if not (length.isascii() and length.isdecimal()) or int(length) > BODY_BYTES:
        return _problem(TooLarge(f"the body is over {BODY_BYTES} bytes; send fewer entities at once"))
    if not token or request.url.path in OPEN_ROUTES:
        return None
    sent = request.headers.get("authorization", "")
    if hmac.compare_digest(sent.encode("latin-1"), f"Bearer {token}".encode()):
        return None
    return _problem(Unauthorized("send the token: Authorization: Bearer <MLFUNCS_TOKEN>"))


def _given(store: FeatureStore, wanted: Any, entities: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The columns with keys and request data as their types have them: bytes are base64 in JSON, times ISO 8601."""
    plan = store.online.plan(wanted)
    kinds = {
        name: parse_type("bytes") for read in plan.reads.values() for name, kind in read.key_types if kind == "bytes"
    }
    kinds |= plan.request
    return {
        name: [read_value(name, one, kinds[name]) for one in column] if name in kinds else column
        for name, column in entities.items()
    }


def _rows(store: FeatureStore, request: PushRequest) -> dict[str, list[Any]]:
    """The columns with values as the view's types have them."""
    view = store.catalog.view(request.push_source_name)
    return {name: [read_cell(view, name, one) for one in column] for name, column in request.df.items()}


def _iso(us: int) -> str:
    return (_EPOCH + datetime.timedelta(microseconds=us)).isoformat().replace("+00:00", "Z")


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return str(value) if isinstance(value, decimal.Decimal) else value


def _json(values: Any, status: int = 200) -> Response:
    plain = _plain(values)
    try:
        body = orjson.dumps(plain)
    except TypeError:  # integers beyond 64 bits and halves of surrogate pairs, in columns that callers get back
        body = json.dumps(plain, default=str).encode()
    return Response(body, status, media_type="application/json")


def _problem(exc: MlfuncsError) -> Response:
    headers = {"Retry-After": str(math.ceil(getattr(exc, "retry_after_s", 1)))} if exc.status in (429, 503) else {}
    content = orjson.dumps(exc.to_problem())
    return Response(content, exc.status, headers=headers, media_type="application/problem+json")
