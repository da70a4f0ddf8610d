"""The OpenAPI document of a signature."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
from pydantic import BaseModel, Field, computed_field
from sklearn.linear_model import LogisticRegression

from mlfuncs.errors import SignatureError
from mlfuncs.interface.openapi import openapi
from mlfuncs.interface.signature import Signature


class Item(BaseModel):
    price: float = Field(gt=0)

    @computed_field
    def cents(self) -> int:
        return round(self.price * 100)


class Order(BaseModel):
    items: list[Item]


@dataclasses.dataclass
class Total:
    total: float
    items: list[Item]


def total(order: Order) -> Total:
    """Add up an order.

    Prices are in euros.
    """
    return Total(sum(item.price for item in order.items), order.items)


def scale(x: list[float], factor: float = 2.0) -> list[float]:
    return [factor * value for value in x]


def references(node: Any) -> set[str]:
    if isinstance(node, dict):
        own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*(references(value) for value in node.values())) if node else own
    return set().union(*(references(item) for item in node)) if isinstance(node, list) and node else set()


def test_every_reference_points_into_the_components() -> None:
    document = openapi(Signature.of(total), "total", "1")
    for reference in references(document):
        name = re.fullmatch(r"#/components/schemas/(\w+)", reference)
        assert name is not None and name[1] in document["components"]["schemas"], reference


def test_model_that_differs_as_input_and_output_gets_two_components() -> None:
    schemas = openapi(Signature.of(total), "total", "1")["components"]["schemas"]
    assert "cents" not in schemas["Item"]["properties"]
    assert "cents" in schemas["ItemResult"]["required"]


def test_docstring_is_the_summary_and_description() -> None:
    document = openapi(Signature.of(total), "total", "1.2")
    assert document["info"]["description"] == "Add up an order.\n\nPrices are in euros."
    assert document["paths"]["/"]["post"]["summary"] == "Add up an order."


def test_one_body_model_says_that_the_named_form_is_taken_too() -> None:
    body = openapi(Signature.of(total), "total", "1")["paths"]["/"]["post"]["requestBody"]
    assert '{"order": {...}}' in body["description"]


def test_problems_are_described_with_retry_after_where_it_comes() -> None:
    responses = openapi(Signature.of(scale), "scale", "1")["paths"]["/"]["post"]["responses"]
    assert {"200", "422", "500", "503", "504"} <= set(responses)
    assert "Retry-After" in responses["503"]["headers"] and "Retry-After" in responses["429"]["headers"]
    assert list(responses["422"]["content"]) == ["application/problem+json"]


def test_schemas_are_valid_json_schema_with_defaults() -> None:
    document = openapi(Signature.of(scale), "scale", "1")
    body = document["paths"]["/"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    jsonschema.Draft202012Validator.check_schema(body)
    assert body["properties"]["factor"]["default"] == 2.0
    jsonschema.validate({"x": [1.0]}, body)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"x": [1.0], "y": 1}, body)


def test_function_without_required_parameters_needs_no_body() -> None:
    def ping(n: int = 1) -> int:
        return n

    assert openapi(Signature.of(ping), "ping", "1")["paths"]["/"]["post"]["requestBody"]["required"] is False


def test_nuclio_handler_takes_any_content() -> None:
    def handler(context: Any, event: Any) -> Any:
        return event.body

    operation = openapi(Signature.of(handler), "handler", "1")["paths"]["/"]["post"]
    assert operation["requestBody"]["content"] == {"*/*": {}}


def test_type_without_a_json_form_is_refused() -> None:
    def score(model: LogisticRegression, x: np.ndarray) -> float:
        return 0.0

    with pytest.raises(SignatureError, match="bind it when deploying"):
        openapi(Signature.of(score), "score", "1")
