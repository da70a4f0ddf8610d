"""Signatures: what is refused at decoration, resolved types, strict bodies, Python callers, results."""

from __future__ import annotations

import datetime
import functools
import json
import subprocess
import sys
import textwrap
import typing
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from mlfuncs.decorator import function
from mlfuncs.errors import InvalidInput, SignatureError
from mlfuncs.interface.signature import Parameter, Signature, check_signature, function_kind


class Payment(BaseModel):
    amount: float
    currency: Literal["EUR", "USD"] = "EUR"


@dataclass
class Window:
    start: int
    stop: int = 10


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    amount: float


class Wrapper(BaseModel):
    body: str


def predict(x: list[float], k: int = 3, *, flag: bool = False) -> float:
    """The mean."""
    return sum(x) / len(x)


def fields_of(call: Any) -> dict[str, str]:
    with pytest.raises(InvalidInput) as caught:
        call()
    return {entry["field"]: entry["message"] for entry in caught.value.fields}


def refusal(target: Any, body: Any) -> dict[str, str]:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return fields_of(lambda: Signature.of(target).validate_json(text))


class TestDecoration:
    def test_refuses_star_args_with_what_to_write(self) -> None:
        with pytest.raises(SignatureError, match=r"rows: list\[float\]"):
            check_signature(lambda *rows: rows)

    def test_refuses_star_kwargs_with_what_to_write(self) -> None:
        with pytest.raises(SignatureError, match=r"dict\[str, float\]"):
            check_signature(lambda **features: features)

    def test_refuses_positional_only(self) -> None:
        def f(x: int, /) -> int:
            return x

        with pytest.raises(SignatureError, match="remove the '/'"):
            check_signature(f)

    def test_refuses_class_without_call(self) -> None:
        class Model:
            def predict(self, x: int) -> int:
                return x

        with pytest.raises(SignatureError, match="def __call__"):
            check_signature(Model)

    def test_refuses_what_cannot_be_called(self) -> None:
        with pytest.raises(SignatureError, match="cannot be called"):
            check_signature(3)

    def test_checking_imports_neither_pydantic_nor_numpy(self) -> None:
        code = """
            import sys
            from mlfuncs.interface.signature import check_signature, function_kind, Signature
            def f(x: "list[float]", k: int = 1) -> float: ...
            check_signature(f); function_kind(f); Signature.of(f).parameters
            print([name for name in ("pydantic", "numpy", "pandas", "orjson") if name in sys.modules])
        """
        shown = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
        )
        assert shown.stdout.strip() == "[]"


class TestKinds:
    def test_function_class_and_nuclio_handler(self) -> None:
        class Model:
            def __call__(self, x: int) -> int:
                return x

        def handler(context: Any, event: Any) -> Any:
            return event

        assert function_kind(predict) == "function"
        assert function_kind(Model) == "class"
        assert function_kind(handler) == "nuclio"
        assert function_kind(function(Model)) == "class"
        assert function_kind(lambda event, context: 1) == "function"

    def test_class_signature_is_its_call_without_self(self) -> None:
        class Model:
            def __init__(self, weight: float) -> None:
                self.weight = weight

            def __call__(self, x: float) -> float:
                return self.weight * x

        signature = Signature.of(Model)
        assert [p.name for p in signature.parameters] == ["x"]
        assert signature.validate_json(b'{"x": 2}') == {"x": 2.0}

    def test_static_call_of_a_class_has_no_self(self) -> None:
        class Model:
            @staticmethod
            def __call__(x: int) -> int:
                return x

        assert [p.name for p in Signature.of(Model).parameters] == ["x"]

    def test_nuclio_handler_has_no_schema_and_takes_no_named_values(self) -> None:
        def handler(context: Any, event: Any) -> Any:
            return event

        signature = Signature.of(handler)
        assert signature.input_schema() == {} and signature.output_schema() == {}
        with pytest.raises(SignatureError, match="Nuclio"):
            signature.validate_json(b"{}")

    def test_callable_object_partial_and_wrapped_function(self) -> None:
        class Scorer:
            def __call__(self, x: int) -> int:
                return x

        @functools.wraps(predict)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return predict(*args, **kwargs)

        assert [p.annotation for p in Signature.of(Scorer()).parameters] == [int]
        assert Signature.of(functools.partial(predict, k=5)).validate_json(b'{"x": [1]}')["k"] == 5
        assert Signature.of(wrapped).validate_json(b'{"x": [1]}') == {"x": [1.0], "k": 3, "flag": False}

    def test_signature_of_the_same_target_is_built_once(self) -> None:
        assert Signature.of(predict) is Signature.of(predict) is Signature.of(function(predict))


