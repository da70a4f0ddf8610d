"""Checks of rows before they are stored: shape, keys, times, and what the view expects.

Owns: conforming a table to a view, and splitting it into rows to store and rows to keep aside. Pure: the clock is an
argument.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mlfuncs.errors import InvalidInput
from mlfuncs_featurestore.declarations import Expectation
from mlfuncs_featurestore.definitions import FeatureView
from mlfuncs_featurestore.durations import parse_duration
from mlfuncs_featurestore.keys import canonical
from mlfuncs_featurestore.tables import cast_column, to_utc
from mlfuncs_featurestore.types import FeatureType, parse_type

_KEY_TYPES = {"int64": "int64", "string": "string", "uuid": "string", "bytes": "bytes"}
REASON = "__reason"


@dataclass(frozen=True)
class Checked:
    """`kept` may be stored; `aside` are the quarantined rows with a `__reason`; `warnings` are lines for people."""

    kept: pa.Table
    aside: pa.Table
    warnings: tuple[str, ...]


def stored_type(view: FeatureView, column: str) -> FeatureType:
    """The feature type of any column of the view, keys and times included."""
    if column in view.keys:
        return parse_type(_KEY_TYPES[view.keys[column]])
    if column in (view.timestamp, view.created_timestamp):
        return parse_type("timestamp")
    return view.fields[column]


def conform(view: FeatureView, table: pa.Table, now_us: int) -> pa.Table:
    """`table` with exactly the view's columns, in order, cast to their types on disk.

    A missing created time is `now_us`; a missing deprecated field is null. Raises InvalidInput, naming every fault
    of the columns, for a missing column, another type, a null key or a null time.
    """
    optional = {*view.deprecated, view.created_timestamp}
    missing = [name for name in view.columns if name not in table.column_names and name not in optional]
    faults = [_missing(name, table.column_names) for name in missing]
    arrays: dict[str, pa.Array] = {}
    for name in view.columns:
        if name in missing:
            continue
        try:
            arrays[name] = _conformed(view, name, table, now_us)
        except InvalidInput as exc:
            faults.append((str(exc), exc.fields[0]["message"] if exc.fields else str(exc), name))
    if faults:
        lines = "\n  ".join(message for message, _, _ in faults)
        fields = [{"field": name, "message": short} for _, short, name in faults]
        raise InvalidInput(f"the rows do not fit view {view.name!r}; nothing was written:\n  {lines}", fields)
    return pa.table(arrays)


def _missing(name: str, have: Sequence[str]) -> tuple[str, str, str]:
    near = difflib.get_close_matches(name, have, n=1)
    hint = f"; is it {near[0]!r}?" if near else f"; the table has {', '.join(map(repr, have[:20]))}"
    return f"column {name!r} is missing{hint}", "is missing", name


def _conformed(view: FeatureView, name: str, table: pa.Table, now_us: int) -> pa.Array:
    kind = stored_type(view, name)
    if name == view.created_timestamp:
        now = pa.scalar(now_us, kind.arrow)
        if name not in table.column_names:
            return pa.repeat(now, table.num_rows)
        return to_utc(name, _combined(table, name)).fill_null(now)
    if name not in table.column_names:
        return pa.nulls(table.num_rows, kind.stored_arrow)
    if name in view.keys:
        return key_column(name, _combined(table, name), view.keys[name])
    array = cast_column(name, table[name], kind, stored=True)
    if name == view.timestamp and array.null_count:
        raise _null(name, array, "the event time")
    return array


def _combined(table: pa.Table, name: str) -> pa.Array:
    array = table[name].combine_chunks()
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def key_column(name: str, array: pa.Array, kind: str) -> pa.Array:
    """A key column in its canonical form (UUIDs as lower-case text). Raises InvalidInput for a null or a misfit."""
    if pa.types.is_floating(array.type):  # what pandas makes of whole numbers when one is missing
        array = pc.if_else(pc.is_nan(array), None, array)
    if array.null_count:
        raise _null(name, array, "the key")
    if kind == "uuid":
        return pa.array([canonical(name, value, "uuid") for value in array.to_pylist()], pa.string())
    if kind == "int64" and pa.types.is_floating(array.type):
        return pa.array([canonical(name, value, "int64") for value in array.to_pylist()], pa.int64())
    return cast_column(name, array, parse_type(_KEY_TYPES[kind]))


def _null(name: str, array: pa.Array, what: str) -> InvalidInput:
    row = pc.index(array.is_null(), True).as_py()
    message = f"column {name!r} ({what}) is null in {array.null_count} rows, first in row {row}; every row needs one"
    return InvalidInput(message, [{"field": name, "message": f"is null in {array.null_count} rows"}])


def check(view: FeatureView, table: pa.Table, now_us: int, future: str = "warn") -> Checked:
    """Hold the conformed `table` to the view's expectations.

    `future` says what happens to events later than `now_us`: "warn", "reject", "quarantine" or "accept". Raises
    InvalidInput when a rejecting rule fails; nothing is stored then.
    """
    late = pc.greater(table[view.timestamp], pa.scalar(now_us, parse_type("timestamp").arrow))
    rules: list[tuple[str, str, Any]] = [(f"{view.timestamp} lies in the future", future, late)]
    for expectation in view.expectations:
        failed = failures(expectation, table[expectation.column], now_us)
        rules.append((f"expected {expectation.describe()}", expectation.action, failed))
    warnings, rejected, aside = [], [], []
    for reason, action, failed in rules:
        count = pc.sum(pc.cast(failed, pa.int64())).as_py() or 0
        if count and action != "accept":
            line = f"view {view.name!r}: {reason}: {count} of {table.num_rows} rows do not hold"
            warnings.append(line)
            if action == "reject":
                rejected.append(f"{line}, first row {pc.index(failed, True).as_py()}")
            elif action == "quarantine":
                aside.append((reason, failed))
    if rejected:
        raise InvalidInput("nothing was written:\n  " + "\n  ".join(rejected))
    return _split(table, aside, warnings)


def _split(table: pa.Table, aside: list[tuple[str, Any]], warnings: list[str]) -> Checked:
    mask: Any = pa.array([False] * table.num_rows) if not aside else aside[0][1]
    reasons: Any = pa.repeat(pa.scalar("", pa.string()), table.num_rows)
    for reason, failed in aside:
        mask = pc.or_(mask, failed)
        joined = pc.if_else(pc.equal(reasons, ""), reason, pc.binary_join_element_wise(reasons, reason, "; "))
        reasons = pc.if_else(failed, joined, reasons)
    kept = table if not aside else table.filter(pc.invert(mask))
    quarantined = table.append_column(REASON, reasons)
    return Checked(kept, quarantined.filter(mask) if aside else quarantined.slice(0, 0), tuple(warnings))


def failures(expectation: Expectation, column: Any, now_us: int) -> Any:
    """Which values break the expectation, as a boolean array without nulls; a null breaks only `not_null`.

    NaN is out of every range.
    """
    bad: Any = pa.repeat(pa.scalar(False), len(column))
    values = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    try:
        if expectation.minimum is not None:
            bad = pc.or_(bad, _no(pc.greater_equal(values, _scalar(expectation.minimum, values.type))))
        if expectation.maximum is not None:
            bad = pc.or_(bad, _no(pc.less_equal(values, _scalar(expectation.maximum, values.type))))
        if expectation.one_of is not None:
            allowed = pa.array(list(expectation.one_of), values.type)
            bad = pc.or_(bad, pc.and_(values.is_valid(), pc.invert(pc.is_in(values, allowed))))
        if expectation.regex is not None:
            bad = pc.or_(bad, _no(pc.match_substring_regex(values, f"^(?:{expectation.regex})$")))
        if expectation.fresh_within is not None:
            oldest = now_us - parse_duration(expectation.fresh_within)
            bad = pc.or_(bad, pc.fill_null(pc.less(to_utc(expectation.column, values), oldest_scalar(oldest)), False))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as exc:
        raise InvalidInput(f"expectation {expectation.describe()!r} cannot be checked on {values.type}: {exc}") from exc
    return pc.or_(bad, values.is_null()) if expectation.not_null else bad


def oldest_scalar(microseconds: int) -> pa.Scalar:
    """A time as an Arrow scalar."""
    return pa.scalar(microseconds, parse_type("timestamp").arrow)


def _scalar(bound: float | int, have: pa.DataType) -> pa.Scalar:
    """A bound beside a column: floats stay floats, so that 0.5 is not cut to 0 for an integer column."""
    return pa.scalar(bound) if pa.types.is_integer(have) or pa.types.is_floating(have) else pa.scalar(bound, have)


def _no(holds: Any) -> Any:
    """Where a comparison is false; a null comparison (a null value) breaks nothing."""
    return pc.invert(pc.fill_null(holds, True))
