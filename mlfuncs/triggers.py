"""What calls an endpoint besides HTTP, as frozen values that are right once they exist: cron, Redis Streams, Kafka.

    @ml.function(triggers=[ml.Cron("*/5 * * * *", body={"full": False}), ml.RedisStream("orders", group="score")])

They are part of the function's spec, so of a revision: a rollback brings the former triggers back with the code.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from mlfuncs.errors import SpecError

_ALIASES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
_SECRET = re.compile(r"secret:[A-Za-z_][A-Za-z0-9_]*")
_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]+@|[?&]password=")
_KAFKA_SECRET = re.compile(r"password$|\.secret$|^ssl\.key\.pem$")
_KAFKA_OWN = {
    "bootstrap.servers": "write servers=",
    "metadata.broker.list": "write servers=",
    "group.id": "write group=",
    "enable.auto.commit": "offsets are committed once the endpoint has answered",
    "enable.auto.offset.store": "offsets are committed once the endpoint has answered",
}
_SCHEMES = ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster")


def five_fields(schedule: str) -> str:
    """`schedule` as five cron fields.

    >>> five_fields("@hourly")
    '0 * * * *'
    """
    return _ALIASES.get(schedule.strip().lower(), " ".join(schedule.split()))


@dataclass(frozen=True)
class Cron:
    """Calls the endpoint by the clock: five cron fields (or @hourly, @daily, ...) in `time_zone`, with `body` as JSON.

    `overlap` says what a tick does while the call of an earlier one still runs: "skip" (the tick is dropped) or
    "allow". `missed` says what happens to ticks while nothing ran: "latest" (the last one is made up for) or "skip".
    """

    kind: ClassVar[str] = "cron"
    schedule: str
    body: Any = field(default_factory=dict)
    time_zone: str = "UTC"
    overlap: Literal["skip", "allow"] = "skip"
    missed: Literal["latest", "skip"] = "latest"
    max_tries: int = 3

    def __post_init__(self) -> None:
        _require(self.overlap in ("skip", "allow"), f"cron overlap is 'skip' or 'allow', not {self.overlap!r}")
        _require(self.missed in ("latest", "skip"), f"cron missed is 'latest' or 'skip', not {self.missed!r}")
        _check_count("cron max_tries", self.max_tries)
        _check_schedule(self.schedule, self.time_zone)
        try:
            json.dumps(self.body, allow_nan=False)
        except (TypeError, ValueError) as exc:
            raise SpecError(f"the body of cron {self.schedule!r} must be JSON values: {exc}") from exc

    @property
    def label(self) -> str:
        """What people see."""
        return f"cron {self.schedule} {self.time_zone}"


@dataclass(frozen=True)
class RedisStream:
    """Calls the endpoint with each entry of a Redis stream, through a consumer group: at least once, in any order.

    `url` (default: MLFUNCS_REDIS_URL, else the embedded server of the home) is redis://, rediss://, unix://,
    redis+cluster:// or rediss+cluster://, or "secret:NAME"; one with a password in it is refused, because it would be
    in the bundle. After `max_tries` failed calls an entry goes to `<stream>.dead` (in a cluster `{<stream>}.dead`) with
    the reason.
    """

    kind: ClassVar[str] = "redis-stream"
    stream: str
    group: str = "mlfuncs"
    max_tries: int = 5
    url: str | None = None
    max_in_flight: int = 8

    def __post_init__(self) -> None:
        _require(bool(self.stream), "a Redis stream needs a name, like RedisStream('orders')")
        _require(bool(self.group), f"the group of stream {self.stream!r} must not be empty")
        _check_count("max_tries", self.max_tries)
        _check_count("max_in_flight", self.max_in_flight)
        _check_address(self.url)

    @property
    def label(self) -> str:
        """What people see."""
        return f"redis-stream {self.stream} ({self.group})"


@dataclass(frozen=True)
class KafkaTopic:
    """Calls the endpoint with each record of a Kafka topic, as a member of a consumer group: at least once.

    `servers` is "host:port[,host:port]" or "secret:NAME"; `options` are further settings of librdkafka, whose values
    may be "secret:NAME" too. After `max_tries` failed calls a record goes to `<topic>.dead` with the reason.
    """

    kind: ClassVar[str] = "kafka"
    topic: str
    servers: str
    group: str = "mlfuncs"
    max_tries: int = 5
    max_in_flight: int = 8
    options: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(bool(self.topic), "a Kafka topic needs a name, like KafkaTopic('orders', servers='host:9092')")
        _require(bool(self.servers), f"Kafka topic {self.topic!r} needs servers, like servers='host:9092'")
        _require(bool(self.group), f"the group of Kafka topic {self.topic!r} must not be empty")
        _check_count("max_tries", self.max_tries)
        _check_count("max_in_flight", self.max_in_flight)
        object.__setattr__(self, "options", {key: _kafka_value(key, value) for key, value in self.options.items()})

    @property
    def label(self) -> str:
        """What people see."""
        return f"kafka {self.topic} ({self.group})"


Trigger = Cron | RedisStream | KafkaTopic
KINDS: dict[str, type[Cron] | type[RedisStream] | type[KafkaTopic]] = {
    kind.kind: kind for kind in (Cron, RedisStream, KafkaTopic)
}


def trigger_to_dict(trigger: Trigger) -> dict[str, Any]:
    """The trigger as JSON-ready values; `trigger_from_dict` gives an equal one back."""
    return {"kind": trigger.kind, **dataclasses.asdict(trigger)}


def trigger_from_dict(values: Mapping[str, Any]) -> Trigger:
    """The trigger that `trigger_to_dict` wrote. Raises SpecError for an unknown kind or option."""
    options = {key: value for key, value in values.items() if key != "kind"}
    _require(values.get("kind") in KINDS, f"trigger kind {values.get('kind')!r} is not one of {', '.join(KINDS)}")
    try:
        return KINDS[values["kind"]](**options)
    except TypeError as exc:
        raise SpecError(f"trigger {values['kind']!r}: {exc}") from exc


def check_triggers(triggers: Iterable[Any]) -> tuple[Trigger, ...]:
    """`triggers` as a tuple. Raises SpecError for what is none, and for two that are equal."""
    is_list = isinstance(triggers, Iterable) and not isinstance(triggers, str | Mapping)
    _require(is_list, "triggers must be a list, like [ml.Cron('@hourly')]")
    found: list[Trigger] = []
    for trigger in triggers:
        _require(isinstance(trigger, Trigger), f"{trigger!r} is no trigger: use ml.Cron, ml.RedisStream, ml.KafkaTopic")
        _require(trigger not in found, f"trigger {trigger!r} is there twice")
        found.append(trigger)
    return tuple(found)


def _check_schedule(schedule: str, time_zone: str) -> None:
    from datetime import UTC, datetime
    from zoneinfo import ZoneInfo

    from cronsim import CronSim, CronSimError

    try:
        ZoneInfo(time_zone)
    except (KeyError, ValueError, OSError) as exc:
        raise SpecError(f"time zone {time_zone!r} is not known: write one like 'Europe/Berlin' or 'UTC'") from exc
    fields = five_fields(schedule)
    example = "write five fields like '*/5 * * * *', or @hourly"
    _require(len(fields.split()) == 5, f"cron schedule {schedule!r} does not have five fields: {example}")
    try:
        next(CronSim(fields, datetime(2026, 1, 1, tzinfo=UTC)))
    except CronSimError as exc:
        raise SpecError(f"cron schedule {schedule!r} is not valid ({exc}): {example}") from exc
    except StopIteration as exc:
        raise SpecError(f"cron schedule {schedule!r} never comes: no such day exists") from exc


def _check_count(name: str, value: Any) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool) and math.isfinite(value) and value >= 1
    _require(whole, f"{name} must be a whole number of 1 or more, not {value!r}")


def _kafka_value(key: str, value: Any) -> str:
    """An option of librdkafka as text. Raises SpecError for one that is ours to set, and for a secret in plain."""
    _require(key not in _KAFKA_OWN, f"Kafka option {key!r} is not yours to set: {_KAFKA_OWN.get(key)}")
    _require(isinstance(value, str | int | float), f"Kafka option {key!r} must be text or a number, not {value!r}")
    text = str(value).lower() if isinstance(value, bool) else str(value)
    is_safe = not _KAFKA_SECRET.search(key) or bool(_SECRET.fullmatch(text))
    _require(is_safe, f"Kafka option {key!r} holds a secret: write 'secret:NAME', and set the secret NAME")
    return text


def _check_address(url: str | None) -> None:
    if url is None or _SECRET.fullmatch(url):
        return
    known = url.partition("://")[0] in _SCHEMES and "://" in url
    schemes = ", ".join(_SCHEMES)
    _require(known, f"url must be like 'redis://host:6379/0' or 'secret:NAME', with one of the schemes {schemes}")
    _require(not _PASSWORD.search(url), "the url has a password in it: put it in a secret and write url='secret:NAME'")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise SpecError(message)