class TestHints:
    def test_text_annotations_are_resolved(self) -> None:
        first, second, third = Signature.of(predict).parameters
        assert (first.annotation, first.required, first.kind) == (list[float], True, "positional")
        assert (second.annotation, second.default, second.required) == (int, 3, False)
        assert third == Parameter("flag", bool, False, "keyword")
        assert Signature.of(predict).returns is float

    def test_types_local_to_a_function_are_found_for_a_decorated_function(self) -> None:
        @dataclass
        class Local:
            a: int

        @function
        def f(x: Local, y: list[Local] | None = None) -> Local:
            return x

        assert Signature.of(f).validate_json(b'{"x": {"a": 1}}') == {"x": Local(1), "y": None}

    def test_types_in_a_closure_are_found(self) -> None:
        class Local(BaseModel):
            a: int

        def f(x: Local) -> int:
            return Local(a=1).a + x.a

        assert Signature.of(f).validate_json(b'{"x": {"a": 1}}') == {"x": Local(a=1)}

    def test_types_of_a_script_run_as_main_are_found(self, tmp_path: Path) -> None:
        script = tmp_path / "script.py"
        script.write_text(
            textwrap.dedent(
                """
                from __future__ import annotations
                from dataclasses import dataclass
                from mlfuncs.interface.signature import Signature
                def f(x: Later) -> float: ...
                @dataclass
                class Later:
                    a: float
                print(Signature.of(f).validate_json(b'{"x": {"a": 1}}'))
                """
            )
        )
        shown = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
        assert shown.stdout.strip() == "{'x': Later(a=1.0)}"

    def test_name_that_only_a_type_checker_sees_is_named(self) -> None:
        def f(x: int) -> int:
            return x

        f.__annotations__["x"] = "polars.DataFrame"
        with pytest.raises(SignatureError, match=r"names 'polars'.*TYPE_CHECKING"):
            _ = Signature.of(f).parameters

    def test_annotation_that_is_no_type_is_named(self) -> None:
        def f(x: int) -> int:
            return x

        f.__annotations__["x"] = "3 +"
        with pytest.raises(SignatureError, match="'3 \\+' of 'x' is not a type"):
            _ = Signature.of(f).parameters


