"""The main job on real data: train as a tracked run, serve the model over HTTP, score held-out rows from its answers.

With `--target docker` the model is served from containers, which are then taken from 0 to 2 and back by load.
The accuracy printed is computed from the endpoint's answers alone. State goes to a temporary home, the router takes a
free port, and everything that was started is stopped at the end, also after an error.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

import mlfuncs as ml


def split_data() -> tuple:
    """Train and held-out halves of the 569 rows x 30 features, the same at every call."""
    data = load_breast_cancer()
    return train_test_split(data.data, data.target, test_size=0.3, random_state=0, stratify=data.target)


@ml.function
def train(c: float = 1.0) -> Pipeline:
    """A scaled logistic regression fitted on the training rows."""
    x_train, _, y_train, _ = split_data()
    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000)).fit(x_train, y_train)
    ml.log_metric("train_accuracy", float(model.score(x_train, y_train)))
    return model


@ml.function(scale=ml.Scale(min=1, max=2))
class Diagnose:
    """Predicts 0 (malignant) or 1 (benign) for rows of 30 measurements."""

    def __init__(self, model: Pipeline) -> None:
        self.model = model

    def __call__(self, rows: list[list[float]]) -> list[int]:
        return [int(label) for label in self.model.predict(rows)]


CONTAINERS = ml.Scale(min=0, max=2, concurrency=1, window_s=4, grace_s=0)


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """Say what happens now, and how long it took when it is over."""
    print(f"  {text} ...", flush=True)
    started = time.perf_counter()
    yield
    print(f"  {'':4}done in {time.perf_counter() - started:.1f} s", flush=True)


def main() -> int:
    """Run the demo; the exit status is 0 only when the served model is as good as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=("process", "docker"), default="process", help="what serves the model")
    target = parser.parse_args().target
    with tempfile.TemporaryDirectory(prefix="mlfuncs-demo-") as home:
        os.environ.update(MLFUNCS_HOME=home, MLFUNCS_PORT="0", MLFUNCS_PROJECT="demo")
        try:
            return demo(target)
        finally:
            subprocess.run([sys.executable, "-m", "mlfuncs", "down"], check=True)


def demo(target: str) -> int:
    """Train, deploy, ask, and compare; with containers also scale."""
    _, x_test, _, y_test = split_data()
    with step("training as a tracked run on scikit-learn's breast-cancer data"):
        run = train.run(c=0.5)
    print(f"      run {run.id}: {run.status}, train accuracy {run.metrics['train_accuracy']:.4f}")
    with step("deploying the model behind an HTTP endpoint"):
        scale = {} if target == "process" else {"scale": CONTAINERS}
        endpoint = Diagnose.deploy(target=target, model=run.outputs["output"], wait_s=900, **scale)
    print(f"      {endpoint.url} serves {endpoint.revision}")
    with step(f"sending {len(x_test)} held-out rows over HTTP, one request a row"):
        answers = [endpoint.invoke(rows=[row.tolist()])[0] for row in x_test]
    accuracy = sum(answer == truth for answer, truth in zip(answers, y_test, strict=True)) / len(y_test)
    print(f"  accuracy of the {len(answers)} answers: {accuracy:.4f}")
    scaled = target == "process" or scale_by_load(endpoint, x_test[0].tolist())
    endpoint.delete()
    return 0 if accuracy > 0.95 and scaled else 1


def scale_by_load(endpoint: ml.Endpoint, row: list[float]) -> bool:
    """Whether the containers go to 0, to 2 under load, and back to 0."""
    with step("waiting until no container is left"):
        down = until(lambda: not endpoint.status().replicas)
    stop, errors = threading.Event(), []

    def ask() -> None:
        while not stop.is_set():
            try:
                endpoint.invoke(rows=[row])
            except ml.MlfuncsError as exc:
                errors.append(exc)

    clients = [threading.Thread(target=ask) for _ in range(8)]
    with step("asking from 8 clients until 2 containers answer"):
        for client in clients:
            client.start()
        up = until(lambda: sum(replica.state == "ready" for replica in endpoint.status().replicas) == 2)
        stop.set()
        for client in clients:
            client.join()
    with step("waiting until no container is left"):
        down_again = until(lambda: not endpoint.status().replicas)
    reached = down and up and down_again
    print(f"  containers: 0 -> 2 -> 0 {'as wished' if reached else 'NOT reached'}, {len(errors)} errors")
    return reached and not errors


def until(holds: Callable[[], bool], timeout_s: float = 120.0) -> bool:
    """Whether it came to hold in time."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


if __name__ == "__main__":
    raise SystemExit(main())
