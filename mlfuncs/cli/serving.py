"""Commands on one endpoint: invoke, traffic, promote, rollback, mirror, tag, token, delete."""

from __future__ import annotations

import json
from typing import Any

import click

from mlfuncs.cli.output import as_json, emit, parse_data
from mlfuncs.errors import SpecError

_name = click.argument("name")


@click.command()
@_name
@click.option("--data", default="{}", metavar="JSON", help="The arguments as a JSON object; @FILE, or - for stdin.")
@click.option("--token", default="", help="A bearer token (default: MLFUNCS_TOKEN).")
@click.option("--timeout-s", type=float, help="How long to wait for the answer.")
@as_json
def invoke(name: str, data: str, token: str, timeout_s: float | None, json_wanted: bool) -> None:
    """Call an endpoint and print its answer."""
    from mlfuncs.serving.endpoints import endpoint

    found = endpoint(name, token=token)
    answer = found.invoke_json(parse_data(data), timeout_s=timeout_s)
    emit(answer, json_wanted, lambda: json.dumps(answer, default=str))


@click.command()
@_name
@click.argument("shares", nargs=-1, required=True, metavar="REVISION=SHARE...")
@as_json
def traffic(name: str, shares: tuple[str, ...], json_wanted: bool) -> None:
    """Split an endpoint's requests between revisions by relative shares, e.g. rev-1=90 rev-2=10."""
    from mlfuncs.serving.endpoints import endpoint

    wanted = {}
    for pair in shares:
        revision, sign, share = pair.partition("=")
        if not sign or not share.isdecimal():
            raise SpecError(f"{pair!r} is not of the form REVISION=SHARE, e.g. rev-2=10")
        wanted[revision] = int(share)
    endpoint(name).traffic(wanted)
    _say(name, json_wanted)


@click.command()
@_name
@click.argument("revision", required=False)
@as_json
def promote(name: str, revision: str | None, json_wanted: bool) -> None:
    """Give all requests to REVISION (default: the latest)."""
    from mlfuncs.serving.endpoints import endpoint

    endpoint(name).promote(revision)
    _say(name, json_wanted)


@click.command()
@_name
@as_json
def rollback(name: str, json_wanted: bool) -> None:
    """Give all requests back to the revision that had them all before the last change, or before a canary's splits."""
    from mlfuncs.serving.endpoints import endpoint

    endpoint(name).rollback()
    _say(name, json_wanted)


@click.command()
@_name
@click.argument("revision")
@click.argument("percent", type=int, default=100)
@as_json
def mirror(name: str, revision: str, percent: int, json_wanted: bool) -> None:
    """Copy PERCENT of the requests to REVISION, whose answers nobody sees; 0 ends it."""
    from mlfuncs.serving.endpoints import endpoint

    endpoint(name).mirror(revision, percent)
    _say(name, json_wanted)


@click.command()
@_name
@click.argument("tag")
@click.argument("revision", required=False)
@click.option("--remove", is_flag=True, help="Take the tag away.")
@as_json
def tag(name: str, tag: str, revision: str | None, remove: bool, json_wanted: bool) -> None:
    """Let REVISION answer alone at an address of its own, /NAME--TAG."""
    from mlfuncs.serving.endpoints import endpoint

    if bool(revision) == remove:
        raise SpecError("give a REVISION for the tag, or --remove")
    url = endpoint(name).tag(tag, revision)
    emit({"name": name, "tag": tag, "url": url}, json_wanted, "tag removed" if remove else url)


@click.command()
@_name
@click.option("--revoke", metavar="TOKEN", help="Refuse this token from now on ('oldest' for the older one).")
@as_json
def token(name: str, revoke: str | None, json_wanted: bool) -> None:
    """Create a token that callers of the endpoint must send, or revoke one. At most two are valid at once."""
    from mlfuncs.serving.endpoints import endpoint

    if revoke:
        endpoint(name).revoke_token(None if revoke == "oldest" else revoke)
        emit({"name": name, "revoked": True}, json_wanted, "revoked")
        return
    created = endpoint(name).create_token()
    emit({"name": name, "token": created}, json_wanted, f"{created}\n(shown only now; send it as a bearer token)")


@click.command()
@_name
@as_json
def delete(name: str, json_wanted: bool) -> None:
    """Take an endpoint away; requests in flight are answered first."""
    from mlfuncs.serving.endpoints import endpoint

    endpoint(name).delete()
    emit({"name": name, "deleted": True}, json_wanted, f"{name} is deleted")


def _say(name: str, json_wanted: bool) -> None:
    """Print the endpoint's traffic as it is now."""
    from mlfuncs.serving.endpoints import endpoint

    status: Any = endpoint(name).status()
    values = {key: status.to_dict()[key] for key in ("name", "url", "revision", "traffic")}
    shares = " ".join(f"{revision}={share}" for revision, share in status.traffic.items())
    emit(values, json_wanted, f"{name}: {shares}")
