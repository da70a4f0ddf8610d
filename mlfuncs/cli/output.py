"""What commands print: JSON for programs, tables for people."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import click

from mlfuncs.errors import InvalidInput, SpecError

as_json = click.option("--json", "json_wanted", is_flag=True, help="Print one JSON object.")


def emit(values: Any, json_wanted: bool, text: str | Callable[[], str]) -> None:
    """Print `values` as JSON when wanted, else the text for people."""
    if json_wanted:
        click.echo(json.dumps(values, default=str))
    else:
        click.echo(text() if callable(text) else text)


@contextlib.contextmanager
def only_json(wanted: bool) -> Iterator[None]:
    """While it lasts, what the user's code prints goes to standard error, so that the output is JSON alone."""
    if not wanted:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], empty: str) -> str:
    """The rows as a table, or `empty` when there are none."""
    from mlfuncs.display import Table

    return str(Table(tuple(columns), tuple(rows))) if rows else empty


def parse_assignments(pairs: Iterable[str], option: str) -> dict[str, Any]:
    """{"k": value} from "k=JSON" pairs; a value that is not JSON is text. Raises SpecError.

    >>> parse_assignments(["days=7", "name=churn", "tags=[1, 2]"], "--param")
    {'days': 7, 'name': 'churn', 'tags': [1, 2]}
    """
    values = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not sign or not name:
            raise SpecError(f"{option} {pair!r} is not of the form name=JSON, e.g. {option} days=7")
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    return values


def parse_data(text: str, option: str = "--data", example: str = '{"x": 1}') -> Any:
    """The JSON in `text`, in the file that "@FILE" names, or on standard input for "-". Raises InvalidInput."""
    if text == "-":
        text = sys.stdin.read()
    elif text.startswith("@"):
        try:
            with open(text[1:], encoding="utf-8") as file:
                text = file.read()
        except (OSError, UnicodeDecodeError) as exc:
            reason = getattr(exc, "strerror", None) or "it is no UTF-8 text"
            raise InvalidInput(f"{option} {text!r} cannot be read: {reason}") from exc
    try:
        return json.loads(text)
    except ValueError as exc:
        raise InvalidInput(f"{option} is not JSON ({exc}): write it like {option} '{example}'") from exc
