"""Feature types: the closed list of what a feature can be, their spelling, and their Arrow counterparts.

Owns: parsing and printing of types, Arrow mapping, which change of a type is a widening.

    bool  int8 int16 int32 int64  float32 float64  string  bytes  date
    timestamp                 microseconds since the epoch, UTC
    decimal(10,2)             precision 1..38, scale 0..precision
    list<int64>               any number of elements
    vector<float32,128>       exactly 128 numbers, none of them null
    struct<lat:float64,lon:float64>

Unsigned integers are not here because Delta Lake has none: take the next wider signed type.
"""

from __future__ import annotations

import datetime
import decimal
import re
import types as python_types
import typing
import uuid
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from mlfuncs.errors import SpecError

if TYPE_CHECKING:
    import pyarrow as pa

INTEGERS = ("int8", "int16", "int32", "int64")
FLOATS = ("float32", "float64")
SCALARS = ("bool", *INTEGERS, *FLOATS, "string", "bytes", "timestamp", "date")
# bytes a value takes in a packed row; kinds that are not here have no fixed width
WIDTHS = {
    "bool": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "float32": 4,
    "float64": 8,
    "timestamp": 8,
    "date": 4,
}

_ALIASES = {
    "int": "int64",
    "float": "float64",
    "double": "float64",
    "str": "string",
    "utf8": "string",
    "text": "string",
    "binary": "bytes",
    "boolean": "bool",
    "datetime": "timestamp",
    "date32": "date",
}
_PYTHON: dict[Any, str] = {
    bool: "bool",
    int: "int64",
    float: "float64",
    str: "string",
    bytes: "bytes",
    datetime.datetime: "timestamp",
    datetime.date: "date",
    uuid.UUID: "string",
}
_MEMBER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KNOWN = ", ".join((*SCALARS, "decimal(p,s)", "list<T>", "vector<T,n>", "struct<name:T,...>"))


@dataclass(frozen=True)
class FeatureType:
    """One type. `kind` is its head word; the other fields are set for the kinds that need them."""

    kind: str
    precision: int = 0  # decimal
    scale: int = 0  # decimal
    element: FeatureType | None = None  # list, vector
    size: int = 0  # vector
    members: tuple[tuple[str, FeatureType], ...] = ()  # struct

    def __str__(self) -> str:
        if self.kind == "decimal":
            return f"decimal({self.precision},{self.scale})"
        if self.kind == "list":
            return f"list<{self.element}>"
        if self.kind == "vector":
            return f"vector<{self.element},{self.size}>"
        if self.kind == "struct":
            return f"struct<{','.join(f'{name}:{member}' for name, member in self.members)}>"
        return self.kind

    @property
    def width(self) -> int | None:
        """Bytes that one value takes in a packed row, or None when values differ in length."""
        if self.kind == "vector":
            assert self.element is not None
            return WIDTHS[self.element.kind] * self.size
        return 16 if self.kind == "decimal" else WIDTHS.get(self.kind)

    @property
    def is_number(self) -> bool:
        """Whether sums and means are defined: integers, floats and bool (as 0 and 1)."""
        return self.kind in INTEGERS or self.kind in FLOATS or self.kind == "bool"

    @cached_property
    def arrow(self) -> pa.DataType:
        """The Arrow type that columns of this type have in every result."""
        import pyarrow as pa

        if self.kind == "decimal":
            return pa.decimal128(self.precision, self.scale)
        if self.kind == "list":
            return pa.list_(self.element.arrow)  # type: ignore[union-attr]
        if self.kind == "vector":
            return pa.list_(self.element.arrow, self.size)  # type: ignore[union-attr]
        if self.kind == "struct":
            return pa.struct([(name, member.arrow) for name, member in self.members])
        return _arrow_scalars()[self.kind]

    @property
    def stored_arrow(self) -> pa.DataType:
        """The Arrow type on disk: Delta Lake has no fixed-size list, so a vector is stored as a list."""
        import pyarrow as pa

        if self.kind in ("list", "vector"):
            return pa.list_(self.element.stored_arrow)  # type: ignore[union-attr]
        if self.kind == "struct":
            return pa.struct([(name, member.stored_arrow) for name, member in self.members])
        return self.arrow

    def widens_to(self, wider: FeatureType) -> bool:
        """Whether every value of this type is exactly a value of `wider` (also when they are equal).

        >>> parse_type("int32").widens_to(parse_type("int64")), parse_type("int64").widens_to(parse_type("float64"))
        (True, False)
        """
        if self == wider:
            return True
        if self.kind in INTEGERS and wider.kind in INTEGERS:
            return INTEGERS.index(self.kind) <= INTEGERS.index(wider.kind)
        if (self.kind, wider.kind) in {
            ("float32", "float64"),
            ("int8", "float32"),
            ("int16", "float32"),
            ("int8", "float64"),
            ("int16", "float64"),
            ("int32", "float64"),
        }:
            return True
        if self.kind == wider.kind == "decimal":
            return wider.scale >= self.scale and wider.precision - wider.scale >= self.precision - self.scale
        if self.kind == wider.kind and self.kind in ("list", "vector"):
            return self.size == wider.size and self.element.widens_to(wider.element)  # type: ignore[union-attr, arg-type]
        if self.kind == wider.kind == "struct":
            theirs = dict(wider.members)
            return all(name in theirs and member.widens_to(theirs[name]) for name, member in self.members)
        return False