class TestBody:
    def test_fills_in_defaults_and_takes_an_integer_for_a_float(self) -> None:
        assert Signature.of(predict).validate_json(b'{"x": [1, 2.5]}') == {"x": [1.0, 2.5], "k": 3, "flag": False}

    @pytest.mark.parametrize(
        ("body", "field", "message"),
        [
            ({"x": [1, "2"]}, "x.1", 'should be a number, not "2"'),
            ({"x": [True]}, "x.0", "should be a number, not true"),
            ({"x": [1], "k": True}, "k", "should be an integer, not true"),
            ({"x": [1], "k": 1.0}, "k", "should be an integer, not 1.0"),
            ({"x": [1], "k": "1"}, "k", 'should be an integer, not "1"'),
            ({"x": [1], "flag": 1}, "flag", "should be a boolean, not 1"),
            ({"x": [1], "k": None}, "k", "should be an integer, not null"),
            ({"k": 1}, "x", "is missing"),
            ({"x": [1], "flg": True}, "flg", "is unknown; did you mean 'flag'?"),
            ({"x": [1], "zzz": True}, "zzz", "is unknown; known: flag, k, x"),
            ([1], "body", "should be an object of the named parameters, not [1]"),
        ],
    )
    def test_refuses_and_names_the_field(self, body: Any, field: str, message: str) -> None:
        assert refusal(predict, body) == {field: message}

    def test_all_faults_are_told_at_once(self) -> None:
        assert set(refusal(predict, {"x": ["a", 1, "b"], "y": 1})) == {"x.0", "x.2", "y"}

    def test_message_names_function_and_fields(self) -> None:
        with pytest.raises(InvalidInput, match=r"the input of predict is not valid: x\.0 should be a number, not null"):
            Signature.of(predict).validate_json(b'{"x": [null]}')

    def test_text_that_is_not_json(self) -> None:
        assert refusal(predict, b"{")["body"].startswith("is not JSON: EOF")
        assert refusal(predict, b"\xff\xfe")["body"].startswith("is not JSON")

    @pytest.mark.parametrize("body", [b'{"x": [NaN]}', b'{"x": [1, Infinity]}', b'{"x": [-Infinity]}'])
    def test_literals_that_json_does_not_have_are_refused(self, body: bytes) -> None:
        assert "which JSON does not have" in refusal(predict, body)["body"]

    def test_number_too_large_for_a_float_is_refused(self) -> None:
        assert "finite" in refusal(predict, b'{"x": [1e999]}')["x.0"]

    def test_the_words_nan_and_infinity_inside_strings_are_text(self) -> None:
        def echo(text: str, more: Any = None) -> str:
            return text

        values = Signature.of(echo).validate_json(b'{"text": "NaN", "more": {"Infinity": ["NaN \\" NaN"]}}')
        assert values == {"text": "NaN", "more": {"Infinity": ['NaN " NaN']}}

    def test_nan_in_an_unannotated_parameter_is_refused(self) -> None:
        assert "body" in refusal(lambda x: x, b'{"x": NaN}')

    def test_unannotated_parameters_take_any_json(self) -> None:
        body = {"a": None, "b": [1, {"c": True}]}
        assert Signature.of(lambda a, b: 0).validate_json(json.dumps(body).encode()) == body

    def test_empty_body_is_an_empty_object(self) -> None:
        assert Signature.of(lambda n=1: n).validate_json(b"") == {"n": 1}

    def test_integers_beyond_64_bits_and_53_bits_are_exact(self) -> None:
        def f(n: int) -> int:
            return n

        for number in (2**53 + 1, 2**80):
            assert Signature.of(f).validate_json(b'{"n": %d}' % number) == {"n": number}

    def test_union_members_are_told_in_one_sentence(self) -> None:
        def f(x: int | list[float] | None) -> None: ...

        assert refusal(f, {"x": "a"}) == {"x": 'should be an integer or an array, not "a"'}
        assert refusal(f, {"x": ["a"]})["x.0"] == 'should be a number, not "a"'

    def test_constraints_of_annotated_types_hold(self) -> None:
        def f(p: Annotated[float, Field(ge=0, le=1)]) -> None: ...

        assert refusal(f, {"p": 2}) == {"p": "should be less than or equal to 1, not 2"}

    def test_nested_unknown_fields_are_refused_with_a_hint(self) -> None:
        def f(payments: list[Payment], window: Window) -> None: ...

        faults = refusal(f, {"payments": [{"amount": 1, "curency": "EUR"}], "window": {"start": 1, "stp": 2}})
        assert faults == {
            "payments.0.curency": "is unknown; did you mean 'currency'?",
            "window.stp": "is unknown; did you mean 'stop'?",
        }

    def test_model_that_allows_extra_fields_keeps_its_word(self) -> None:
        def f(x: Open, k: int = 0) -> None: ...

        values = Signature.of(f).validate_json(b'{"x": {"amount": 1, "more": 2}}')
        assert values["x"].model_extra == {"more": 2}
        assert "z" in refusal(f, {"x": {"amount": 1}, "z": 1})

    @given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=10))
    @settings(deadline=None)
    def test_whatever_is_sent_is_taken_or_refused_by_name(self, value: Any) -> None:
        body = json.dumps({"x": value}).encode()
        try:
            taken = Signature.of(predict).validate_json(body)["x"]
        except InvalidInput as exc:
            assert exc.fields and all(entry["field"].split(".")[0] in ("x", "body") for entry in exc.fields)
        else:
            assert taken == value and all(type(item) is float for item in taken)


