"""What a container reaches of the home it belongs to: other endpoints, online features, and nothing else."""

import json
import textwrap

import pytest

import mlfuncs as ml
from mlfuncs.errors import DeployFailed
from mlfuncs.loading import load_target
from mlfuncs.settings import read_settings
from mlfuncs_runtime.docker.engine import DockerEngine
from mlfuncs_runtime.docker.launch import home_mark
from mlfuncs_runtime.docker.replica import HOME_LABEL
from mlfuncs_runtime.supervisor.places import find_places

pytestmark = pytest.mark.slow
SOURCE = """
    import os
    import mlfuncs as ml

    ONE = ml.Scale(min=1, max=1)

    @ml.function(requirements=[], scale=ONE)
    def double(x: float) -> float:
        return 2 * x

    @ml.function(requirements=[], scale=ONE)
    def ask(x: float, other: str = "double") -> float:
        return 1 + ml.endpoint(other).invoke(x=x)

    @ml.function(requirements=[])
    def look(x: float) -> dict[str, object]:
        with open("/proc/1/environ") as file:  # what the container's description says
            description = file.read()
        return {
            "answer": ml.endpoint("double").invoke(x=x),
            "lent": os.listdir("/run/mlfuncs"),
            "told": [word for word in ("callers-token", "MLFUNCS_TOKEN") if word in description],
        }

    @ml.function(requirements=[], scale=ONE)
    def about() -> str:
        return ",".join(sorted(os.listdir("/run/mlfuncs")))

    # async-timeout: redis wants it below Python 3.11.3, which Debian's own Python in the stand-in image is
    @ml.function(requirements=["async-timeout"], scale=ONE, features=["spend:amount", "halves:half"])
    def score(limit: float, amount: float | None, half: float | None) -> list[float | None]:
        return [limit, amount, half]
"""


@pytest.fixture
def functions(home, tmp_path, monkeypatch, docker_base):
    """The module's functions, in a home that is taken down afterwards."""
    monkeypatch.setenv("MLFUNCS_PORT", "0")
    monkeypatch.setenv("MLFUNCS_BASE_IMAGE", docker_base)
    path = tmp_path / "calling.py"
    path.write_text(textwrap.dedent(SOURCE))
    yield lambda name: load_target(f"{path}:{name}")
    from mlfuncs_runtime.process_target import ProcessTarget

    ProcessTarget(read_settings()).stop()
    from mlfuncs_featurestore.redis_embedded import stop_embedded

    stop_embedded(read_settings())


def test_a_container_calls_another_endpoint_whatever_it_runs_on(functions, monkeypatch):
    monkeypatch.setenv("MLFUNCS_TOKEN", "callers-token")
    functions("double").deploy(target="docker")
    functions("double").deploy(name="here", target="process")
    ask = functions("ask").deploy(target="docker")
    assert ask.invoke(x=4.0) == 9.0
    assert ask.invoke(x=4.0, other="here") == 9.0
    with pytest.raises(ml.MlfuncsError):
        ask.invoke(x=1.0, other="nobody")
    engine = DockerEngine()
    inspected = [
        engine.call("GET", f"/containers/{found['Id']}/json")
        for found in engine.containers({HOME_LABEL: home_mark(read_settings())})
    ]
    assert len(inspected) == 2 and "callers-token" not in json.dumps(inspected)


def test_a_run_in_a_container_calls_an_endpoint_and_tells_nobody_the_token(functions, monkeypatch):
    monkeypatch.setenv("MLFUNCS_TOKEN", "callers-token")
    functions("double").deploy(target="process")
    run = functions("look").run(target="docker", x=4.0)
    assert run.output == {"answer": 8.0, "lent": ["router.sock"], "told": []}
    assert not list(find_places(read_settings()).sockets.glob("run-*"))


def test_a_container_without_features_is_lent_the_router_alone(functions):
    lent = functions("about").deploy(target="docker").invoke()
    assert lent == "router.sock,worker.sock"


def test_a_container_reads_online_features_and_their_code_from_the_homes_own_redis(functions):
    import pandas as pd

    user = ml.Entity("user_id", "int64")
    view = ml.FeatureView(
        "spend", entities=[user], timestamp="event_timestamp", fields={"amount": "float64"}, online=True
    )

    @ml.on_demand(sources=["spend:amount"], fields={"half": "float64"})
    def halves(amount):
        return {"half": amount / 2}

    store = ml.FeatureStore()
    store.apply([view, halves])
    store.push("spend", pd.DataFrame({"user_id": [7], "event_timestamp": [pd.Timestamp.now("UTC")], "amount": [3.0]}))
    score = functions("score").deploy(target="docker")
    assert score.invoke(user_id=7, limit=1.0) == [1.0, 3.0, 1.5]
    assert score.invoke(user_id=8, limit=1.0) == [1.0, None, None]
    from mlfuncs_featurestore.redis_embedded import stop_embedded

    stop_embedded(read_settings())  # as after a crash: the next read starts it again, through the same socket
    assert score.invoke(user_id=7, limit=2.0) == [2.0, 3.0, 1.5]


def test_features_on_a_redis_that_containers_do_not_reach_are_refused(functions, monkeypatch):
    monkeypatch.setenv("MLFUNCS_REDIS_URL", "rediss://someone:hunter2@127.0.0.1:1/0")
    with pytest.raises(DeployFailed, match="set MLFUNCS_REDIS_URL to an address that other machines reach") as failed:
        functions("score").deploy(target="docker")
    assert "hunter2" not in str(failed.value)
