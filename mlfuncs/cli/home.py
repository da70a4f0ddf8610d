"""Commands on the home as a whole: up, down, status."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import click

from mlfuncs.cli.output import as_json, emit, table
from mlfuncs.settings import read_settings

_COLUMNS = ("name", "state", "revision", "traffic", "replicas", "queued", "rps", "p50 ms", "p99 ms", "panic", "message")
_SELDOM = ("queued", "rps", "p50 ms", "p99 ms", "panic", "message")  # left out while no endpoint has any


@click.command()
@as_json
def up(json_wanted: bool) -> None:
    """Start the supervisor, the router and the endpoints of this home; harmless when they run already."""
    answer = _target().start()
    emit(answer, json_wanted, f"supervisor {answer['pid']} serves at {answer['url']}")


@click.command()
@as_json
def down(json_wanted: bool) -> None:
    """Stop everything of this home. The registry, runs and logs stay; `up` brings the endpoints back."""
    stopped = [*_target().stop(), *_stop_redis()]
    emit({"stopped": stopped}, json_wanted, f"stopped {len(stopped)} processes" if stopped else "nothing was running")


@click.command()
@click.option("--watch", is_flag=True, help="Keep it on the screen, renewed every second; into a pipe, print changes.")
@as_json
def status(watch: bool, json_wanted: bool) -> None:
    """Show what runs: the endpoints, their workers and their load."""
    if watch:
        _follow(json_wanted) if json_wanted or not sys.stdout.isatty() else _watch()
        return
    values = _overview()
    emit(values, json_wanted, lambda: _text(values))


def _stop_redis() -> list[int]:
    """Stop the home's embedded Redis server, where one was started, and give its id; what it holds stays."""
    from mlfuncs import adapters

    settings = read_settings()
    noted = settings.home / "redis" / "redis.pid"
    pid = int(noted.read_text() or 0) if noted.exists() else 0
    return [pid] if pid and adapters.load("features:stop")(settings) else []


def _target() -> Any:
    """The process target of this home, which alone has a supervisor to start and stop."""
    from mlfuncs import adapters

    return adapters.load("target:process")(read_settings())


def _overview() -> dict[str, Any]:
    """What the supervisor tells, and the registry's endpoints that nothing serves now."""
    settings = read_settings()
    values = _target().overview()
    if settings.registry_url or (settings.home / "registry.db").exists():
        from mlfuncs.registry import open_registry, site_id
        from mlfuncs.serving.targets import open_target

        known = {endpoint["name"] for endpoint in values["endpoints"]}
        for row in open_registry(settings).endpoints.list():
            if row.name in known:
                continue
            if row.target == "process":
                values["endpoints"].append(_stopped(row, row.site == site_id(settings)))
            else:
                values["endpoints"].append(open_target(row.target, settings).status(row).to_dict())
    values["endpoints"].sort(key=lambda endpoint: endpoint["name"])
    return values


def _stopped(row: Any, here: bool) -> dict[str, Any]:
    from mlfuncs.serving.rollouts import serving_revision
    from mlfuncs.serving.targets import EndpointStatus, router_url

    message = "the supervisor does not run: mlfuncs up" if here else f"served from another home (site {row.site})"
    traffic = row.desired.get("traffic") or {}
    names = tuple(revision.revision for revision in row.revisions)
    address = router_url(read_settings())
    url = (
        f"{address}/{row.name}" if here and not address.endswith(":0") else ""
    )  # with port 0 the next one is not known
    revision = serving_revision(traffic, names[-1] if names else "")
    return EndpointStatus(row.name, url, revision, "stopped", message, traffic, (), names, {}, row.project).to_dict()


def _text(values: dict[str, Any]) -> str:
    supervisor, router = values["supervisor"], values["router"]
    head = f"supervisor {supervisor['pid']}, router {router['pid']} at {router['url']}" if supervisor else "not running"
    rows = [_row(endpoint) for endpoint in values["endpoints"]]
    parts = [head, table(rows, _columns(rows), "no endpoints: deploy one with mlfuncs deploy FILE:NAME")]
    return "\n".join([*parts, *_triggers(values)])