@lru_cache(maxsize=1)
def _arrow_scalars() -> dict[str, pa.DataType]:
    import pyarrow as pa

    return {
        "bool": pa.bool_(),
        "int8": pa.int8(),
        "int16": pa.int16(),
        "int32": pa.int32(),
        "int64": pa.int64(),
        "float32": pa.float32(),
        "float64": pa.float64(),
        "string": pa.string(),
        "bytes": pa.binary(),
        "timestamp": pa.timestamp("us", tz="UTC"),
        "date": pa.date32(),
    }


def parse_type(spelling: Any) -> FeatureType:
    """The type spelled as text ("list<int64>"), a Python type (`float`, `list[int]`), or a FeatureType already.

    >>> str(parse_type("vector<float32, 3>")), str(parse_type(list[int]))
    ('vector<float32,3>', 'list<int64>')

    Raises SpecError for anything else.
    """
    if isinstance(spelling, FeatureType):
        return spelling
    if isinstance(spelling, str):
        return _parse(spelling)
    if typing.get_origin(spelling) is list and len(typing.get_args(spelling)) == 1:
        return FeatureType("list", element=parse_type(typing.get_args(spelling)[0]))
    if isinstance(spelling, type) and not isinstance(spelling, python_types.GenericAlias) and spelling in _PYTHON:
        return FeatureType(_PYTHON[spelling])
    advice = "; for Decimal write 'decimal(18,2)'" if spelling is decimal.Decimal else ""
    raise SpecError(f"{spelling!r} is not a feature type; known: {_KNOWN}{advice}")


@lru_cache(maxsize=1024)
def _parse(text: str) -> FeatureType:
    text = text.strip()
    lowered = text.lower()
    kind = _ALIASES.get(lowered, lowered)
    if kind in SCALARS:
        return FeatureType(kind)
    if match := re.fullmatch(r"decimal\s*\(\s*(\d+)\s*,\s*(\d+)\s*\)", lowered):
        precision, scale = int(match[1]), int(match[2])
        if not (1 <= precision <= 38 and 0 <= scale <= precision):
            raise SpecError(f"{text!r}: precision is 1 to 38 and scale 0 to the precision")
        return FeatureType("decimal", precision=precision, scale=scale)
    if match := re.fullmatch(r"(list|vector|array|struct)\s*<(.*)>", text, re.IGNORECASE | re.DOTALL):
        head, parts = match[1].lower(), _split(match[2])
        if head == "list" and len(parts) == 1:
            return FeatureType("list", element=_parse(parts[0]))
        if head in ("vector", "array") and len(parts) == 2 and parts[1].strip().isdigit():
            return _vector(text, _parse(parts[0]), int(parts[1]))
        if head == "struct" and parts:
            return FeatureType("struct", members=_members(text, parts))
    unsigned = (
        "; Delta Lake has no unsigned integers: take the next wider signed type" if lowered.startswith("uint") else ""
    )
    raise SpecError(f"{text!r} is not a feature type; known: {_KNOWN}{unsigned}")


def _vector(text: str, element: FeatureType, size: int) -> FeatureType:
    if element.kind not in (*INTEGERS, *FLOATS, "bool") or size < 1:
        raise SpecError(f"{text!r}: a vector holds 1 or more numbers, like 'vector<float32,128>'")
    return FeatureType("vector", element=element, size=size)


def _members(text: str, parts: list[str]) -> tuple[tuple[str, FeatureType], ...]:
    members: dict[str, FeatureType] = {}
    for part in parts:
        name, colon, spelled = part.partition(":")
        name = name.strip()
        if not colon or not _MEMBER.fullmatch(name) or name in members:
            raise SpecError(f"{text!r}: write struct members once each, like 'struct<lat:float64,lon:float64>'")
        members[name] = _parse(spelled)
    return tuple(members.items())


def _split(text: str) -> list[str]:
    """`text` cut at the commas that are in no bracket."""
    parts, depth, start = [], 0, 0
    for index, char in enumerate(text):
        depth += (char in "<(") - (char in ">)")
        if char == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    return [*parts, text[start:]]