class TestBodyModel:
    @pytest.mark.parametrize("body", [b'{"amount": 5}', b'{"payment": {"amount": 5}}', b' {\n"payment" :{"amount":5}}'])
    def test_model_is_taken_bare_and_by_name(self, body: bytes) -> None:
        def charge(payment: Payment) -> None: ...

        assert Signature.of(charge).validate_json(body) == {"payment": Payment(amount=5)}

    def test_dataclass_is_taken_bare_and_by_name(self) -> None:
        def cut(window: Window) -> None: ...

        for body in (b'{"start": 1}', b'{"window": {"start": 1}}'):
            assert Signature.of(cut).validate_json(body) == {"window": Window(1)}

    @pytest.mark.parametrize("wrap", [lambda body: body, lambda body: {"body": body}])
    def test_paths_start_with_the_parameter_in_both_forms(self, wrap: Any) -> None:
        def charge(body: Payment) -> None: ...

        assert refusal(charge, wrap({"amount": "x"})) == {"body.amount": 'should be a number, not "x"'}
        assert refusal(charge, wrap({})) == {"body.amount": "is missing"}
        assert refusal(charge, wrap({"amount": 1, "amonut": 2})) == {
            "body.amonut": "is unknown; did you mean 'amount'?"
        }

    def test_model_with_a_field_of_the_parameters_name_is_only_taken_bare(self) -> None:
        def f(body: Wrapper) -> None: ...

        assert Signature.of(f).validate_json(b'{"body": "text"}') == {"body": Wrapper(body="text")}
        assert refusal(f, {"body": {"body": "text"}}) == {"body.body": 'should be a string, not {"body": "text"}'}

    def test_named_form_takes_nothing_beside_the_parameter(self) -> None:
        def charge(payment: Payment) -> None: ...

        assert "amount" in refusal(charge, {"payment": {"amount": 1}, "amount": 2})

    def test_parameter_name_inside_a_string_does_not_make_the_named_form(self) -> None:
        class Note(BaseModel):
            text: str

        def f(note: Note) -> None: ...

        assert Signature.of(f).validate_json(b'{"text": "a \\"note\\" here"}')["note"].text == 'a "note" here'

    def test_model_with_a_default_is_only_taken_by_name(self) -> None:
        def charge(payment: Payment = Payment(amount=1)) -> None: ...

        assert Signature.of(charge).validate_json(b"{}") == {"payment": Payment(amount=1)}
        assert "amount" in refusal(charge, {"amount": 2})

    def test_schema_is_the_models_own(self) -> None:
        def charge(payment: Payment) -> None: ...

        assert Signature.of(charge).input_schema()["properties"].keys() == {"amount", "currency"}


class TestPythonCallers:
    def test_values_are_handed_on_as_they_are(self) -> None:
        given_list = [1, 2]
        values = Signature.of(predict).validate_python({"x": given_list})
        assert values["x"] is given_list and values["k"] == 3

    def test_wrong_types_are_refused_by_name(self) -> None:
        assert fields_of(lambda: Signature.of(predict).validate_python({"x": [1], "k": "1", "q": 0})) == {
            "q": "is unknown; known: x, k, flag"
        }
        assert fields_of(lambda: Signature.of(predict).validate_python({"x": ["a"], "k": "1"})) == {
            "x.0": 'should be a number, not "a"',
            "k": 'should be an integer, not "1"',
        }

    def test_numpy_scalars_become_python_numbers(self) -> None:
        values = Signature.of(predict).validate_python({"x": [1.0], "k": np.int64(4), "flag": np.bool_(True)})
        assert values["k"] == 4 and type(values["k"]) is int and values["flag"] is True

    def test_numpy_float_is_not_an_int(self) -> None:
        assert "k" in fields_of(lambda: Signature.of(predict).validate_python({"x": [1.0], "k": np.float64(4)}))

    def test_numpy_scalar_stays_for_a_numpy_annotation(self) -> None:
        def f(n: np.int64) -> None: ...

        assert type(Signature.of(f).validate_python({"n": np.int64(1)})["n"]) is np.int64

    def test_dict_for_a_pydantic_model_becomes_the_model(self) -> None:
        def f(payments: list[Payment], frame: Any = None) -> None: ...

        values = Signature.of(f).validate_python({"payments": [{"amount": 1}], "frame": np.arange(3)})
        assert values["payments"] == [Payment(amount=1)] and values["frame"].tolist() == [0, 1, 2]

    def test_bind_names_positional_values_and_fills_in_defaults(self) -> None:
        signature = Signature.of(predict)
        assert signature.bind(([1.0], 5), {"flag": True}) == {"x": [1.0], "k": 5, "flag": True}
        assert signature.bind((), {"x": [2.0]}) == {"x": [2.0], "k": 3, "flag": False}

    @pytest.mark.parametrize(
        ("args", "kwargs", "message"),
        [
            ((), {}, "x is missing"),
            (([1.0],), {"x": [2.0]}, "two values for 'x'"),
            (([1.0], 2, True), {}, "takes 2 positional arguments, and 3 were given"),
            (([1.0],), {"flg": True}, "did you mean 'flag'"),
        ],
    )
    def test_bind_refuses_what_python_would(self, args: Any, kwargs: Any, message: str) -> None:
        with pytest.raises(InvalidInput, match=message):
            Signature.of(predict).bind(args, kwargs)


