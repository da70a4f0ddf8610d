"""Messages from a Kafka topic by a consumer group, with librdkafka (the extra `kafka`).

Offsets are committed by hand, and only up to the first record of a partition that is not settled, so that a process
that dies loses nothing: what it had in flight, and what was settled after a record that was not, comes again. Kafka
does not count deliveries: after a crash the tries of a record begin at one.
"""

from __future__ import annotations

import contextlib
import heapq
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlfuncs.errors import MissingExtra, SpecError, Unavailable
from mlfuncs.triggers import KafkaTopic
from mlfuncs_runtime.triggers.pump import Message

_FLUSH_S = 10.0
_LOOK_EVERY_S = 5.0  # how often it is asked how much waits
Partition = tuple[str, int]


class Offsets:
    """Which offset of a partition may be committed; pure.

    >>> offsets = Offsets()
    >>> offsets.taken(3), offsets.taken(4)
    (None, None)
    >>> offsets.done(4), offsets.done(3)
    (None, 5)
    """

    def __init__(self) -> None:
        self._open: list[int] = []
        self._done: set[int] = set()

    def taken(self, offset: int) -> None:
        """A record was handed out."""
        heapq.heappush(self._open, offset)

    def done(self, offset: int) -> int | None:
        """A record is settled: the offset to commit (that of the next record to read), or None when none moved."""
        self._done.add(offset)
        commit = None
        while self._open and self._open[0] in self._done:
            first = heapq.heappop(self._open)
            self._done.discard(first)
            commit = first + 1
        return commit


class KafkaSource:
    """A `Source` over one topic and group. `options` are librdkafka's, secrets put in."""

    def __init__(self, spec: KafkaTopic, servers: str, options: Mapping[str, str]) -> None:
        try:
            import confluent_kafka as kafka
        except ModuleNotFoundError as exc:
            raise MissingExtra("a Kafka topic as trigger", "kafka") from exc
        self._kafka, self._spec = kafka, spec
        base = {**options, "bootstrap.servers": servers}
        own = {"group.id": spec.group, "enable.auto.commit": False, "enable.auto.offset.store": False}
        try:
            self._consumer = kafka.Consumer({"auto.offset.reset": "earliest", **base, **own})
            self._producer = kafka.Producer({**base, "enable.idempotence": True})
        except (kafka.KafkaException, ValueError, TypeError) as exc:
            raise SpecError(f"Kafka topic {spec.topic!r}: the options are not valid ({exc})") from exc
        self._offsets: dict[Partition, Offsets] = {}
        self._due: dict[Partition, int] = {}  # offsets to commit
        codes = kafka.KafkaError
        self._moving = (codes.REBALANCE_IN_PROGRESS, codes.ILLEGAL_GENERATION, codes.UNKNOWN_MEMBER_ID)
        self._paused = False
        self.waiting: int | None = None
        self._look_next_s = 0.0
        self._consumer.subscribe([spec.topic], on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._lost)

    def receive(self, limit: int, wait_s: float) -> Sequence[Message]:
        """Records as they come; with no room the partitions are paused, and the group still hears of us."""
        with self._talking():
            self._commit()
            self._pause(limit < 1)
            self._look()
            deadline_s = time.monotonic() + wait_s
            found: list[Message] = []
            while len(found) < max(1, limit):
                record = self._consumer.poll(0.0 if found else max(0.0, deadline_s - time.monotonic()))
                if record is None:
                    break
                if record.error():
                    raise Unavailable(f"Kafka topic {self._spec.topic!r} cannot be read: {record.error()}")
                found.append(self._message(record))
            return found

    def settle(self, message: Message) -> None:
        """Commit as far as everything before is settled; of a partition that went to another, nothing."""
        partition, offset = _place(message)
        offsets = self._offsets.get(partition)
        commit = offsets.done(offset) if offsets else None
        if commit is not None:
            self._due[partition] = commit
        with self._talking():
            self._commit()

    def bury(self, message: Message, reason: str) -> None:
        """Produce it to `<topic>.dead`, and settle it when the brokers have it."""
        record = message.raw
        headers = [*(record.headers() or []), ("mlfuncs-id", message.id.encode())]
        headers += [("mlfuncs-reason", reason[:2000].encode()), ("mlfuncs-tries", str(message.tries).encode())]
        failed: list[Any] = []
        with self._talking():
            self._producer.produce(
                f"{self._spec.topic}.dead",
                record.value(),
                record.key(),
                headers=headers,
                on_delivery=lambda error, _record: failed.append(error) if error else None,
            )
            left = self._producer.flush(_FLUSH_S)
        if left or failed:
            raise Unavailable(f"Kafka topic '{self._spec.topic}.dead' cannot be written: {failed or 'no answer'}")
        self.settle(message)

    def retried(self, message: Message) -> None:
        """Nothing: Kafka does not count tries."""

    def keep(self, messages: Sequence[Message]) -> None:
        """Nothing: `receive` is what tells the group that we live."""

    def close(self) -> None:
        """Leave the group."""
        with self._talking():
            self._consumer.close()

    def _message(self, record: Any) -> Message:
        partition = (record.topic(), record.partition())
        self._offsets.setdefault(partition, Offsets()).taken(record.offset())
        return Message(f"{partition[0]}-{partition[1]}-{record.offset()}", record.value() or b"null", 1, record)

    def _look(self) -> None:
        """See how much waits in our partitions, from what the last fetches told; no request of its own."""
        if time.monotonic() < self._look_next_s:
            return
        self._look_next_s = time.monotonic() + _LOOK_EVERY_S
        known = []
        for place in self._consumer.position(self._consumer.assignment()):
            _, high = self._consumer.get_watermark_offsets(place, cached=True)
            if place.offset >= 0 <= high:
                known.append(max(0, high - place.offset))
        self.waiting = sum(known) if known else None

    def _pause(self, wanted: bool) -> None:
        if wanted != self._paused:
            partitions = self._consumer.assignment()
            (self._consumer.pause if wanted else self._consumer.resume)(partitions)
            self._paused = wanted

    def _commit(self) -> None:
        """Commit what is due; while the group shares the partitions out anew it stays due."""
        if not self._due:
            return
        places = [self._kafka.TopicPartition(*partition, offset) for partition, offset in self._due.items()]
        try:
            self._consumer.commit(offsets=places, asynchronous=False)
        except self._kafka.KafkaException as exc:
            if exc.args[0].code() not in self._moving:
                raise
        else:
            self._due.clear()

    def _assigned(self, _consumer: Any, _partitions: Sequence[Any]) -> None:
        self._paused = False

    def _revoked(self, consumer: Any, partitions: Sequence[Any]) -> None:
        """The last moment to commit; what that does not reach, the next owner is handed once more."""
        with contextlib.suppress(self._kafka.KafkaException):
            self._commit()
        self._lost(consumer, partitions)

    def _lost(self, _consumer: Any, partitions: Sequence[Any]) -> None:
        for partition in partitions:
            self._offsets.pop((partition.topic, partition.partition), None)
            self._due.pop((partition.topic, partition.partition), None)

    @contextlib.contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except (self._kafka.KafkaException, BufferError) as exc:
            raise Unavailable(f"Kafka topic {self._spec.topic!r} cannot be used: {exc}") from exc


def _place(message: Message) -> tuple[Partition, int]:
    record = message.raw
    return (record.topic(), record.partition()), record.offset()
