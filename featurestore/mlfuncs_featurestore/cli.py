"""The commands `mlfuncs features ...`.

Owns: the click group `features`. Every command takes --json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

import click

from mlfuncs.cli.output import as_json, emit, only_json, parse_data, table
from mlfuncs.errors import InvalidInput, SpecError
from mlfuncs.settings import read_settings

_view = click.argument("view")


def _store() -> Any:
    from mlfuncs_featurestore.store import FeatureStore

    return FeatureStore(read_settings())


@click.group()
def features() -> None:
    """Define, ingest, materialize, read and serve features."""


@features.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Show what would change.")
@as_json
def apply(file: Path, dry_run: bool, json_wanted: bool) -> None:
    """Record the entities, views and services that FILE defines at its top level."""
    from mlfuncs.loading import load_file
    from mlfuncs_featurestore.definitions import Definition

    with only_json(json_wanted):
        module = load_file(file.absolute(), str(file))
        found = [one for one in vars(module).values() if isinstance(one, Definition)]
        if not found:
            raise SpecError(f"{file} defines no Entity, FeatureView or FeatureService at its top level")
        plan = _store().apply(list({(one.kind, one.name): one for one in found}.values()), dry_run=dry_run)
    changes = [dataclasses.asdict(change) for change in plan.changes]
    emit({"applied": plan.applied, "changes": changes}, json_wanted, str(plan))


@features.command()
@_view
@click.argument("source", required=False)
@click.option("--future", type=click.Choice(["warn", "reject", "quarantine", "accept"]), default="warn")
@as_json
def ingest(view: str, source: str | None, future: str, json_wanted: bool) -> None:
    """Append SOURCE (Parquet, Delta, or SQL on DuckDB; default: the view's own source) to the view's offline table."""
    with only_json(json_wanted):
        report = _store().ingest(view, source, future=future, progress=not json_wanted)
    emit(dataclasses.asdict(report), json_wanted, str(report))


@features.command()
@_view
@click.option("--data", required=True, metavar="JSON", help="A row or a list of rows; @FILE, or - for stdin.")
@click.option("--push-id", help="A push with an id that was pushed already does nothing.")
@as_json
def push(view: str, data: str, push_id: str | None, json_wanted: bool) -> None:
    """Push rows: online at once and durable offline. Times are ISO 8601 text, bytes base64, decimals text."""
    from mlfuncs_featurestore.json_rows import read_row

    given = parse_data(data)
    rows = given if isinstance(given, list) else [given]
    store = _store()
    definition = store.catalog.view(view)
    for row in rows:
        if not isinstance(row, dict):
            raise InvalidInput(f"--data: {row!r} is not a row; write an object with the view's columns")
    if not rows:
        raise InvalidInput("--data has no rows")
    report = store.push(view, [read_row(definition, row) for row in rows], push_id=push_id)
    emit(dataclasses.asdict(report), json_wanted, f"{view}: {report.rows} rows pushed ({report.push_id})")


@features.command()
@click.argument("view", required=False)
@click.option("--backfill", is_flag=True, help="From the first commit on.")
@click.option("--start", help="Only events from this ISO time on.")
@click.option("--end", help="Only events up to this ISO time.")
@click.option("--window", help="Only events that a window of this length, like 7d, reaches now.")
@click.option("--verify", "check", is_flag=True, help="Compare online with offline afterwards.")
@as_json
def materialize(view: str | None, check: bool, json_wanted: bool, **options: Any) -> None:
    """Bring the online store up to the offline tables' last commit (of VIEW, or of every online view)."""
    for name in ("start", "end"):
        options[name] = _time(options[name], f"--{name}") if options[name] else None
    store = _store()
    report = store.materialize(view, progress=not json_wanted, **options)
    values: dict[str, Any] = {"views": [dataclasses.asdict(one) for one in report.views]}
    lines = [str(report)]
    if check:
        from mlfuncs_featurestore.verify import verify

        found = {one.view: verify(store, one.view) for one in report.views}
        values["verified"] = {name: dataclasses.asdict(one) for name, one in found.items()}
        lines += [f"{name}: {one}" for name, one in found.items()]
    emit(values, json_wanted, "\n".join(lines))


@features.command()
@_view
@as_json
def verify(view: str, json_wanted: bool) -> None:
    """Compare what is online for every entity of VIEW with the offline join; fails when they differ."""
    from mlfuncs_featurestore.verify import verify as run

    found = run(_store(), view)
    emit(dataclasses.asdict(found), json_wanted, str(found))
    if not found.is_equal:
        raise SystemExit(1)


@features.command()
@click.option("--since", help="Only vectors served from this ISO time on.")
@as_json
def skew(since: str | None, json_wanted: bool) -> None:
    """Replay sampled served vectors through the offline join; fails when they differ."""
    from mlfuncs_featurestore.skew import check_skew

    found = check_skew(_store(), since=_time(since, "--since") if since else None)
    emit(dataclasses.asdict(found), json_wanted, str(found))
    if not found.is_equal:
        raise SystemExit(1)


@features.command()
@click.argument("wanted", nargs=-1, required=True, metavar="FEATURE...")
@click.option("--entities", required=True, metavar="JSON", help="Columns of keys, e.g. '{\"user_id\": [1, 2]}'.")
@click.option("--full-feature-names", is_flag=True)
@as_json
def get(wanted: tuple[str, ...], entities: str, full_feature_names: bool, json_wanted: bool) -> None:
    """Read online features ("view:feature", a view or a service) of entities."""
    keys = parse_data(entities, "--entities", '{"user_id": [1, 2]}')
    if isinstance(keys, list) and all(isinstance(row, dict) for row in keys):
        names = dict.fromkeys(name for row in keys for name in row)
        keys = {name: [row.get(name) for row in keys] for name in names}
    if not isinstance(keys, dict):
        raise InvalidInput(f"--entities {entities!r} must be an object of columns, like '{{\"user_id\": [1, 2]}}'")
    keys = {name: column if isinstance(column, list) else [column] for name, column in keys.items()}
    found = _store().get_online_features(list(wanted), keys, full_feature_names=full_feature_names)
    columns, statuses = found.to_dict(), found.statuses
    values = {"features": columns, "statuses": statuses}

    def text() -> str:
        rows = [{name: _cell(name, at, columns, statuses) for name in columns} for at in range(len(found))]
        return table(rows, list(columns), "no entities were given")

    emit(values, json_wanted, text)


@features.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=6566, show_default=True, type=click.IntRange(0, 65535))
@click.option("--sample-rate", default=0.0, type=click.FloatRange(0, 1), help="Share of answers kept for `skew`.")
@as_json
def serve(host: str, port: int, sample_rate: float, json_wanted: bool) -> None:
    """Serve online features over HTTP until interrupted."""
    from mlfuncs_featurestore.online_server import serve as run

    emit({"url": f"http://{host}:{port}"}, json_wanted, f"serving on http://{host}:{port} (docs: /docs)")
    run(read_settings(), host, port, sample_rate)


