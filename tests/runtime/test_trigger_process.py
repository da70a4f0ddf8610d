"""Triggers as they really run: supervisor, trigger process, router, worker, and a real redis-server."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import mlfuncs as ml
from mlfuncs.serving.endpoints import endpoint
from mlfuncs.settings import read_settings
from mlfuncs_runtime.process_target import ProcessTarget
from mlfuncs_runtime.supervisor.places import find_places, read_json, write_json
from mlfuncs_runtime.supervisor.triggers import process_path
from tests.ports import free_port

redis = pytest.importorskip("redis")


def wait_until(holds: Callable[[], Any], what: str, timeout_s: float = 60) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := holds()):
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.05)
    return found


@pytest.fixture
def live(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MLFUNCS_PORT", "0")
    yield home
    ProcessTarget(read_settings()).stop()


@pytest.fixture
def redis_url(tmp_path: Path, require: Callable[[str, object], None]) -> Iterator[str]:
    server = shutil.which("redis-server")
    require("redis-server", server)
    port = free_port()
    command = [str(server), "--dir", str(tmp_path), "--save", "", "--bind", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    client = redis.Redis(port=port)

    def answers() -> bool:
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False

    try:
        wait_until(answers, "redis-server")
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait(60)


def trigger_pid() -> int | None:
    known = read_json(process_path(find_places(read_settings())))
    return known and int(known["process"]["pid"])


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def status() -> list[dict[str, Any]]:
    return [dict(trigger) for trigger in endpoint("score").status().triggers]


def metrics(url: str) -> dict[str, float]:
    """The samples of mlfuncs_trigger_* of the home's only trigger; promtool has found nothing wrong with any."""
    with urllib.request.urlopen(f"{url.rpartition('/')[0]}/-/metrics", timeout=60) as answer:
        text = answer.read().decode()
    subprocess.run(["promtool", "check", "metrics"], input=text, text=True, check=True, capture_output=True)
    found = re.findall(r"^mlfuncs_trigger_(\w+)\{.*\} (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def run_command(*arguments: str) -> str:
    command = [sys.executable, "-m", "mlfuncs", *arguments]
    return subprocess.run(command, text=True, check=True, capture_output=True, timeout=120).stdout


def test_a_killed_trigger_process_loses_no_message_and_poison_goes_aside(
    live: Path, redis_url: str, require: Callable[[str, object], None]
) -> None:
    out = str(live.parent / "out.txt")

    def score(number: int, hold: str = "") -> int:
        import os
        import time

        with open(out, "a") as file:
            file.write(f"begin {number}\n")
        while hold and not os.path.exists(hold):
            time.sleep(0.05)
        if number < 0:
            raise ValueError("poison")
        with open(out, "a") as file:
            file.write(f"end {number}\n")
        return number

    triggers = [ml.RedisStream("orders", group="score", max_tries=2, url=redis_url, max_in_flight=4)]
    place = ml.function(name="score", triggers=triggers)(score).deploy(scale=ml.Scale(min=1, concurrency=4))
    place.create_token()  # the trigger process is let in all the same
    client = redis.Redis.from_url(redis_url)
    client.xadd("orders", {"number": 0, "hold": f"{out}.go"})
    wait_until(lambda: "begin 0" in lines(Path(out)), "the first call")
    first = trigger_pid()
    assert first is not None
    os.kill(first, signal.SIGKILL)
    Path(f"{out}.go").touch()
    for number in range(1, 41):
        client.xadd("orders", {"number": number} if number % 2 else {"body": json.dumps({"number": number})})
    client.xadd("orders", {"number": -1})
    client.xadd("orders", {"number": "no number"})
    wait_until(lambda: {f"end {n}" for n in range(41)} <= set(lines(Path(out))), "all messages")
    wait_until(lambda: client.xlen("orders.dead") == 2, "the dead letters")
    wait_until(lambda: client.xpending("orders", "score")["pending"] == 0, "everything to be acknowledged")
    assert lines(Path(out)).count("begin 0") == 2  # in the middle of the call when the process was killed
    assert lines(Path(out)).count("begin -1") == 2  # max_tries
    reasons = {entry[b"number"]: entry[b"mlfuncs-reason"].decode() for _, entry in client.xrange("orders.dead")}
    assert reasons[b"-1"].startswith("HandlerFailed") and reasons[b"no number"].startswith("InvalidInput")
    told = wait_until(lambda: [t for t in status() if t.get("buried") == 2], "the status")[0]
    assert told["kind"] == "redis-stream" and told["state"] == "running" and trigger_pid() != first
    require("promtool", shutil.which("promtool"))
    told = wait_until(lambda: [t for t in status() if t["in_flight"] == 0], "nothing to be in flight")[0]
    samples = wait_until(lambda: (m := metrics(place.url)) and not m["in_flight_messages"] and m, "the metrics")
    assert samples["up"] == 1.0 and samples["dead_lettered_total"] == 2.0
    assert samples["delivered_total"] == told["served"] >= 40 and samples["failed_calls_total"] >= 3.0
    assert samples["retries_total"] == told["retried"] >= 1
    assert abs(samples["last_delivery_timestamp_seconds"] - time.time()) < 300
    wait_until(lambda: metrics(place.url).get("waiting_messages") == 0.0, "the lag, which is looked at now and then")
    shown = run_command("status")
    assert "score < redis-stream orders (score): running" in shown and "0 waiting, 0 in flight, 2 put aside" in shown
    assert run_command("down").startswith("stopped")
    assert "none until 'mlfuncs up'" in run_command("ls")  # port 0: which comes next is not known
    (row,) = json.loads(run_command("status", "--json"))["endpoints"]
    assert row["state"] == "stopped" and row["url"] == "" and "mlfuncs up" in row["message"]


def test_cron_fires_a_missed_tick_once_and_down_ends_the_process(live: Path) -> None:
    out = str(live.parent / "ticks.txt")

    def score(note: str) -> None:
        with open(out, "a") as file:
            file.write(note + "\n")

    cron = ml.Cron("0 0 1 1 *", body={"note": "tick"})
    ml.function(name="score", triggers=[cron])(score).deploy()
    places = find_places(read_settings())
    memory = places.run / "cron.json"
    wait_until(lambda: read_json(memory), "the trigger process to remember")
    assert lines(Path(out)) == []  # seen for the first time: nothing to make up for
    pid = trigger_pid()
    assert pid is not None and is_running(pid)
    supervisor = ProcessTarget(read_settings()).overview()["supervisor"]["pid"]
    os.kill(supervisor, signal.SIGKILL)
    wait_until(lambda: not is_running(supervisor), "the supervisor to be gone")
    ProcessTarget(read_settings()).start()
    wait_until(lambda: [t for t in status() if t["state"] == "waiting"], "the next supervisor to take over")
    assert trigger_pid() == pid and is_running(pid)  # it went on
    ProcessTarget(read_settings()).stop()
    assert not is_running(pid)
    (key,) = read_json(memory)
    long_ago = (datetime.now(UTC) - timedelta(days=800)).isoformat()
    write_json(memory, {key: {"until": long_ago, "fired": None}})
    ProcessTarget(read_settings()).start()
    wait_until(lambda: lines(Path(out)) == ["tick"], "the missed tick")
    again = wait_until(trigger_pid, "the trigger process")
    os.kill(again, signal.SIGKILL)
    wait_until(lambda: (trigger_pid() or again) != again, "another trigger process")
    wait_until(lambda: [t for t in status() if t["state"] == "waiting" and t["fired"]], "the status")
    assert lines(Path(out)) == ["tick"]  # exactly once over restarts
    endpoint("score").delete()
    last = trigger_pid()
    wait_until(lambda: last is None or not is_running(last), "the process to end when nothing has triggers")


def test_records_of_a_kafka_topic_reach_the_endpoint_and_poison_goes_aside(live: Path) -> None:
    """The client is librdkafka as it is; the brokers are its own mock cluster, over TCP."""
    kafka = pytest.importorskip("confluent_kafka")
    out = str(live.parent / "out.txt")

    def score(number: int) -> None:
        if number < 0:
            raise ValueError("poison")
        with open(out, "a") as file:
            file.write(f"{number}\n")

    producer = kafka.Producer({"bootstrap.servers": "mock", "test.mock.num.brokers": 1, "log_level": 0})
    servers = ",".join(f"{one.host}:{one.port}" for one in producer.list_topics(timeout=60).brokers.values())

    def send(numbers: Iterable[int]) -> None:
        for number in numbers:
            producer.produce("clicks", json.dumps({"number": number}), key=str(number))
        assert producer.flush(10) == 0

    send(range(-1, 10))
    quick = {"heartbeat.interval.ms": 200, "session.timeout.ms": 6000}
    topic = ml.KafkaTopic("clicks", servers=servers, group="score", max_tries=2, options=quick)
    place = ml.function(name="score", triggers=[topic])(score).deploy()
    wait_until(lambda: {*lines(Path(out))} == {str(n) for n in range(10)}, "all records")
    wait_until(
        lambda: [t for t in status() if t.get("buried") == 1 and not t["in_flight"]], "the poison to be put aside"
    )
    assert metrics(place.url)["delivered_total"] == 10.0
    killed = trigger_pid()
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    send(range(10, 15))
    wait_until(lambda: {*lines(Path(out))} == {str(n) for n in range(15)}, "the records after the crash")
    assert len(lines(Path(out))) == 15  # what was committed did not come again
