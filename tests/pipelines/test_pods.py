"""Steps as pods run them: `python -m mlfuncs_pipelines.step` in a process of its own, each with a home of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sklearn.linear_model import LogisticRegression

import mlfuncs as ml
from mlfuncs.errors import SpecError
from mlfuncs.settings import read_settings
from mlfuncs_pipelines.function_component import pod_environment
from mlfuncs_pipelines.kubeflow import publish

sys.path.append(str(Path(__file__).parent))
from kubeflow_api import Api

BIG = os.urandom(80_000)


@ml.function
def train(c: float) -> LogisticRegression:
    return LogisticRegression(C=c).fit([[0.0], [1.0]], [0, 1])


@ml.function
def strength(model: LogisticRegression) -> float:
    return float(model.C)


@ml.function
def large(x: int) -> int:
    return x + len(BIG)


@ml.pipeline(name="two-pods")
def two_pods(c: float = 2.0):
    return strength(train(c).output)


@ml.pipeline(name="one-large")
def one_large(x: int):
    return large(x)


@ml.function
def nothing() -> str | None:
    return None


@ml.function
def told(x: str | None = "the default") -> str:
    return repr(x)


@ml.pipeline(name="nones")
def nones():
    told(nothing().output)


class Pod:
    """The container of one step of a compiled pipeline, in a fresh home."""

    def __init__(self, pipeline: Any, step: str, home: Path, **environ: str) -> None:
        spec = pipeline.ir.executors[f"exec-{step}"]["container"]
        self.words = [*spec["command"], *spec["args"]]
        given = {item["name"]: item["value"] for item in spec["env"]} | {"MLFUNCS_HOME": str(home)} | environ
        plain = {name: value for name, value in os.environ.items() if not name.startswith("MLFUNCS_")}
        self.environ = {**plain, **given}

    def run(self, executor_input: dict) -> subprocess.CompletedProcess[str]:
        words = [json.dumps(executor_input) if word == "{{$}}" else word for word in self.words]
        return subprocess.run(
            [sys.executable, *words[1:]], env=self.environ, capture_output=True, text=True, timeout=120
        )


def _train_then_use(tmp_path: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    model = {"name": "Output", "type": {"schemaTitle": "system.Model"}, "uri": str(tmp_path / "model"), "metadata": {}}
    outputs = {"artifacts": {"Output": {"artifacts": [model]}}, "outputFile": str(tmp_path / "train.json")}
    trained = Pod(two_pods, "train", tmp_path / "pod-1", **environ).run(
        {"inputs": {"parameterValues": {"c": 3.0}}, "outputs": outputs}
    )
    assert trained.returncode == 0, trained.stderr
    made = json.loads((tmp_path / "train.json").read_text())["artifacts"]["Output"]
    used = {"parameters": {"Output": {"outputFile": str(tmp_path / "o")}}, "outputFile": str(tmp_path / "use.json")}
    return Pod(two_pods, "strength", tmp_path / "pod-2").run(
        {"inputs": {"artifacts": {"model": made}}, "outputs": used}
    )


def test_a_model_passes_between_pods_that_sign_with_the_projects_key(tmp_path: Path) -> None:
    two_pods.compile(tmp_path / "p.yaml")
    key = (read_settings().home / "keys" / "test.pem").read_text()
    used = _train_then_use(tmp_path, MLFUNCS_SIGNING_KEY=key)
    assert used.returncode == 0, used.stderr
    assert json.loads((tmp_path / "use.json").read_text())["parameterValues"] == {"Output": 3.0}


def test_a_model_signed_by_a_pods_own_key_is_not_loaded_and_the_mend_is_said(tmp_path: Path) -> None:
    used = _train_then_use(tmp_path)
    assert used.returncode != 0 and "not trusted here" in used.stderr and "docs/pipelines.md" in used.stderr


def test_the_key_comes_from_a_secret_by_reference_and_only_where_something_may_be_pickled(tmp_path: Path) -> None:
    ir = two_pods.ir
    (secret,) = ir.executor_platform("exec-train")["secretAsEnv"]
    assert secret["optional"] is True and "mlfuncs-signing-test" in json.dumps(secret)
    assert secret["keyToEnv"] == [{"secretKey": "signing.pem", "envVar": "MLFUNCS_SIGNING_KEY"}]
    assert "secretAsEnv" not in ir.executor_platform("exec-strength")
    key = (read_settings().home / "keys" / "test.pem").read_text()
    assert key.splitlines()[1] not in two_pods.compile(tmp_path / "p.yaml").read_text()
    assert two_pods.run().output == 2.0  # here the secret need not be


@pytest.mark.parametrize("send", [one_large.submit, lambda **p: one_large.schedule("0 5 * * *", **p)])
def test_code_that_pods_could_not_fetch_is_refused_before_anything_is_sent(api: Api, send: Any) -> None:
    with pytest.raises(SpecError, match=r"code of large is too large.*MLFUNCS_ARTIFACTS_URL"):
        send(x=1)
    assert not [path for method, path, _ in api.requests if method == "POST" and "experiments" not in path]


def test_code_of_any_size_is_pushed_to_where_pods_fetch_it(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_large.compile(tmp_path / "p.yaml")  # stored here, before there was a shared place
    monkeypatch.setenv("MLFUNCS_ARTIFACTS_URL", f"file://{tmp_path}/bucket")
    assert one_large.submit(x=1).id == "r-1"
    assert publish(one_large) == "p-1"  # its parameter is given later
    outputs = {"parameters": {"Output": {"outputFile": str(tmp_path / "o")}}, "outputFile": str(tmp_path / "out.json")}
    done = Pod(one_large, "large", tmp_path / "pod").run({"inputs": {"parameterValues": {"x": 1}}, "outputs": outputs})
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["parameterValues"] == {"Output": 80_001}
    assert "MLFUNCS_ARTIFACTS_URL" in pod_environment(read_settings())


def test_a_pod_whose_function_returns_none_leaves_null_and_the_next_one_takes_its_default(tmp_path: Path) -> None:
    """Kubeflow's launcher fails a step that leaves one of its output parameters out."""
    outputs = {"parameters": {"Output": {"outputFile": str(tmp_path / "o")}}, "outputFile": str(tmp_path / "out.json")}
    for step, given, expected in (("nothing", {}, None), ("told", {"x": None}, "'the default'")):
        executor_input = {"inputs": {"parameterValues": given}, "outputs": outputs}
        done = Pod(nones, step, tmp_path / step).run(executor_input)
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / "out.json").read_text())["parameterValues"] == {"Output": expected}
