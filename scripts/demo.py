"""The main job on real data: train as a tracked run, serve the model over HTTP, score held-out rows from its answers.

The accuracy printed is computed from the endpoint's answers alone. State goes to a temporary home, the router takes a
free port, and everything that was started is stopped at the end, also after an error.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

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


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """Say what happens now, and how long it took when it is over."""
    print(f"  {text} ...", flush=True)
    started = time.perf_counter()
    yield
    print(f"  {'':4}done in {time.perf_counter() - started:.1f} s", flush=True)


def main() -> int:
    """Run the demo; the exit status is 0 only when the served model is as good as it should be."""
    with tempfile.TemporaryDirectory(prefix="mlfuncs-demo-") as home:
        os.environ.update(MLFUNCS_HOME=home, MLFUNCS_PORT="0", MLFUNCS_PROJECT="demo")
        try:
            return demo()
        finally:
            subprocess.run([sys.executable, "-m", "mlfuncs", "down"], check=True)


def demo() -> int:
    """Train, deploy, ask, and compare."""
    _, x_test, _, y_test = split_data()
    with step("training as a tracked run on scikit-learn's breast-cancer data"):
        run = train.run(c=0.5)
    print(f"      run {run.id}: {run.status}, train accuracy {run.metrics['train_accuracy']:.4f}")
    with step("deploying the model behind an HTTP endpoint"):
        endpoint = Diagnose.deploy(model=run.outputs["output"])
    print(f"      {endpoint.url} serves {endpoint.revision}")
    with step(f"sending {len(x_test)} held-out rows over HTTP, one request a row"):
        answers = [endpoint.invoke(rows=[row.tolist()])[0] for row in x_test]
    accuracy = sum(answer == truth for answer, truth in zip(answers, y_test, strict=True)) / len(y_test)
    print(f"  accuracy of the {len(answers)} answers: {accuracy:.4f}")
    return 0 if accuracy > 0.95 else 1


if __name__ == "__main__":
    raise SystemExit(main())