class TestResult:
    @pytest.mark.parametrize(
        ("returns", "value", "expected"),
        [
            (float, 1.5, b"1.5"),
            (float, np.float32(1.5), b"1.5"),
            (int, np.int64(3), b"3"),
            (list[float], np.array([1.0, 2.0]), b"[1.0,2.0]"),
            (dict[str, list[float]], {"p": np.array([0.5])}, b'{"p":[0.5]}'),
            (float, float("nan"), b"null"),
            (list[float], [float("inf"), 1.0], b"[null,1.0]"),
            (datetime.date, datetime.date(2024, 2, 29), b'"2024-02-29"'),
            (Decimal, Decimal("1.10"), b'"1.10"'),
            (bytes, b"\xff\xfe", b'"//4="'),
            (Payment, Payment(amount=1), b'{"amount":1.0,"currency":"EUR"}'),
            (Payment, {"amount": 1}, b'{"amount":1.0,"currency":"EUR"}'),
            (Window, Window(1), b'{"start":1,"stop":10}'),
            (None, None, b"null"),
            (Any, {"a": np.arange(3), 1: {2}}, b'{"a":[0,1,2],"1":[2]}'),
            (Any, 2**70, b"1180591620717411303424"),
            (Any, float("nan"), b"null"),
            (Any, Decimal("1.5"), b'"1.5"'),
            (Any, b"a", b'"YQ=="'),
            (Any, datetime.timedelta(minutes=1), b'"PT1M"'),
        ],
    )
    def test_encodes(self, returns: Any, value: Any, expected: bytes) -> None:
        def f() -> Any: ...

        f.__annotations__["return"] = returns
        assert Signature.of(f).dump_json(value) == expected

    @pytest.mark.parametrize(
        ("returns", "value", "field"),
        [
            (int, "3", "result"),
            (list[float], [1.0, "a"], "result.1"),
            (Window, {"start": 1}, "result"),
            (dict[str, int], {"a": 1.5}, "result.a"),
            (Any, object(), "result"),
            (Any, {"deep": [object()]}, "result"),
        ],
    )
    def test_refuses_what_was_not_declared(self, returns: Any, value: Any, field: str) -> None:
        def f() -> Any: ...

        f.__annotations__["return"] = returns
        assert field in fields_of(lambda: Signature.of(f).dump_json(value))

    @given(st.lists(st.floats(allow_nan=False, allow_infinity=False)))
    @settings(deadline=None)
    def test_floats_come_back_exactly(self, values: list[float]) -> None:
        def f(x: list[float]) -> list[float]:
            return x

        signature = Signature.of(f)
        encoded = signature.dump_json(values)
        assert signature.validate_json(b'{"x":' + encoded + b"}") == {"x": values}


class TestSchemas:
    def test_parameters_defaults_and_strictness(self) -> None:
        schema = Signature.of(predict).input_schema()
        assert schema["required"] == ["x"] and schema["additionalProperties"] is False
        assert schema["properties"]["x"] | {"title": ""} == {"type": "array", "items": {"type": "number"}, "title": ""}
        assert schema["properties"]["k"]["default"] == 3
        assert Signature.of(predict).output_schema() == {"type": "number"}

    def test_default_that_json_cannot_say_is_left_out(self) -> None:
        marker = object()

        def f(x: Any = marker) -> None: ...

        assert "default" not in Signature.of(f).input_schema()["properties"]["x"]
        assert Signature.of(f).validate_json(b"{}")["x"] is marker

    def test_type_that_cannot_be_validated_is_a_signature_error(self) -> None:
        def f(x: int) -> None: ...

        f.__annotations__["x"] = typing.Generator[int, None, None] | int | "Nowhere"
        with pytest.raises(SignatureError):
            Signature.of(f).validate_json(b'{"x": 1}')


def test_aliases_are_the_types_they_stand_for() -> None:
    from typing_extensions import TypeAliasType

    T = typing.TypeVar("T")
    array = TypeAliasType("array", np.ndarray[Any, np.dtype[T]], type_params=(T,))  # as NumPy 2.5 writes NDArray
    row = TypeAliasType("row", list[float])

    def f(x, rows): ...

    f.__annotations__ = {"x": array[np.int64], "rows": list[row] | None, "return": row}
    signature = Signature.of(f)
    assert signature.returns == list[float]
    assert signature.parameters[1].annotation == list[list[float]] | None
    assert signature.validate_json(b'{"x": [1], "rows": [[1.0]]}')["x"].dtype == np.int64
    with pytest.raises(InvalidInput):
        signature.validate_json(b'{"x": [1.5], "rows": null}')