def _triggers(values: dict[str, Any]) -> list[str]:
    """A line for each trigger of each endpoint."""
    return [
        f"{endpoint['name']} < {trigger['label']}: {_trigger(trigger)}"
        for endpoint in values["endpoints"]
        for trigger in endpoint.get("triggers") or ()
    ]


def _trigger(status: dict[str, Any]) -> str:
    said = [status["state"], f"{status.get('served', 0)} served"]
    for key, word in (
        ("waiting", "waiting"),
        ("in_flight", "in flight"),
        ("buried", "put aside"),
        ("given_up", "failed"),
    ):
        if status.get(key) is not None:
            said.append(f"{status[key]} {word}")
    if status.get("next"):
        said.append(f"next {status['next']}")
    error = (status.get("last_error") or "").partition("\n")[0]
    return ", ".join(said) + (f"; last error: {error[:200]}" if error else "")


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    """The columns that say something: a terminal is narrow."""
    return [name for name in _COLUMNS if name not in _SELDOM or any(row[name] not in ("", None) for row in rows)]


def _row(endpoint: dict[str, Any]) -> dict[str, Any]:
    load = endpoint.get("load") or {}
    return {
        "name": endpoint["name"],
        "state": endpoint["state"],
        "revision": endpoint["revision"],
        "traffic": " ".join(f"{revision}={share}" for revision, share in endpoint["traffic"].items()),
        "replicas": _replicas(endpoint),
        "queued": load.get("queued"),
        "rps": _rounded(load.get("rps")),
        "p50 ms": _rounded(load.get("p50_ms")),
        "p99 ms": _rounded(load.get("p99_ms")),
        "panic": "yes" if load.get("panicking") else "",
        "message": (endpoint["message"].splitlines() or [""])[0],
    }


def _replicas(endpoint: Mapping[str, Any]) -> str:
    """Ready replicas of those wished for, and what else there is.

    >>> draining = {"revision": "rev-1", "state": "draining"}
    >>> _replicas({"traffic": {"rev-1": 100}, "replicas": [draining], "load": {"desired": 1}})
    '0/1 (+1 draining)'
    """
    words = {"stopping": "draining", "parked": "spare"}
    states = [
        words.get(replica["state"], replica["state"]) if replica["revision"] in endpoint["traffic"] else "no traffic"
        for replica in endpoint["replicas"]
    ]
    counts = Counter(states)
    ready = counts.pop("ready", 0)
    desired = (endpoint.get("load") or {}).get("desired", len(endpoint["replicas"]))
    counts["draining"] += max(0, ready - desired)  # no longer wished for, and about to be told
    others = ", ".join(f"+{count} {word}" for word, count in sorted(counts.items()) if count)
    return f"{min(ready, desired)}/{desired}" + (f" ({others})" if others else "")


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def _follow(json_wanted: bool) -> None:
    """Print what `status` prints, each time it changed: for a pipe, a file, or a program that reads JSON."""
    shown = None
    while True:
        values = _overview()
        if values != shown:
            emit(values, json_wanted, f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {_text(values)}\n")
            sys.stdout.flush()
        shown = values
        time.sleep(1.0)


def _watch() -> None:
    """Draw the live picture, renewed every second."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    from mlfuncs.display import rich_table

    def picture() -> Group:
        values = _overview()
        supervisor, router = values["supervisor"], values["router"]
        head = f"router {router['url']}  supervisor {supervisor['pid']}" if supervisor else "not running: mlfuncs up"
        rows = [_row(endpoint) for endpoint in values["endpoints"]]
        endpoints = rich_table(rows, _columns(rows))
        replicas = [
            {"endpoint": endpoint["name"], "revision": r["revision"], "replica": r["id"], "pid": r["pid"]}
            | {"state": r["state"]}
            for endpoint in values["endpoints"]
            for r in endpoint["replicas"]
        ]
        workers = rich_table(replicas, ("endpoint", "revision", "replica", "pid", "state"))
        return Group(Text(head), endpoints, workers, *(Text(line) for line in _triggers(values)))

    with Live(picture(), console=Console(), screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(1.0)
            live.update(picture(), refresh=True)
