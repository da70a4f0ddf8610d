"""Conditions and selectors of a pipeline, evaluated by a real CEL implementation; nothing is ever passed to `eval`.

The kfp compiler writes a condition as CEL over `inputs.parameter_values['name']`. It does not escape quotes inside
string literals (`x == 'it's'` for "it's"); `repair_quotes` mends exactly that.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from mlfuncs.errors import InvalidInput, SpecError

_REFERENCE = re.compile(r"inputs\.parameter(?:_value)?s\[(?:'([^']*)'|\"([^\"]*)\")\]")
_PATH = re.compile(r"""parseJson\(string_value\)((?:\[(?:"[^"]*"|'[^']*'|\d+)\])*)""")
_STEP = re.compile(r"""\[(?:"([^"]*)"|'([^']*)'|(\d+))\]""")
# what may follow the closing quote of a literal in a condition that kfp wrote
_AFTER_LITERAL = re.compile(r"\)*\s*($|&&|\|\||==|!=|<=|>=|<|>)")


def referenced(condition: str) -> set[str]:
    """The names of the parameters that `condition` reads.

    >>> sorted(referenced("inputs.parameter_values['a'] == inputs.parameter_values['b']"))
    ['a', 'b']
    """
    return {single or double for single, double in _REFERENCE.findall(condition)}


def evaluate(condition: str, values: Mapping[str, Any]) -> bool:
    """Whether `condition` holds for the parameters `values`. Raises SpecError (no CEL) or InvalidInput (no answer)."""
    import celpy

    try:
        known = {"parameter_values": values, "parameters": {name: _primitive(value) for name, value in values.items()}}
        answer = compile_condition(condition).evaluate({"inputs": _to_cel(known)})
    except celpy.CELEvalError as exc:
        raise InvalidInput(f"the condition {condition!r} cannot be decided: {_reason(exc)}; {_given(values)}") from exc
    if not isinstance(answer, celpy.celtypes.BoolType):
        raise InvalidInput(f"the condition {condition!r} gives {answer!r}, not true or false; {_given(values)}")
    return bool(answer)


def _primitive(value: Any) -> dict[str, Any]:
    """A value as schemaVersion 2.0.0 has it: `inputs.parameters['x'].int_value`, `double_value` or `string_value`."""
    if isinstance(value, str):
        return {"string_value": value}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"int_value": int(value)} if isinstance(value, int) else {"double_value": value}
    return {}


@functools.lru_cache(maxsize=1024)
def compile_condition(condition: str) -> Any:
    """The CEL program of `condition`. Raises SpecError when it is not CEL, even after mending kfp's quotes."""
    import celpy

    environment = _environment()
    for text in (condition, repair_quotes(condition)):
        try:
            return environment.program(environment.compile(text), functions=_functions())
        except celpy.CELParseError:
            continue
    raise SpecError(
        f"the condition {condition!r} is not a CEL expression; write one like inputs.parameter_values['x'] > 1"
    )


def repair_quotes(condition: str) -> str:
    r"""`condition` with the quotes inside kfp's string literals escaped.

    >>> print(repair_quotes("inputs.parameter_values['x'] == 'it's'"))
    inputs.parameter_values['x'] == 'it\'s'
    """
    parts, position = [], 0
    while position < len(condition):
        reference = _REFERENCE.match(condition, position)
        if reference:
            parts.append(reference[0])
            position = reference.end()
        elif condition[position] == "'":
            end = _literal_end(condition, position + 1)
            body = condition[position + 1 : end].replace("\\", "\\\\").replace("'", "\\'")
            parts.append(f"'{body}'")
            position = end + 1
        else:
            parts.append(condition[position])
            position += 1
    return "".join(parts)


def select(expression: str, value: Any) -> Any:
    """What a `parameterExpressionSelector` picks from `value`, for example one key of a loop item.

    >>> select('parseJson(string_value)["a"]', {"a": 1})
    1

    Raises InvalidInput when the value has no such part.
    """
    path = _PATH.fullmatch(expression)
    if path:
        return _follow(path[1], value, expression)
    import celpy

    if expression not in _selectors:
        environment = _environment()
        try:
            program = environment.program(environment.compile(expression), functions=_functions())
        except celpy.CELParseError as exc:
            raise SpecError(f"the selector {expression!r} is not a CEL expression") from exc
        _selectors[expression] = program
    try:
        answer = _selectors[expression].evaluate(_kinds(value))
    except celpy.CELEvalError as exc:
        raise InvalidInput(f"the selector {expression!r} finds nothing in {value!r}: {_reason(exc)}") from exc
    return json.loads(json.dumps(answer, cls=celpy.CELJSONEncoder))


_selectors: dict[str, Any] = {}


def _follow(path: str, value: Any, expression: str) -> Any:
    current = json.loads(value) if isinstance(value, str) else value
    for double, single, index in _STEP.findall(path):
        try:
            current = current[int(index) if index else double or single]
        except (KeyError, IndexError, TypeError):
            raise InvalidInput(f"the selector {expression!r} finds nothing in {value!r}") from None
    return current


def _literal_end(condition: str, start: int) -> int:
    """Index of the quote that closes the literal opened before `start`."""
    for match in re.finditer("'", condition[start:]):
        end = start + match.start()
        if _AFTER_LITERAL.match(condition, end + 1):
            return end
    return len(condition)


@functools.cache
def _environment() -> Any:
    import celpy

    return celpy.Environment()


@functools.cache
def _functions() -> dict[str, Callable[..., Any]]:
    """CEL's comparisons across number types (language definition, "Numeric values"), and kfp's parseJson."""
    import operator

    import celpy
    from celpy import celtypes, evaluation

    numbers = (celtypes.IntType, celtypes.UintType, celtypes.DoubleType)

    def across(name: str, compare: Callable[[Any, Any], bool]) -> Callable[..., Any]:
        standard = evaluation.base_functions[name]

        def function(left: Any, right: Any) -> Any:
            if isinstance(left, numbers) and isinstance(right, numbers):
                return celtypes.BoolType(compare(_number(left), _number(right)))
            errors = isinstance(left, Exception) or isinstance(right, Exception)
            if name in ("_==_", "_!=_") and not errors and _kind(left) != _kind(right):
                return celtypes.BoolType(name == "_!=_")
            return standard(left, right)

        return function

    operators = {"_<_": operator.lt, "_<=_": operator.le, "_>_": operator.gt, "_>=_": operator.ge}
    operators |= {"_==_": operator.eq, "_!=_": operator.ne}
    functions: dict[str, Callable[..., Any]] = {name: across(name, compare) for name, compare in operators.items()}
    functions["parseJson"] = lambda text: celpy.json_to_cel(json.loads(text))
    return functions


def _number(value: Any) -> int | float:
    return float(value) if isinstance(value, float) else int(value)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return "number" if isinstance(value, int | float) and type(value).__name__ != "BoolType" else type(value).__name__


def _to_cel(value: Any) -> Any:
    from celpy import celtypes

    if value is None:
        return None
    if isinstance(value, bool):
        return celtypes.BoolType(value)
    if isinstance(value, int):
        return celtypes.IntType(value) if -(2**63) <= value < 2**63 else celtypes.DoubleType(value)
    if isinstance(value, float):
        return celtypes.DoubleType(value)
    if isinstance(value, str):
        return celtypes.StringType(value)
    if isinstance(value, list | tuple):
        return celtypes.ListType([_to_cel(item) for item in value])
    return celtypes.MapType({celtypes.StringType(key): _to_cel(item) for key, item in value.items()})


def _kinds(value: Any) -> dict[str, Any]:
    """The fields of a protobuf Value, as kfp's selectors name them."""
    text = value if isinstance(value, str) else json.dumps(value)
    kinds = {"string_value": _to_cel(text)}
    if isinstance(value, bool):
        kinds["bool_value"] = _to_cel(value)
    elif isinstance(value, int | float):
        kinds["number_value"] = _to_cel(float(value))
    elif isinstance(value, dict):
        kinds["struct_value"] = _to_cel(value)
    elif isinstance(value, list):
        kinds["list_value"] = _to_cel(value)
    return kinds


def _reason(exc: Exception) -> str:
    args = exc.args
    if len(args) == 3 and args[1] is KeyError:
        return f"there is no parameter {args[2][0]!s}"
    return str(args[2][0] if len(args) == 3 and args[2] else args[0])


def _given(values: Mapping[str, Any]) -> str:
    return "given " + (", ".join(f"{name}={value!r}" for name, value in values.items()) or "nothing")
