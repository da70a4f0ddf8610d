"""The Open Inference Protocol v2 over REST, from the type hints: what Triton's and KServe's clients speak.

Each parameter is an input tensor of its name, and the result maps back the same way (`tensor_values.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import mlfuncs
from mlfuncs.errors import InvalidInput, MlfuncsError, NotFound
from mlfuncs.serving.request_context import CURRENT_REQUEST
from mlfuncs_runtime.worker.content_coding import read_body
from mlfuncs_runtime.worker.exchange import Exchange
from mlfuncs_runtime.worker.failures import bad_result
from mlfuncs_runtime.worker.handlers import item_type
from mlfuncs_runtime.worker.invocation import Invocation
from mlfuncs_runtime.worker.tensor_values import (
    output_hints,
    plain,
    tensor_hint,
    to_document,
    to_outputs,
    to_table,
    to_value,
)
from mlfuncs_runtime.worker.tensors import InferRequest, dump_response, parse_request

if TYPE_CHECKING:
    import numpy as np

_MODEL = re.compile(r"/v2/models/(?P<name>[^/]+)(?:/versions/(?P<version>[^/]+))?(?P<action>/ready|/infer)?")


class OpenInference:
    """Answers every path under /v2 for one handler."""

    def __init__(self, invocation: Invocation, unready: Any) -> None:
        self._invocation, self._unready = invocation, unready
        signature = invocation.handler.signature
        self._hints = {p.name: tensor_hint(p.annotation) for p in signature.parameters}
        self._annotations = {p.name: plain(p.annotation) for p in signature.parameters}
        tables = [name for name, hint in self._hints.items() if hint.kind == "table"]
        self._table = tables[0] if len(tables) == 1 else None

    async def __call__(self, exchange: Exchange) -> None:
        """Answer one request; errors have the protocol's `error` beside the problem document's members."""
        try:
            await self._route(exchange)
        except MlfuncsError as exc:
            problem = {**exc.to_problem(exchange.request_id), "error": str(exc)}
            await exchange.answer(exc.status, json.dumps(problem, default=str).encode())

    async def _route(self, exchange: Exchange) -> None:
        path = exchange.path.rstrip("/")
        if path == "/v2":
            document = {"name": "mlfuncs", "version": mlfuncs.__version__, "extensions": ["binary_tensor_data"]}
            await self._get(exchange, document)
        elif path == "/v2/health/live":
            await self._get(exchange, {"live": True})
        elif path == "/v2/health/ready":
            await self._ready(exchange)
        elif match := _MODEL.fullmatch(path):
            await self._model(exchange, match["name"], match["version"], match["action"])
        else:
            raise NotFound("path", exchange.path, ["/v2", "/v2/health/live", "/v2/health/ready", self._base()])

    def _base(self) -> str:
        return f"/v2/models/{self._invocation.options.name}"

    async def _get(self, exchange: Exchange, document: Mapping[str, Any]) -> None:
        if exchange.method not in ("GET", "HEAD"):
            await exchange.refuse(405, "MethodNotAllowed", f"use GET on {exchange.path!r}", [(b"allow", b"GET, HEAD")])
        else:
            await exchange.answer(200, json.dumps(document).encode())

    async def _ready(self, exchange: Exchange) -> None:
        if reason := self._unready():
            await exchange.answer(503, json.dumps({"ready": False, "error": reason}).encode())
        else:
            await self._get(exchange, {"ready": True})

    async def _model(self, exchange: Exchange, name: str, version: str | None, action: str | None) -> None:
        options = self._invocation.options
        if name != options.name:
            raise NotFound("model", name, [options.name])
        if version not in (None, options.version):
            raise NotFound(f"version of model {name!r}", str(version), [options.version])
        if action is None:
            await self._get(exchange, self.metadata())
        elif action == "/ready":
            await self._ready(exchange)
        elif exchange.method != "POST":
            await exchange.refuse(405, "MethodNotAllowed", f"use POST on {exchange.path!r}", [(b"allow", b"POST")])
        else:
            await self._infer(exchange)

    def metadata(self) -> dict[str, Any]:
        """The model's metadata document."""
        handler, options = self._invocation.handler, self._invocation.options
        inputs = [
            {"name": name, "datatype": hint.datatype, "shape": hint.shape}
            for name, hint in self._hints.items()
            if hint.kind != "table"  # its columns are the inputs, and the hint does not name them
        ]
        returns = list[item_type(handler)] if self._invocation.streams else handler.signature.returns  # type: ignore[misc]
        outputs = [
            {"name": name, "datatype": hint.datatype, "shape": hint.shape}
            for name, hint in output_hints(returns).items()
        ]
        return {
            "name": options.name,
            "versions": [options.version],
            "platform": "mlfuncs_python",
            "inputs": inputs,
            "outputs": outputs,
        }

    async def _infer(self, exchange: Exchange) -> None:
        body = await read_body(exchange, self._invocation.options.body_bytes)
        if body is None:
            return
        length = exchange.headers.get(b"inference-header-content-length")
        try:
            request = parse_request(body, None if length is None else int(length))
        except ValueError as exc:
            raise InvalidInput(f"Inference-Header-Content-Length is not a number: {length!r}") from exc
        values = self._invocation.handler.signature.validate_python(self._to_values(request.inputs))
        CURRENT_REQUEST.set(exchange)
        result = await self._invocation.collect(values, exchange)
        await self._respond(exchange, request, result)

    async def _respond(self, exchange: Exchange, request: InferRequest, result: Any) -> None:
        handler, options = self._invocation.handler, self._invocation.options
        try:
            outputs = to_outputs(result)
        except (TypeError, ValueError) as exc:
            raise bad_result(handler.name, InvalidInput(f"the result is no tensor: {exc}")) from exc
        if unknown := sorted(set(request.outputs) - set(outputs)):
            raise NotFound("output", unknown[0], outputs)
        head = {"model_name": options.name, "model_version": options.version}
        body, length = dump_response(head, outputs, request)
        if length is None:
            await exchange.answer(200, body)
        else:
            extra = [(b"inference-header-content-length", b"%d" % length)]
            await exchange.answer(200, body, b"application/octet-stream", extra)

    def _to_values(self, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        columns: dict[str, np.ndarray] = {}
        documents: dict[str, Any] = {}
        for name, array in inputs.items():
            if name in self._hints and self._hints[name].kind == "json":
                documents[name] = to_document(name, array)
            elif name in self._hints and self._hints[name].kind != "table":
                values[name] = to_value(name, array, self._hints[name], self._annotations[name])
            elif self._table is not None:
                columns[name] = array
            else:
                known = ", ".join(self._hints)
                message = f"there is no such input; the function takes {known}"
                raise InvalidInput(f"input {name!r}: {message}", [{"field": name, "message": message}])
        if self._table is not None and columns:
            values[self._table] = to_table(columns, self._annotations[self._table])
        if documents:
            values |= self._documents.read(json.dumps(documents).encode())
        return values

    @cached_property
    def _documents(self) -> Any:
        """Reads the parameters that come as JSON text, as a JSON body's would be."""
        from mlfuncs.interface.validation import Reader

        signature = self._invocation.handler.signature
        parameters = [p for p in signature.parameters if self._hints[p.name].kind == "json"]
        return Reader(signature.name, parameters, None)