@features.command()
@_view
@click.option("--block-ms", default=0, help="How long to wait for a first entry.")
@click.option("--follow", "-f", is_flag=True, help="Go on until interrupted.")
@as_json
def consume(view: str, block_ms: int, follow: bool, json_wanted: bool) -> None:
    """Push what waits in the view's Redis Stream."""
    from mlfuncs_featurestore.flusher import Flusher
    from mlfuncs_featurestore.stream import StreamReader

    store = _store()
    reader = StreamReader(store, view)
    with Flusher(store) if follow else contextlib.nullcontext():
        while True:
            done = reader.consume(block_ms or (1000 if follow else 0))
            if not follow or done.rows or done.rejected:
                text = f"{view}: {done.rows} rows pushed, {done.rejected} entries set aside"
                emit(dataclasses.asdict(done), json_wanted, text)
            if not follow:
                return


@features.command()
@click.argument("view", required=False)
@as_json
def flush(view: str | None, json_wanted: bool) -> None:
    """Commit pushed rows that wait in this home's log to the offline table (of VIEW, or of every view)."""
    store = _store()
    if view is not None:
        store.catalog.view(view)  # raises NotFound with near names
    done = store.flush(view)
    text = "\n".join(f"{name}: {rows} rows committed" for name, rows in done.items()) or "nothing was pushed here"
    emit({"rows": done}, json_wanted, text)


@features.command(name="list")
@click.argument("text", default="")
@click.option("--tag", default="", help="key or key=value.")
@click.option("--owner", default="")
@as_json
def list_features(text: str, tag: str, owner: str, json_wanted: bool) -> None:
    """List features, or those whose name, view, description or tags contain TEXT."""
    found = _store().catalog.search(text, tag=tag, owner=owner)
    emit(
        {"features": found},
        json_wanted,
        lambda: table(found, ["feature", "type", "kind", "owner", "description"], "none"),
    )


@features.command()
@click.argument("name")
@as_json
def lineage(name: str, json_wanted: bool) -> None:
    """What the view or service NAME comes from, and what uses it: services, functions, endpoints, runs, models."""
    found = _store().catalog.lineage(name)
    lines = [f"{side}: {', '.join(entries) or 'nothing'}" for side, entries in found.items()]
    emit(found, json_wanted, "\n".join(lines))


@features.command()
@as_json
def down(json_wanted: bool) -> None:
    """Stop this home's embedded Redis server; what it holds stays."""
    from mlfuncs_featurestore.redis_embedded import stop_embedded

    stopped = stop_embedded(read_settings())
    emit({"stopped": stopped}, json_wanted, "stopped the Redis server" if stopped else "no Redis server was running")


def _cell(name: str, at: int, columns: dict[str, Any], statuses: dict[str, Any]) -> str:
    if name in statuses and statuses[name][at] != "PRESENT":
        return f"({statuses[name][at]})"
    value = columns[name][at]
    return json.dumps(value, default=str) if isinstance(value, (list, dict, bool)) or value is None else str(value)


def _time(text: str, what: str) -> datetime.datetime:
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise InvalidInput(f"{what} {text!r} is not an ISO time like '2024-05-01T12:00:00Z'") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
